"""Products in int8 are near those of the weights they come from, exact in their sums, and for prompts alone."""

import math
import time
from pathlib import Path

import pytest
import torch

from labkit.engine import adapter, encode, generate, int8, machine, model, train
from labkit.engine.cache import PromptCache
from labkit.engine.packed import Packed
from labkit.examples import Completion
from tests import tiny

SECONDS = (3.0, 2.0, 1.0)  # of plain, packed and int8 products


def _usable() -> bool:
    try:
        return machine.has_int8()
    except (AttributeError, RuntimeError):
        return False


needs_int8 = pytest.mark.skipif(not _usable(), reason="this processor has no quick, exact int8")


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> model.BaseModel:
    """A tiny model as it is loaded where int8 was measured to be quickest."""
    monkeypatch.delenv("LABKIT_DTYPE", raising=False)
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype, threads: SECONDS)
    return model.load(tiny.make(tmp_path / "model"))


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_near_the_plain_one_and_each_token_is_rounded_for_itself(bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 80, bias).requires_grad_(False)
    plain.weight[3] = 0
    values = torch.randn(2, 7, 96)
    values[0, 0], values[1, 2] = 0, 1e4 * values[1, 2]
    given, expected, packed = values.clone(), plain(values), Packed(plain, eight=True)
    with int8.products(True), torch.inference_mode():
        found = packed(values)
        torch.testing.assert_close(packed(values[1:, 2:3].clone()), found[1:, 2:3], rtol=0, atol=0)
    difference = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    if bias:
        torch.testing.assert_close(found[0, 0], plain.bias)
    else:
        assert not found[0, 0].any()
        difference[0, 0] = 0  # of zeros there is no share
    assert 0.001 < difference.max() < 0.03  # another product, and a near one
    torch.testing.assert_close(values, given, rtol=0, atol=0)
    torch.testing.assert_close(packed(values), expected, rtol=1e-5, atol=1e-5)  # in its own format again


