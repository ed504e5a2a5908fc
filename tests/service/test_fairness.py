"""Many requests of one key do not hold up the single request of another."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import wait_until
from tests.service.test_keys import BASE, Served

CROWD = 100  # requests
NEVER_ENDS = {"2": -100}  # the tiny model's end of text
Ask = Callable[[openai.OpenAI], Any]
LARGE_AND_SMALL: dict[str, tuple[Ask, Ask]] = {
    "answers": (
        lambda c: c.completions.create(model=BASE, prompt="x", max_tokens=150, n=2, logit_bias=NEVER_ENDS),
        lambda c: c.completions.create(model=BASE, prompt="x", max_tokens=2)),
    "prompts that are scored": (
        lambda c: c.completions.create(model=BASE, prompt=["one two " * 20] * 10, max_tokens=0, echo=True, logprobs=0),
        lambda c: c.completions.create(model=BASE, prompt="x", max_tokens=0, echo=True, logprobs=0)),
    "embeddings": (
        lambda c: c.embeddings.create(model=BASE, input=["one two " * 20] * 50),
        lambda c: c.embeddings.create(model=BASE, input="x")),
}


@pytest.fixture(scope="module")
def room(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(tmp_path_factory.mktemp("fair") / "home", tiny_model)
    yield running
    running.stop()


@pytest.mark.parametrize("kind", LARGE_AND_SMALL)
def test_a_crowd_of_one_key_lets_another_key_through(room: Served, kind: str) -> None:
    large, small = LARGE_AND_SMALL[kind]
    many, one = room.person(f"many.{kind[:5]}"), room.person(f"one.{kind[:5]}")
    with ThreadPoolExecutor(CROWD) as pool:
        crowd = [pool.submit(large, many) for _ in range(CROWD)]
        wait_until(lambda: any(asked.done() for asked in crowd))
        small(one)
        before = sum(asked.done() for asked in crowd)
        for asked in crowd:
            asked.result()
    assert before < CROWD / 2


def test_many_texts_to_turn_into_tokens_hold_up_nobody(room: Served) -> None:
    many, one = room.person("texts"), room.person("text")
    one.completions.create(model=BASE, prompt="x", max_tokens=1)  # the model is loaded
    texts = ["one two three " * 20] * 2000 + ["x " * 999]  # refused for the last one
    waited = []
    with ThreadPoolExecutor(8) as pool:
        begin = time.monotonic()
        crowd = [pool.submit(many.completions.create, model=BASE, prompt=texts) for _ in range(8)]
        while not all(asked.done() for asked in crowd):
            sent = time.monotonic()
            one.completions.create(model=BASE, prompt="x", max_tokens=1)
            waited.append(time.monotonic() - sent)
        whole = time.monotonic() - begin
        for asked in crowd:
            with pytest.raises(openai.BadRequestError, match="context"):
                asked.result()
    assert max(waited) < whole / 3, f"{max(waited):.2f} s of {whole:.2f} s"


def test_a_full_generator_has_room_for_another_key(room: Served) -> None:
    """Long answers fill all rows, and none of them ends before the other key's short one."""
    many, one = room.person("long"), room.person("short")
    stream = many.completions.create(model=BASE, prompt="x", max_tokens=220, n=32, logit_bias=NEVER_ENDS, stream=True)
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, stream)
        assert one.completions.create(model=BASE, prompt="x", max_tokens=2).choices
        assert not reading.done()
        ends = [choice.finish_reason for chunk in reading.result() for choice in chunk.choices]
    assert ends.count("length") == 32
