"""Rows on inference: throughput, few-shot, free generation, overhead, start, and latency under load."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

import labkit
from labkit import assets, paths, tokens
from tests.bench import rivals, workload
from tests.bench.rivals import MissingRival
from tests.bench.sheet import Sheet
from tests.bench.workload import BASE, LABELS, seconds

RUNS = 3
NEW_TOKENS = 64
REQUESTS = 30
QUESTION = "\n\nThis post is about the sport of"


def classify(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """500 posts of 128 tokens through the service with the SDK, against batched transformers."""
    prompts = workload.prompts(workload.older(500), 128)
    cold, warm = [], []
    for _ in range(RUNS):
        workload.forget_prompts()
        cold.append(seconds(lambda: labkit.classify(client, BASE, prompts, LABELS, progress=False)))
        warm.append(seconds(lambda: labkit.classify(client, BASE, prompts, LABELS, progress=False)))
    theirs = rivals.run("classify", folder=str(assets.base_model()), dtype=dtype, prompts=prompts, runs=RUNS)
    ours = sheet.figure("classify", "500 posts through the service, nothing cached", cold, "s")
    sheet.figure("classify", "the same posts again", warm, "s")
    bare = sheet.figure("classify", "transformers, batched", theirs["seconds"], "s")
    sheet.ratio("classify", "our throughput / transformers", bare / ours, (">=", 0.9))


def shots(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """Requests that share eight examples, against the same without: as many as the lab has held-out posts.

    That the examples are read, once, is part of the time.
    """
    posts = workload.older(8 + 240)
    asked = [tokens.truncate(text.strip(), 128) + QUESTION for text in posts.text[8:]]
    shared = "".join(f"{tokens.truncate(text.strip(), 60)}{QUESTION} {label}.\n\n\n"
                     for text, label in zip(posts.text[:8], posts.label[:8], strict=True))
    few, zero = [], []
    for _ in range(RUNS):
        for prompts, spent in ((asked, zero), ([shared + prompt for prompt in asked], few)):
            workload.forget_prompts()
            whole = seconds(lambda p=prompts: labkit.classify(client, BASE, p, LABELS, progress=False))
            spent.append(1000 * whole / len(prompts))
    eight = sheet.figure("shots", "8 examples, a request", few, "ms")
    none = sheet.figure("shots", "no examples, a request", zero, "ms")
    sheet.ratio("shots", "8-shot / zero-shot", eight / none, ("<=", 1.3))


def generate(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """64 greedy tokens, one stream and sixteen, against `transformers.generate` and llama.cpp's server in 4 bits."""
    prompts = [tokens.truncate(text.strip(), 32) for text in workload.older(16).text]
    never = {str(tokens.encode(text)[0]): -100 for text in ("<|im_end|>", "<|endoftext|>")}
    asks = [{"model": BASE, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logit_bias": never}
            for prompt in prompts]

    def spent(server: openai.OpenAI, streams: int) -> list[float]:
        def complete(ask: dict[str, Any]) -> None:
            made = server.completions.create(**ask)
            assert made.usage and made.usage.completion_tokens == NEW_TOKENS

        with ThreadPoolExecutor(streams) as pool:
            return [seconds(lambda: list(pool.map(complete, asks[:streams]))) for _ in range(RUNS + 1)][1:]

    for streams in (1, 16):
        theirs = rivals.run("generate", folder=str(assets.base_model()), dtype=dtype, prompts=prompts[:streams],
                            count=NEW_TOKENS, runs=RUNS)
        rate = sheet.figure("generate", f"service, {streams} streams", _rates(spent(client, streams), streams),
                            "tokens/s")
        rival = sheet.figure("generate", f"transformers, {streams} streams", _rates(theirs["seconds"], streams),
                             "tokens/s")
        sheet.ratio("generate", f"service / transformers, {streams} streams", rate / rival, (">=", 1))
        try:
            with rivals.llama() as server:
                rival = sheet.figure("generate", f"llama.cpp's server, Q4_1, {streams} streams",
                                     _rates(spent(server, streams), streams), "tokens/s")
        except MissingRival as missing:
            sheet.skip("generate", f"llama.cpp: {missing}")
            continue
        sheet.ratio("generate", f"service / llama.cpp's server, {streams} streams", rate / rival)


def overhead(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """One token for prompts never seen before, of three lengths, one request at a time, against a bare forward pass."""

    def first_streamed(prompt: str) -> None:
        stream = client.completions.create(model=BASE, prompt=prompt, max_tokens=8, temperature=0, stream=True)
        next(iter(stream))
        stream.close()

    for length in (16, 60, 120):
        texts = workload.older(400).text.str.strip()
        long_enough = [text for text in texts if tokens.count(text) >= length]
        prompts = [tokens.truncate(text, length) for text in long_enough[:REQUESTS]]
        workload.forget_prompts()
        whole = [1000 * seconds(lambda p=p: client.completions.create(model=BASE, prompt=p, max_tokens=1,
                                                                      temperature=0)) for p in prompts]
        streamed = [1000 * seconds(lambda p=p: first_streamed(p)) for p in [f"Again: {p}" for p in prompts]]
        theirs = rivals.run("single", folder=str(assets.base_model()), dtype=dtype, prompts=prompts)
        ours = sheet.figure("overhead", f"one-token request of {length} tokens", whole, "ms")
        sheet.figure("overhead", f"first streamed token after {length}", streamed, "ms")
        bare = sheet.figure("overhead", f"bare forward pass over {length}", [1000 * s for s in theirs["seconds"]], "ms")
        sheet.ratio("overhead", f"request / forward pass, {length} tokens", ours / bare, ("<=", 1.2))


def start(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """`import labkit`, the service from nothing to its first answer, a notebook kernel to its first answer."""
    from jupyter_client.manager import start_new_kernel

    empty = [seconds(lambda: subprocess.run([sys.executable, "-c", ""], check=True)) for _ in range(RUNS)]
    imports = [seconds(lambda: subprocess.run([sys.executable, "-c", "import labkit"], check=True))
               for _ in range(RUNS)]

    def serve() -> None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            os.symlink(paths.home() / "assets", os.path.join(scratch, "assets"))
            process = subprocess.Popen([sys.executable, "-m", "labkit", "serve", "--port", "0"],
                                       env=os.environ | {"LABKIT_HOME": scratch}, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True)
            assert process.stdout is not None
            said: dict[str, str] = {}
            while "OPENAI_API_KEY" not in said:  # it prints `export NAME=value`
                name, _, value = process.stdout.readline().partition("=")
                said[name.split()[-1] if name.split() else ""] = value.strip()
            ready.append(time.perf_counter() - began)
            own = openai.OpenAI(base_url=said["OPENAI_BASE_URL"], api_key=said["OPENAI_API_KEY"], timeout=60)
            own.completions.create(model=BASE, prompt="Hello", max_tokens=1)
            first.append(time.perf_counter() - began)
            process.terminate()
            process.wait()

    def kernel() -> None:
        manager, talk = start_new_kernel()
        talk.execute_interactive("1 + 1", timeout=60, output_hook=lambda message: None)
        answered.append(time.perf_counter() - began)
        talk.stop_channels()
        manager.shutdown_kernel(now=True)

    ready: list[float] = []
    first: list[float] = []
    answered: list[float] = []
    for _ in range(RUNS):
        began = time.perf_counter()
        serve()
        began = time.perf_counter()
        kernel()
    sheet.figure("start", "an empty Python", empty, "s")
    sheet.ratio("start", "import labkit, s", sheet.figure("start", "import labkit, Python's start included", imports,
                                                          "s") - min(empty), ("<=", 0.3))
    sheet.ratio("start", "service ready, s", sheet.figure("start", "service ready", ready, "s"), ("<=", 4))
    sheet.figure("start", "service to its first answer, the model's loading included", first, "s")
    sheet.ratio("start", "kernel's first answer, s", sheet.figure("start", "kernel to first answer", answered, "s"),
                ("<=", 10))


def busy(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """What jobs.list, jobs.retrieve and a one-token completion take while a job trains."""
    workload.forget_prompts()
    job = workload.start_job(client, workload.examples(workload.older(200), 128))
    while client.fine_tuning.jobs.retrieve(job.id).status not in ("running", *workload.ENDED):
        time.sleep(0.1)
    asked: dict[str, Callable[[], object]] = {
        "jobs.list": lambda: client.fine_tuning.jobs.list(limit=20),
        "jobs.retrieve": lambda: client.fine_tuning.jobs.retrieve(job.id),
        "one-token completion": lambda: client.completions.create(model=BASE, prompt="Hello", max_tokens=1),
    }
    taken: dict[str, list[float]] = {name: [] for name in asked}
    while client.fine_tuning.jobs.retrieve(job.id).status not in workload.ENDED:
        for name, ask in asked.items():
            taken[name].append(1000 * seconds(ask))
        time.sleep(0.5)
    for name, times in taken.items():
        sheet.figure("busy", f"{name} while a job trains", times, "ms")


def clients(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """32 clients at once, each polling jobs and classifying posts in turn."""
    prompts = workload.prompts(workload.older(256), 64)
    workload.forget_prompts()
    polls: list[float] = []
    answers: list[float] = []
    lock = threading.Lock()

    def one(number: int) -> None:
        own = openai.OpenAI(base_url=client.base_url, api_key=client.api_key, timeout=600)
        for prompt in prompts[number::32]:
            poll = 1000 * seconds(lambda: own.fine_tuning.jobs.list(limit=20))
            answer = 1000 * seconds(lambda p=prompt: own.completions.create(model=BASE, prompt=p, max_tokens=1,
                                                                            temperature=0, logprobs=5))
            with lock:
                polls.append(poll)
                answers.append(answer)

    with ThreadPoolExecutor(32) as pool:
        whole = seconds(lambda: list(pool.map(one, range(32))))
    sheet.figure("clients", "jobs.list, 32 clients", polls, "ms")
    sheet.figure("clients", "one-token answer, 32 clients", answers, "ms")
    sheet.figure("clients", "answers of all 32 clients", len(prompts) / whole, "a second")


def _rates(spent: list[float], streams: int) -> list[float]:
    return [streams * NEW_TOKENS / s for s in spent]


def measured_dtype() -> str:
    """What the service computes in on this machine."""
    return json.loads((paths.home() / "machine.json").read_text())["dtype"]