@needs_int8
def test_what_enters_several_maps_is_rounded_once_and_is_their_own_input(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rounds, round_tokens = [], int8.round_tokens
    monkeypatch.setattr(int8, "round_tokens", lambda values: rounds.append(values) or round_tokens(values))
    maps = [Packed(torch.nn.Linear(96, 80, False).requires_grad_(False), eight=True) for _ in range(3)]
    first, second = torch.randn(5, 96), torch.randn(5, 96)

    def alone(part: Packed, values: torch.Tensor) -> torch.Tensor:
        with int8.products(True):
            return part(values)

    uses = [(maps[0], first), (maps[1], first), (maps[2], second), (maps[0], second)]
    with torch.inference_mode():
        with int8.products(True):
            together = [part(values) for part, values in uses]
        assert list(map(id, rounds)) == [id(first), id(second)]
        torch.testing.assert_close(together, [alone(*use) for use in uses], rtol=0, atol=0)


@needs_int8
def test_prompts_are_read_in_int8_each_for_itself(eight: model.BaseModel, tmp_path: Path) -> None:
    exact = model.load(tmp_path / "model", torch.float32)
    assert eight.digest == exact.digest.rpartition("-")[0] + "-float32-int8"  # so that neither takes the other's
    prompts = [list(range(10 + row, 110 + row, 1)) for row in range(5)]
    together = PromptCache(eight, None).fetch(prompts)[0].states
    for row, prompt in enumerate(prompts):
        alone = PromptCache(eight, None).fetch([prompt])[0].states
        torch.testing.assert_close(together[:, :, row : row + 1], alone, rtol=0, atol=0)
    plain = PromptCache(exact, None).fetch(prompts)[0].states
    difference = (together - plain).norm() / plain.norm()
    assert 0.001 < difference < 0.05


@needs_int8
def test_an_adapter_that_acts_on_prompts_reads_them_in_the_models_own_format(
    eight: model.BaseModel, tmp_path: Path
) -> None:
    exact = model.load(tmp_path / "model", torch.float32)
    found = []
    for loaded in (eight, exact):
        own = adapter.create(loaded, "own", adapter.Start(activated=False))
        found.append(PromptCache(loaded, None).fetch([list(range(10, 110))], own)[0].states)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@needs_int8
def test_the_base_model_says_the_same_of_a_prompt_however_it_is_read(
    eight: model.BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token in one pass with the others, alone over what is kept of them, and as part of a scored text."""
    prompt = encode.encode_text(eight, "the good game " * 12, None)
    generator = generate.Generator(eight, PromptCache(eight, tmp_path / "cache"))
    first, second = (_answer(generator, prompt) for _ in range(2))
    assert generator.cache.reused == len(prompt.ids) - 1
    scored = generate.score(eight, encode.encode_ids([*prompt.ids, first.id], None), None)[-1]
    assert [second.logprob, scored.logprob] == pytest.approx([first.logprob] * 2, abs=1e-5)
    monkeypatch.setattr(int8, "rounded", lambda values: None)
    exact = generate.score(eight, encode.encode_ids([*prompt.ids, first.id], None), None)[-1]
    assert abs(exact.logprob - first.logprob) > 1e-4  # so the three were of int8


@needs_int8
def test_a_training_reads_prompts_as_answers_and_scores_do(
    eight: model.BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Completion(f"{'the game ' * (i % 5 + 1)}{word} {i}###", f" {word}") for i in range(6)
            for word in ("bat", "ice")]
    start = encode.find_start(eight, made, True)
    examples, _ = encode.encode_examples(eight, made, start)
    own = adapter.create(eight, "own", start, rank=4)
    job = train.Trainer(eight, own, PromptCache(eight, None), examples, [], train.Settings(4, 4, 5.0, 0))
    list(job.run())
    one = examples[0]
    loss, _ = job.evaluate([one])
    answer = _answer(generate.Generator(eight, PromptCache(eight, None)), one.prompt, own)
    whole = encode.Prompt([*one.prompt.ids, *one.completion], one.prompt.start)

    def scored() -> list[float]:
        return [token.logprob for token in generate.score(eight, whole, own)[-len(one.completion) :]]

    found = scored()
    assert -sum(found) / len(found) == pytest.approx(loss, abs=1e-5)
    assert dict(answer.top)[one.completion[0]] == pytest.approx(found[0], abs=1e-5)
    monkeypatch.setattr(int8, "rounded", lambda values: None)
    assert abs(scored()[0] - found[0]) > 1e-4  # so all were of int8


def _answer(generator: generate.Generator, prompt: encode.Prompt, own: adapter.Adapter | None = None) -> generate.Token:
    [sequence] = generator.add([generate.Request(prompt, own, max_tokens=1, temperature=0, top_logprobs=1000)])
    generator.step()
    return sequence.tokens[0]


@needs_int8
def test_a_format_that_was_asked_for_is_the_only_one(
    eight: model.BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_DTYPE", "float32")
    loaded = model.load(tmp_path / "model")
    states = [PromptCache(one, None).fetch([list(range(10, 110))])[0].states
              for one in (loaded, model.load(tmp_path / "model", torch.float32))]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert loaded.digest != eight.digest


@needs_int8
@pytest.mark.parametrize("fault", ["slow", "wrong"])
def test_int8_is_left_alone_where_it_is_slow_or_overflows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with oneDNN's slow way, which takes seconds, and without VNNI, where pairs of products are cut at 2 ** 15."""
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    right = int8.Weights.product

    def product(self: int8.Weights, rounded: int8.Rounded) -> torch.Tensor:
        until = time.perf_counter() + (0.005 if fault == "slow" else 0)
        while time.perf_counter() < until:
            pass
        return right(self, rounded) * (0.5 if fault == "wrong" else 1)

    assert machine._product_seconds("float32", 1)[2] < math.inf
    monkeypatch.setattr(int8.Weights, "product", product)
    machine.has_int8.cache_clear()
    try:
        assert not machine.has_int8()
        assert machine._product_seconds("float32", 1)[2] == math.inf
    finally:
        machine.has_int8.cache_clear()


@pytest.mark.parametrize(("float32", "bfloat16", "pays"), [
    (SECONDS, (9.0, 9.0, math.inf), True),
    (SECONDS, (9.0, 1.9, math.inf), False),  # bfloat16 is quick
    ((3.0, 2.0, 1.5), (9.0, 9.0, math.inf), False),  # little is gained
    ((1.0, 2.0, 0.5), (9.0, 9.0, math.inf), False),  # plain weights are quickest, and stay
])
def test_int8_is_taken_where_it_is_much_quicker_and_bfloat16_is_not(
    float32: tuple[float, ...], bfloat16: tuple[float, ...], pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    monkeypatch.delenv("LABKIT_DTYPE", raising=False)
    by_format = {"float32": float32, "bfloat16": bfloat16}
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype, threads: by_format[dtype])
    assert machine.int8_pays() == pays
    assert machine.measured()["flops"]["int8"] == machine.FLOPS / float32[2]
    monkeypatch.setenv("LABKIT_DTYPE", "float32")
    assert not machine.int8_pays()
