"""Token counts and cuts, checked against the real tokenizer and the engine's own encoding."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from labkit import paths, tokens
from labkit.engine.encode import encode_examples, find_start
from labkit.errors import LabkitError
from labkit.examples import Chat, Completion, Example
from tests.test_assets import base_folder  # noqa: F401

TEXTS = [
    "From: someone@example.com\nSubject: Re: 2  for  3, and a walk?\n\n> It's   over!!  ½ price — 1993...\n\n\n-- \nJ.",
    "😀😀 gooool 🏒🏒 ça va? 日本シリーズ第七戦  ",
    "<|im_start|>user\nWho won 5-3?<|im_end|>\n",
    "   \t\n   ",
    "supercalifragilistic don't we'll 'tis",
]


def forget() -> None:
    for cached in (tokens._tokenizer, tokens._counter, tokens._chat_template, tokens._settings):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def real_tokenizer(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # noqa: F811
    monkeypatch.setenv("LABKIT_BASE_MODEL", str(base_folder))
    forget()
    yield base_folder
    forget()


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


POSTS = ["Re: 5-3\n\n  The  Sox won't\tlose!!  ½ — 1993...\r\n> it's\u00a0 9th \n", "ça va? 日本シリーズ 😀😀", " ", ""]


def test_openais_encodings_give_the_published_ids() -> None:
    """Ids and counts as in openai-cookbook, examples/How_to_count_tokens_with_tiktoken.ipynb."""
    assert tokens.encode("2 + 2 = 4", "gpt-4") == [17, 489, 220, 17, 284, 220, 19]
    assert tokens.encode("2 + 2 = 4", "gpt-4o-mini-2024-07-18") == [17, 659, 220, 17, 314, 220, 19]
    assert tokens.encode("2 + 2 = 4", "ada") == [17, 1343, 362, 796, 604]
    birthday = "お誕生日おめでとう"
    assert [tokens.count(birthday, model) for model in ("davinci", "gpt-3.5-turbo", "gpt-4o")] == [14, 9, 8]
    assert tokens.array("2 + 2 = 4", "ada").tolist() == [17, 1343, 362, 796, 604]


@pytest.mark.parametrize(("model", "encoding"), [
    ("gpt-4o-mini", "o200k_base"), ("ft:gpt-4.1-2025-04-14:org::id", "o200k_base"), ("gpt-4-0613", "cl100k_base"),
    ("babbage-002", "cl100k_base"), ("babbage", "r50k_base"), ("ada:ft-org-2022-01-01-00-00-00", "r50k_base"),
    ("o4-mini-2025-04-16", "o200k_base"), ("smollm2-135m-instruct", "local"), ("cl100k_base", "cl100k_base")])
def test_each_model_has_its_encoding(model: str, encoding: str) -> None:
    assert tokens.encoding_of(model) == encoding


def test_a_model_of_unknown_encoding_is_named() -> None:
    for model in ("llama-9", "adamant", "gpt-40"):
        with pytest.raises(LabkitError, match="cl100k_base"):
            tokens.count("x", model)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text() | st.text("ab'st 1  \n\r\t.,é😀日\u00a0\x1c\x85½", max_size=60), max_size=4))
def test_counting_many_texts_is_counting_each(texts: list[str]) -> None:
    for model in (None, "ada", "gpt-4o", "gpt-4"):
        assert tokens.count_many(texts, model) == [tokens.count(text, model) for text in texts]


@pytest.mark.parametrize(("model", "last"), [(None, 0x33480), ("ada", 0x3000)])
def test_fast_counts_are_those_of_the_tokenizer(model: str | None, last: int) -> None:
    """Every token alone, and characters between letters, spaces and digits."""
    tokenizer = tokens._tokenizer(tokens.encoding_of(model))
    fast = tokens._counter(tokens.encoding_of(model))
    assert "slowly" not in fast.__name__
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.get_vocab_size())]
    texts += [f"a{sign}b  {sign} {sign}{sign}1 '{sign}s\n" for sign in map(chr, range(last))
              if not 0xD800 <= ord(sign) < 0xE000]
    texts += [*TEXTS, *POSTS, "x" + " " * 200_000 + "y", "<|im_start|>a <|endoftext|>  <|im_end|> 1"]
    exact = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    assert [text for text, count, found in zip(texts, fast(texts), exact, strict=True) if count != len(found)] == []
    chance = random.Random(0)
    words = [text for text in texts if text.isascii()]
    mixed = ["".join(chance.choices(words, k=30)) for _ in range(500)]
    assert fast(mixed) == [tokens.count(text, model) for text in mixed]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text() | st.text("ab'st 1  \n\r\t.,é😀日\u00a0\x1c\x85½<|im_start|>\x04", max_size=60), max_size=4))
def test_fast_counts_of_made_up_texts(texts: list[str]) -> None:
    clean = [tokens._clean(text) for text in texts]
    for model in (None, "ada"):
        assert tokens._counter(tokens.encoding_of(model))(clean) == [tokens.count(text, model) for text in clean]


@pytest.mark.parametrize("model", [None, "ada", "gpt-4o", "gpt-4"])
@pytest.mark.parametrize("text", [*POSTS, *TEXTS])
def test_spans_cover_the_text_and_truncate_keeps_to_them(text: str, model: str | None) -> None:
    found = tokens.spans(text, model)
    assert [token for token, _, _ in found] == tokens.encode(text, model)
    covered = {place for _, begin, end in found for place in range(begin, end)}
    assert covered == set(range(len(text)))
    for n in range(len(found) + 1):
        assert tokens.count(tokens.truncate(text, n, model), model) <= n


def test_a_text_is_shown_in_tokens_without_relying_on_colour() -> None:
    cut = tokens.show("Won <b>\n😀", "gpt-4")
    assert str(cut).startswith("6 tokens, cl100k_base: |Won|·<|b|>↵|")
    assert cut.pieces()[-2:] == ["😀…", "…😀"]
    page = cut._repr_html_()
    assert "&lt;" in page and "<b>" not in page and "solid" in page and "dashed" in page


def test_half_a_surrogate_pair_is_counted_not_refused() -> None:
    for model in (None, "gpt-4o", "ada"):
        assert tokens.count("a\ud800b", model) >= 2 and tokens.count_many(["a\ud800b"], model)[0] >= 2


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who won 5-3?"},
                {"role": "assistant", "content": "The Sox."}, {"role": "user", "content": "And?", "name": "Jo"},
                {"role": "assistant", "content": "Nobody."}]


def test_a_chat_counts_its_texts_and_what_the_format_adds() -> None:
    for model in ("gpt-4o", "gpt-3.5-turbo-0613"):
        texts = sum(tokens.count(value, model) for message in CONVERSATION for value in message.values())
        assert tokens.count_chat(CONVERSATION, model) == texts + 3 * 5 + 1 + 3


def test_an_example_counts_as_the_engine_trains_it(real_tokenizer: Path) -> None:
    class Model:  # what of engine.model.BaseModel the encoding needs
        tokenizer = AutoTokenizer.from_pretrained(real_tokenizer)
        context, eos = 8192, tokenizer.eos_token_id

        def encode(self, text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    turns = tuple({name: text for name, text in message.items() if name != "name"} for message in CONVERSATION)
    cases: list[Example] = [Completion("Who won?\n\n###\n\n", " hockey"),
                            Chat(turns, (False, False, True, False, True)),
                            Chat(turns[1:], (False, False, False, True))]
    for example in cases:
        model: Any = Model()
        encoded, _ = encode_examples(model, [example], find_start(model, [example], activated=False))
        assert sum(tokens.count_example(example)) == sum(item.tokens for item in encoded)
    prompt, completion = tokens.count_example(cases[0], "gpt-4o")
    assert (prompt, completion) == (tokens.count("Who won?\n\n###\n\n", "gpt-4o"), 1)
