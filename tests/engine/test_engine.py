"""What makes the engine true: cached and uncached agree, the base stays frozen, seeds decide, loss falls."""

import errno
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from labkit.engine import adapter as adapters
from labkit.engine import attention, encode, generate, model, train
from labkit.engine.cache import LEAST, ROOM, PromptCache
from labkit.engine.layout import BLOCK
from labkit.examples import Chat, Completion, auto_epochs, check
from tests import tiny

KINDS = ("llama", "gpt2", "gpt_neo")
SEPARATOR = "\n\n###\n\n"


def posts(count: int = 24, words: int = 12) -> list[Completion]:
    """Posts whose label stands in them, of different lengths."""
    made = []
    for i in range(count):
        label = ("bat", "ice")[i % 2]
        text = " ".join(["the game"] * (1 + i * 5 % words)) + f" {label} number {i}"
        made.append(Completion(text + SEPARATOR, f" {label}"))
    return made


@pytest.fixture(scope="session", params=KINDS)
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture
def base(base_folder: Path) -> model.BaseModel:
    return model.load(base_folder, torch.float32)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
def llama(llama_folder: Path) -> model.BaseModel:
    return model.load(llama_folder, torch.float32)


def trainer(base: model.BaseModel, folder: Path | None, activated: bool = True, name: str = "own",
            epochs: int = 4, seed: int = 7, rate: float = 5.0) -> train.Trainer:
    examples = posts()
    start = encode.find_start(base, examples, activated)
    encoded, _ = encode.encode_examples(base, examples, start)
    adapter = adapters.create(base, name, start, rank=4, seed=seed)
    settings = train.Settings(epochs, 4, rate, seed)
    return train.Trainer(base, adapter, PromptCache(base, folder), encoded[:20], encoded[20:], settings)


def logits_without_cache(base: model.BaseModel, example: encode.Encoded, adapter: adapters.Adapter) -> torch.Tensor:
    """The completion's logits by one plain forward pass of PEFT's own model over the whole sequence."""
    ids = torch.tensor([example.prompt.ids + example.completion])
    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.network.config.name_or_path, dtype=torch.float32), adapter
    )
    offset = len(ids[0]) - example.prompt.start
    extra = {"alora_offsets": [offset]} if whole.active_peft_config.alora_invocation_tokens else {}
    with torch.no_grad():
        logits = whole(input_ids=ids, **extra).logits[0]
    return logits[len(example.prompt.ids) - 1 : -1]


