"""Token counts and cuts, checked against the real tokenizer and the engine's own encoding."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from labkit import paths, tokens
from tests.test_assets import base_folder  # noqa: F401

TEXTS = [
    "From: someone@example.com\nSubject: Re: 2  for  3, and a walk?\n\n> It's   over!!  ½ price — 1993...\n\n\n-- \nJ.",
    "😀😀 gooool 🏒🏒 ça va? 日本シリーズ第七戦  ",
    "<|im_start|>user\nWho won 5-3?<|im_end|>\n",
    "   \t\n   ",
    "supercalifragilistic don't we'll 'tis",
]


@pytest.fixture(autouse=True)
def real_tokenizer(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # noqa: F811
    monkeypatch.setenv("LABKIT_BASE_MODEL", str(base_folder))
    tokens._tokenizer.cache_clear()
    yield base_folder
    tokens._tokenizer.cache_clear()


@pytest.mark.parametrize("text", ["", *TEXTS])
def test_count_is_what_the_model_sees(text: str, real_tokenizer: Path) -> None:
    engine = AutoTokenizer.from_pretrained(real_tokenizer)
    assert tokens.count(text) == len(engine(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", TEXTS)
def test_truncate_cuts_at_the_last_token_that_fits(text: str) -> None:
    whole = tokens._encode(text)
    ends = [0] + [end for start, end in whole.offsets]
    for n in range(-1, len(whole) + 2):
        cut = tokens.truncate(text, n)
        assert text.startswith(cut) and tokens.count(cut) <= max(n, 0)
        assert len(cut) in ends
    assert tokens.truncate(text, len(whole)) == text


def test_truncate_never_cuts_inside_a_character() -> None:
    assert tokens.count("😀") == 3
    assert [tokens.truncate("a😀b", n) for n in range(6)] == ["", "a", "a", "a", "a😀", "a😀b"]


def test_truncate_of_random_text_keeps_the_bound() -> None:
    chance = random.Random(0)
    for _ in range(300):
        text = "".join(chance.choices("ab'st 1  \n.,é😀日\u00a0", k=40))
        n = chance.randrange(30)
        assert tokens.count(tokens.truncate(text, n)) <= n


def test_counting_loads_no_torch(real_tokenizer: Path) -> None:
    code = "import sys; from labkit import tokens; print(tokens.count('a  3'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.COURSE, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]