@pytest.mark.parametrize("activated", [True, False])
def test_training_beats_chance_and_its_adapter_means_the_same_in_peft(
    base: model.BaseModel, tmp_path: Path, activated: bool
) -> None:
    job = trainer(base, tmp_path / "cache", activated, epochs=6)
    before = {name: weight.clone() for name, weight in base.network.named_parameters() if ".own." not in name}
    losses = [event.train_loss for event in job.run() if isinstance(event, train.Step)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after = dict(base.network.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())  # the base is frozen

    job.save(tmp_path / "adapter")
    base.network.eval()
    for example in job.validation:
        with torch.no_grad():
            ours, _ = job._forward([example])
        theirs = logits_without_cache(base, example, tmp_path / "adapter")
        torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_peft_finds_the_place_where_an_activated_adapter_starts_by_itself(
    llama: model.BaseModel, tmp_path: Path
) -> None:
    job = trainer(llama, None)
    list(job.run())
    job.save(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama.network.config.name_or_path, dtype=torch.float32),
        tmp_path / "adapter",
    )
    example = job.validation[0]
    ids = example.prompt.ids + example.completion
    with torch.no_grad():
        theirs = peft(input_ids=torch.tensor([ids])).logits[0, len(example.prompt.ids) - 1 : -1]
        llama.network.eval()
        ours, _ = job._forward([example])
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activated", [True, False])
def test_one_seed_gives_one_adapter_to_the_bit(llama_folder: Path, tmp_path: Path, activated: bool) -> None:
    files = []
    for run, seed in enumerate((7, 7, 8)):  # the second run finds the first one's cache, the third another seed
        base = model.load(llama_folder, torch.float32)
        job = trainer(base, tmp_path / "cache", activated, seed=seed)
        list(job.run())
        job.save(tmp_path / str(run))
        files.append((tmp_path / str(run) / adapters.WEIGHTS).read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("activated", [True, False])
def test_a_stopped_run_goes_on_to_the_same_adapter(llama_folder: Path, tmp_path: Path, activated: bool) -> None:
    whole = trainer(model.load(llama_folder, torch.float32), None, activated)
    list(whole.run())
    whole.save(tmp_path / "whole")

    first = trainer(model.load(llama_folder, torch.float32), None, activated)
    for event in first.run():
        if isinstance(event, train.Epoch):
            break
    first.save(tmp_path / "part")
    second = trainer(model.load(llama_folder, torch.float32), None, activated)
    second.restore(tmp_path / "part")
    steps = [event.step for event in second.run() if isinstance(event, train.Step)]
    assert steps[0] == first.step + 1
    second.save(tmp_path / "resumed")
    for name in (adapters.WEIGHTS, train.STATE):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


@pytest.mark.parametrize("activated", [True, False])
def test_layers_below_the_adapter_run_once_for_each_example(
    base: model.BaseModel, tmp_path: Path, activated: bool
) -> None:
    own = trainer(base, tmp_path, activated)
    trained = [path for path, weight in base.network.named_parameters() if weight.requires_grad]
    assert own.adapter.first == 1 and all(".1." in path for path in trained)
    maps = {path.partition(".lora_")[0].rpartition(".")[2] for path in trained}
    assert maps in ({"o_proj", "up_proj", "down_proj"}, {"c_proj", "c_fc"}, {"out_proj", "c_proj", "c_fc"})
    for happening in own.run():
        if isinstance(happening, train.Step):
            break
    passes: list[int] = []
    next(base.layers[0].children()).register_forward_hook(lambda *_: passes.append(1))
    kept = own.evaluate(own.validation)
    assert bool(passes) is not base.enterable
    own.entries.full = True
    assert own.evaluate(own.validation) == pytest.approx(kept, rel=1e-5) and passes


def test_the_next_training_on_the_same_examples_works_out_nothing_again(
    llama_folder: Path, tmp_path: Path
) -> None:
    base = model.load(llama_folder, torch.float32)
    passes: list[int] = []
    next(base.layers[0].children()).register_forward_hook(lambda *_: passes.append(1))
    cache, made = PromptCache(base, tmp_path / "cache"), []

    def run(name: str, seed: int = 7, count: int = 20) -> int:
        passes.clear()
        job = trainer(base, tmp_path, name=name, seed=seed)
        job = train.Trainer(base, job.adapter, cache, job.training[:count], job.validation, job.settings)
        list(job.run())
        job.save(tmp_path / name)
        made.append((tmp_path / name / adapters.WEIGHTS).read_bytes())
        adapters.remove(base, job.adapter)
        return len(passes)

    assert run("first") and not run("again") and made[0] == made[1]
    assert not run("seed", seed=8) and made[2] != made[0]
    assert run("fewer", count=12) and run("more") and made[4] == made[0]
    for file in (tmp_path / "cache").glob("*/*"):
        file.unlink()
    assert run("evicted") and made[5] == made[0]


def test_what_is_kept_of_examples_leaves_a_full_disk(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trainer(model.load(llama_folder, torch.float32), tmp_path)
    file, written = job.entries._file, []

    class Filling:
        """A file on a disk that has room for three examples."""

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, data: memoryview) -> int:
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "no space")
            written.append(data)
            return file.write(data)

    monkeypatch.setattr(job.entries, "_file", Filling())
    losses = [event.train_loss for event in job.run() if isinstance(event, train.Step)]
    assert job.entries.full and os.fstat(file.fileno()).st_size == 0
    undisturbed = trainer(model.load(llama_folder, torch.float32), tmp_path)
    assert losses == pytest.approx([e.train_loss for e in undisturbed.run() if isinstance(e, train.Step)], rel=1e-3)


def test_the_cache_leaves_room_on_the_disk(
    llama: model.BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PromptCache(llama, tmp_path)
    prompts = [[3 + i] * BLOCK for i in range(8)]
    for prompt in prompts[:4]:  # one after another, so that their times differ
        cache.fetch([prompt])
    kept = {file.name: file.stat().st_size for file in tmp_path.glob("*/*")}
    assert len(kept) == 4
    [size] = set(kept.values())

    def disk(_: Path) -> SimpleNamespace:  # one on which 6.5 blocks and what stays free have room
        taken = sum(file.stat().st_size for file in tmp_path.glob("*/*"))
        return SimpleNamespace(free=ROOM + 6.5 * size - taken)

    monkeypatch.setattr(shutil, "disk_usage", disk)
    for prompt in prompts[4:]:
        cache.fetch([prompt])
    left = {file.name for file in tmp_path.glob("*/*")}
    assert 5 <= len(left) <= 6 and not left >= kept.keys() and not cache.full
    assert cache.fetch([prompts[-1]])[1] == [BLOCK] and cache.fetch([prompts[0]])[1] == [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert cache.fetch([[300] * BLOCK])[1] == [0] and not list(tmp_path.glob("*/*"))


def test_epochs_find_again_what_the_cache_has_room_for(llama_folder: Path, tmp_path: Path) -> None:
    base = model.load(llama_folder, torch.float32)
    job = trainer(base, None)
    whole = sum(example.prompt.start for example in job.passed)
    cache, computed = PromptCache(base, tmp_path, limit=whole * base.shape.bytes_per_token // 2), []
    for examples in (job.training, job.training, job.training[::-1]):
        cache.computed = 0
        list(train.Trainer(base, job.adapter, cache, examples, job.validation, job.settings).run())
        computed.append(cache.computed)
    # Once at first, then half of it in each of four epochs; if the oldest went, all of it in each.
    assert whole < computed[0] < 4 * whole and max(computed[1:]) < 4 * whole
    kept = {file.name for file in tmp_path.glob("*/*")}
    others = [encode.encode_text(base, f"other {i} " * 9 + SEPARATOR, job.adapter.start) for i in range(20)]
    others = [replace(example, prompt=prompt) for example, prompt in zip(job.training, others, strict=True)]
    list(train.Trainer(base, job.adapter, cache, others, [], job.settings).run())
    assert len(kept & {file.name for file in tmp_path.glob("*/*")}) < len(kept) / 2


@pytest.mark.parametrize("limit", ["TOKENS", "FRESH"])
@pytest.mark.parametrize("activated", [True, False])
def test_a_step_in_parts_is_the_same_step(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, activated: bool, limit: str
) -> None:
    def run() -> tuple[list[float], int]:
        base = model.load(llama_folder, torch.float32)
        passes: list[int] = []
        base.layers[-1].register_forward_hook(lambda *_: passes.append(1))
        happened = list(trainer(base, None, activated, rate=1.0).run())
        assert {event.done for event in happened if isinstance(event, train.Prepared)} >= {len(posts())}
        return [event.train_loss for event in happened if isinstance(event, train.Step)], len(passes)

    losses, passes = run()
    monkeypatch.setattr(train, limit, 1)  # each example by itself
    parted, more = run()
    assert parted == pytest.approx(losses, rel=1e-3) and more > 2 * passes


def test_prompts_that_begin_alike_are_computed_once(base: model.BaseModel, tmp_path: Path) -> None:
    cache = PromptCache(base, tmp_path)
    common = list(range(3, 3 + 2 * BLOCK))
    prompts = [common + [10 + i] * (i + 1) for i in range(5)]
    past, found = cache.fetch(prompts)
    assert found == [0] * 5
    assert cache.computed == len(common) + sum(range(1, 6))
    again, found = PromptCache(base, tmp_path).fetch(prompts)
    assert found == [len(prompt) for prompt in prompts]
    assert torch.equal(past.states, again.states)


@pytest.mark.parametrize("beginning", [0, 130])
def test_prompts_read_together_are_what_the_network_makes_of_each(base: model.BaseModel, beginning: int) -> None:
    """Of all lengths, in one piece and in several, and with a beginning in common that is attended over once."""
    lengths = [length for length in (60, 3, 130, 200, 64, 75) if beginning + length < base.context]
    prompts = [list(range(3, 3 + beginning)) + [(7 * i + j) % 300 for j in range(length)]
               for i, length in enumerate(lengths)]
    cache = PromptCache(base, None)
    past, _ = cache.fetch([prompt[:-1] for prompt in prompts], share=True, following=[p[-1] for p in prompts])
    assert past.ahead is not None and cache.computed < sum(map(len, prompts))
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            whole = base.network(input_ids=torch.tensor([prompt]), use_cache=True)
        keys = torch.stack([layer.keys[0] for layer in whole.past_key_values.layers])
        own = past.lengths[row]
        torch.testing.assert_close(past.states[:, 0, row, :, past.states.shape[4] - own :],
                                   keys[:, :, len(prompt) - 1 - own : -1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(past.ahead[1][row], whole.logits[0, -1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scale", [1, 50, -50])
def test_attention_over_what_rows_share_holds_for_scores_beyond_the_range_of_exp(scale: float) -> None:
    """At 50 scores are near 200 and exp would be infinite; at -50 some positions' weights would all be zero."""
    chance = torch.Generator().manual_seed(0)
    shared = torch.rand(2, 3, 20, 16, generator=chance)
    keys, values = torch.rand(2, 4, 3, 7, 16, generator=chance)
    query = torch.rand(4, 6, 2, 16, generator=chance) * scale
    later = torch.full((2, 2), -torch.inf).triu(1)
    members = [0, 2, 3]
    found = attention._attend(query, [(keys, values)], None, later.repeat(2, 1), [(shared, members)])
    for row in range(4):
        before = shared if row in members else shared[:, :, :0]
        own, worth = (torch.cat(both, dim=1) for both in ((before[0], keys[row]), (before[1], values[row])))
        scores = query[row] @ own.repeat_interleave(2, 0).transpose(1, 2)
        scores[..., -2:] += later
        torch.testing.assert_close(found[row], scores.softmax(-1) @ worth.repeat_interleave(2, 0))


def test_what_prompts_share_is_read_once_to_the_last_token(llama: model.BaseModel) -> None:
    shared = [(3 * i) % 300 for i in range(BLOCK + 40)]
    prompts = [shared + [number] * 10 for number in range(4)]
    cache = PromptCache(llama, None)
    cache.fetch(prompts[:2], share=True)
    assert cache.computed == len(shared) + 2 * 10
    past, _ = cache.fetch(prompts[2:3], share=True)  # one alone is known to begin as those before it
    assert past.lengths == [10 + len(shared)]
    past, _ = cache.fetch(prompts[2:] + [[9, *prompts[3]]], share=True)
    assert past.lengths == [10, 10, len(prompts[3]) + 1] and past.shared[0].rows == [0, 1]
    for blocks in cache._answer_rows(prompts, ""):
        assert len(shared) in [block.position for block in blocks]
    for blocks in cache._answer_rows([ids[:BLOCK] for ids in prompts], ""):
        assert len(blocks) == 1  # a whole block is cut there anyway


def test_what_a_trainings_prompts_begin_with_is_read_once(base: model.BaseModel, tmp_path: Path) -> None:
    shared = [(3 * i) % 250 for i in range(LEAST)]
    prompts = [[*shared, *([number + 7] * BLOCK), *([number + 9] * 10)] for number in range(4)]
    whole = len(prompts[0])
    answers, training = (PromptCache(base, tmp_path / "prompts") for _ in range(2))  # as in two processes
    answers.fetch(prompts[:1], share=True)
    beginning = training.beginning(prompts)
    assert beginning == shared and not training.holds(prompts, beginning)
    past, found = training.fetch(prompts, beginning=beginning)
    assert found == [whole, 0, 0, 0], "what was asked before the training is not read again"
    assert training.computed == LEAST + 3 * (whole - LEAST) and training.holds(prompts, beginning)
    for asked in (prompts, prompts[3:], prompts[2:3] * 2):
        assert answers.fetch(asked, share=True)[1] == [whole] * len(asked)
    fresh = [*shared, *([20] * BLOCK)]
    assert answers.fetch([fresh, [5, *fresh]], share=True)[1] == [LEAST, 0]
    for row, ids in enumerate(prompts):
        alone = PromptCache(base, None).fetch([ids])[0].states[:, :, 0]
        torch.testing.assert_close(past.states[:, :, row], alone, atol=1e-5, rtol=1e-4)
    # Fewer examples may have more in common, others less: what was read for the first training serves them.
    assert training.fetch(prompts[1:], beginning=prompts[1][: LEAST + 2])[1] == [whole] * 3
    assert training.fetch(prompts[1:])[1] == [whole] * 3
    assert training.beginning([ids[1:] for ids in prompts]) == [], "too little to cut for"


def test_what_a_training_has_read_is_found_for_answers(llama: model.BaseModel, tmp_path: Path) -> None:
    prompts = [[(3 * i) % 300 for i in range(BLOCK + 40)] + [number] * 80 for number in range(3)]
    cache = PromptCache(llama, tmp_path)
    cache.fetch(prompts[:2])
    read = cache.computed
    past, found = cache.fetch(prompts, share=True)
    assert found[:2] == [len(prompts[0])] * 2 and cache.computed == read + len(prompts[2]) - BLOCK
    for row, ids in enumerate(prompts):  # one is laid out in other blocks than the others
        alone = PromptCache(llama, None).fetch([ids])[0].states[:, :, 0]
        own = past.lengths[row]
        torch.testing.assert_close(past.states[:, :, row, :, -own:], alone[:, :, :, -own:], atol=1e-5, rtol=1e-4)


def test_what_is_cached_does_not_depend_on_what_was_computed_beside_it(base: model.BaseModel) -> None:
    prompts = [[(7 * i + j) % 300 for j in range(20 + 30 * i)] for i in range(5)]
    together = PromptCache(base, None).fetch(prompts)[0]
    for row, prompt in enumerate(prompts):
        alone = PromptCache(base, None).fetch([prompt])[0]
        torch.testing.assert_close(together.states[:, :, row, :, -len(prompt) :], alone.states[:, :, 0],
                                   atol=1e-5, rtol=1e-4)


def test_a_damaged_block_is_noticed_and_computed_again(llama: model.BaseModel, tmp_path: Path) -> None:
    prompt = list(range(3, 60))
    good = PromptCache(llama, tmp_path).fetch([prompt])[0]
    file = next(path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(bytes(file.stat().st_size))  # as a crash of the machine may leave it
    cache = PromptCache(llama, tmp_path)
    again, found = cache.fetch([prompt])
    assert found == [0] and torch.equal(good.states, again.states)


def test_the_cache_stays_below_its_limit_and_forgets_the_oldest(llama: model.BaseModel, tmp_path: Path) -> None:
    size = BLOCK * llama.shape.bytes_per_token
    cache = PromptCache(llama, tmp_path, limit=4 * size)
    for i in range(8):
        cache.fetch([[i + 3] * BLOCK])
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0 < kept <= 4 * size
    assert cache.fetch([[10] * BLOCK])[1] == [BLOCK] and cache.fetch([[3] * BLOCK])[1] == [0]


def test_a_cache_that_cannot_write_changes_no_result(llama: model.BaseModel, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    cache = PromptCache(llama, None)
    cache.folder = blocked / "cache"
    states = cache.fetch([[5, 6, 7]])[0].states
    assert not cache.holds([[5, 6, 7]])
    assert cache.full and torch.equal(states, PromptCache(llama, None).fetch([[5, 6, 7]])[0].states)


def request(base: model.BaseModel, text: str, adapter: adapters.Adapter | None = None, **kwargs) -> generate.Request:
    prompt = encode.encode_text(base, text, adapter.start if adapter else None)
    return generate.Request(prompt, adapter, **{"max_tokens": 8, "temperature": 0, **kwargs})


def finish(base: model.BaseModel, requests: list[generate.Request]) -> list[generate.Sequence]:
    generator = generate.Generator(base, PromptCache(base, None))
    sequences = generator.add(requests)
    while generator.running:
        generator.step()
    return sequences


def test_greedy_answers_are_those_of_transformers(base: model.BaseModel) -> None:
    prompts = ["the game tonight", "a", "the good game " * 12]
    answers = finish(base, [request(base, prompt) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([base.encode(prompt)])
        for token in answer.tokens:
            with torch.no_grad():
                scores = base.network(ids).logits[0, -1].log_softmax(-1)
            assert token.id == int(scores.argmax())
            assert token.logprob == pytest.approx(float(scores.max()), abs=1e-3)
            ids = torch.cat([ids, torch.tensor([[token.id]])], dim=1)


def test_penalties_are_openais_formula(llama: model.BaseModel) -> None:
    penalised = request(llama, "the game", max_tokens=12, presence_penalty=0.3, frequency_penalty=-0.9)
    answer = finish(llama, [penalised])[0]
    ids, counts = torch.tensor([llama.encode("the game")]), torch.zeros(llama.network.config.vocab_size)
    for token in answer.tokens:
        with torch.no_grad():
            logits = llama.network(ids).logits[0, -1]
        logits -= counts * -0.9 + (counts > 0) * 0.3
        assert token.id == int(logits.argmax())
        assert token.logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)
        ids = torch.cat([ids, torch.tensor([[token.id]])], dim=1)
        counts[token.id] += 1
    assert counts.max() > 1  # else this tests the half of it


def test_prompts_that_begin_alike_answer_as_each_alone(base: model.BaseModel, tmp_path: Path) -> None:
    examples = "the good game tonight was a bat or ice hockey " * 8  # more than a block
    other = "someone else begins with the subject of baseball " * 6
    texts = [examples + end for end in ("one", "two " * 30, "three " * 9)] + [other + "four", other + "five", "six"]
    wanted = [request(base, text, max_tokens=2 + 3 * number) for number, text in enumerate(texts)]
    assert len({tuple(one.prompt.ids[:BLOCK]) for one in wanted}) == 3
    generator = generate.Generator(base, PromptCache(base, tmp_path))
    joined = generator.add(wanted[:2])
    generator.step()
    joined += generator.add(wanted[2:])  # the third finds its examples read, the others share their own
    while generator.running:
        generator.step()
    alone = [finish(base, [one])[0] for one in wanted]
    again = finish(base, wanted)
    for one, other_time, expected in zip(joined, again, alone, strict=True):
        for found in (one, other_time):
            assert [t.id for t in found.tokens] == [t.id for t in expected.tokens]
            assert [t.logprob for t in found.tokens] == pytest.approx([t.logprob for t in expected.tokens], abs=1e-4)


def test_sequences_may_join_and_leave_a_running_batch(base: model.BaseModel, tmp_path: Path) -> None:
    job = trainer(base, None)
    list(job.run())
    job.save(tmp_path)
    own = adapters.load(base, "loaded", tmp_path)
    wanted = [request(base, "the game" + SEPARATOR, own, max_tokens=6), request(base, "one", max_tokens=9),
              request(base, "good good good" + SEPARATOR, own, max_tokens=2), request(base, "two", max_tokens=3)]
    alone = [finish(base, [one])[0] for one in wanted]
    generator = generate.Generator(base, PromptCache(base, None))
    joined = generator.add(wanted[:2])
    generator.step()
    joined += generator.add(wanted[2:])
    while generator.running:
        generator.step()
    assert [[t.id for t in s.tokens] for s in joined] == [[t.id for t in s.tokens] for s in alone]
    for one, other in zip(joined, alone, strict=True):
        assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=1e-3)


def test_adapters_loaded_one_after_another_each_answer_as_themselves(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, share in ((1, 1.0), (2, adapters.SHARE)):  # the first one in all layers, as earlier versions made them
        monkeypatch.setattr(adapters, "SHARE", share)
        job = trainer(model.load(llama_folder, torch.float32), None, seed=seed)
        list(job.run())
        job.save(tmp_path / str(seed))
    served, prompt = model.load(llama_folder, torch.float32), "the game" + SEPARATOR
    answers = [finish(served, [request(served, prompt)])[0].tokens[0].logprob]  # the base, adapters disabled
    for seed in (1, 2):
        own = adapters.load(served, f"loaded{seed}", tmp_path / str(seed))
        fresh = model.load(llama_folder, torch.float32)
        alone = adapters.load(fresh, "alone", tmp_path / str(seed))
        answers.append(finish(served, [request(served, prompt, own)])[0].tokens[0].logprob)
        expected = finish(fresh, [request(fresh, prompt, alone)])[0].tokens[0].logprob
        assert answers[-1] == pytest.approx(expected, abs=1e-5)
        finish(served, [request(served, prompt)])
    assert len({round(answer, 4) for answer in answers}) == 3


def test_a_plain_adapter_keeps_its_own_prompt_cache(llama: model.BaseModel, tmp_path: Path) -> None:
    job = trainer(llama, None, activated=False)
    list(job.run())
    job.save(tmp_path)
    own = adapters.load(llama, "loaded", tmp_path)
    text = "the good game " * 20 + SEPARATOR
    cache = PromptCache(llama, None)
    generator = generate.Generator(llama, cache)
    mixed = generator.add([request(llama, text), request(llama, text, own)])
    generator.step()
    scores = [generate.score(llama, encode.encode_text(llama, text + " x", adapter.start if adapter else None), adapter)
              for adapter in (None, own)]
    assert mixed[0].tokens[0].logprob != mixed[1].tokens[0].logprob
    for sequence, adapter in zip(mixed, (None, own), strict=True):
        ids = torch.tensor([llama.encode(text)])
        with adapters.active(llama, adapter), torch.no_grad():
            expected = llama.network(ids).logits[0, -1].log_softmax(-1)
        assert sequence.tokens[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert scores[0][-1].logprob != scores[1][-1].logprob


def test_stop_sequences_never_show_and_a_beginning_of_one_is_held_back(llama: model.BaseModel) -> None:
    free = finish(llama, [request(llama, "the game", max_tokens=12)])[0]
    assert len(free.text) > 6
    stop = free.text[3:6]
    generator = generate.Generator(llama, PromptCache(llama, None))
    sequence = generator.add([request(llama, "the game", max_tokens=12, stop=(stop,))])[0]
    shown = []
    while generator.running:
        generator.step()
        shown.append(sequence.text)
    assert sequence.finish_reason == "stop" and sequence.text == free.text[: free.text.index(stop)]
    assert all(sequence.text.startswith(text) for text in shown)


def test_a_seed_decides_what_is_sampled(llama: model.BaseModel) -> None:
    drawn = [finish(llama, [request(llama, "the", temperature=1.5, seed=seed, max_tokens=20)])[0].text
             for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("top_p", [0.0, 1e-300])  # the latter is 0 as a float32, but was no 0 to Python
def test_top_p_of_next_to_nothing_is_greedy(llama: model.BaseModel, top_p: float) -> None:
    greedy = finish(llama, [request(llama, "the")])[0].text
    assert finish(llama, [request(llama, "the", temperature=2.0, top_p=top_p)])[0].text == greedy


def test_log_probabilities_are_a_distribution(llama: model.BaseModel) -> None:
    size = llama.network.config.vocab_size
    token = finish(llama, [request(llama, "the", top_logprobs=size, max_tokens=1)])[0].tokens[0]
    assert sum(math.exp(score) for _, score in token.top) == pytest.approx(1, abs=1e-4)
    assert token.top[0] == (token.id, pytest.approx(token.logprob))


def test_prompt_scores_are_those_of_one_plain_pass(base: model.BaseModel) -> None:
    prompt = encode.encode_text(base, "the game tonight was a good game", None)
    scored = generate.score(base, prompt, None, top=2)
    with torch.no_grad():
        expected = base.network(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
    assert math.isnan(scored[0].logprob)
    for place, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(float(expected[place, prompt.ids[place + 1]]), abs=1e-4)


def test_a_chat_is_learned_turn_by_turn_and_weight_0_is_not(llama: model.BaseModel) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no", "weight": 0},
             {"role": "user", "content": "and?"}, {"role": "assistant", "content": "yes"}]
    report = check([{"messages": turns}], minimum=1)
    chat = report.examples[0]
    assert isinstance(chat, Chat) and not report.problems
    start = encode.find_start(llama, [chat], True)
    (only,), _ = encode.encode_examples(llama, [chat], start)
    assert llama.tokenizer.decode(only.completion) == "yes<|im_end|>"
    prompt = llama.tokenizer.decode(only.prompt.ids)
    assert prompt.endswith("and?<|im_end|>\n<|im_start|>assistant\n") and "no<|im_end|>" in prompt
    assert llama.tokenizer.decode(only.prompt.ids[only.prompt.start :]) == "<|im_start|>assistant\n"


def test_a_chat_that_the_assistant_begins_is_learned_too(llama: model.BaseModel) -> None:
    report = check([{"messages": [{"role": "assistant", "content": "yes"}]}], minimum=1)
    start = encode.find_start(llama, report.examples, True)
    (only,), _ = encode.encode_examples(llama, report.examples, start)
    assert llama.tokenizer.decode(only.prompt.ids) == "<|im_start|>assistant\n" and only.prompt.start == 0
    assert llama.tokenizer.decode(only.completion) == "yes<|im_end|>"


def test_a_prompt_too_long_loses_its_beginning_only(llama: model.BaseModel) -> None:
    example = Completion("lost " * tiny.CONTEXT + "kept" + SEPARATOR, " bat")
    start = encode.find_start(llama, [example], True)
    (encoded,), cut = encode.encode_examples(llama, [example], start)
    assert cut == 1 and encoded.tokens == llama.context
    assert llama.tokenizer.decode(encoded.prompt.ids).endswith("kept" + SEPARATOR)
    assert llama.tokenizer.decode(encoded.prompt.ids[encoded.prompt.start :]) == SEPARATOR


def test_a_completion_too_long_is_refused(llama: model.BaseModel) -> None:
    example = Completion("short" + SEPARATOR, " bat" * tiny.CONTEXT)
    with pytest.raises(ValueError, match="Example 1 has a completion of .* tokens"):
        encode.encode_examples(llama, [example], encode.find_start(llama, [example], True))


@pytest.mark.parametrize(("prompts", "expected"), [
    (["a\n\n###\n\n", "b\n\n###\n\n"], "\n\n###\n\n"), (["one ->", "two ->"], " ->"), (["one", "two"], ""),
    (["ends alike.\n--", "as well.\n--"], "\n--"), (["", ""], "")])
def test_the_separator_is_what_all_prompts_end_with(prompts: list[str], expected: str) -> None:
    assert encode.separator(prompts) == expected


@pytest.mark.parametrize(("examples", "epochs"), [(10, 10), (33, 3), (100, 3), (9000, 2), (30000, 1), (1, 25)])
def test_automatic_epochs_follow_the_published_rule(examples: int, epochs: int) -> None:
    assert auto_epochs(examples) == epochs
