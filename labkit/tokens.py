"""Exact token counts, offline: for the local base model and for OpenAI's encodings. Loads no torch.

    count("Who won 5-3?")                     as the local base model sees it
    count("Who won 5-3?", "gpt-4o-mini")      as OpenAI bills it
    count_many(texts, "gpt-4.1")              a whole file: tens of MB a second
    count_chat(messages, "gpt-4o-mini")       a prompt of messages, with what the format adds
    show("Who won 5-3?")                      the text cut into tokens, in a notebook or a terminal

A model is named as the API names it, `ft:…` included; None is the local base model. Exact are
o200k_base and cl100k_base (the package bpe-openai holds the ranks), the local model (its own
tokenizer.json) and GPT-3's r50k_base (its ranks are a small asset, fetched once). Not exact: what
a chat's format adds, which OpenAI has published as an approximation only.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from labkit import assets, fast_count
from labkit.errors import LabkitError
from labkit.examples import Chat, Example

LOCAL = "local"
# Which model uses which encoding; the first prefix that fits counts. Source: tiktoken 0.14.0, tiktoken/model.py
# (August 2026), which knows no gpt-6: that it counts as gpt-5 does is an assumption.
ENCODINGS = {
    "smollm2": LOCAL,
    "gpt-6": "o200k_base",
    "gpt-5": "o200k_base",
    "gpt-4.5": "o200k_base",
    "gpt-4.1": "o200k_base",
    "gpt-4o": "o200k_base",
    "chatgpt-4o": "o200k_base",
    "gpt-oss": "o200k_base",  # o200k_harmony: the same but for special tokens
    "o1": "o200k_base",
    "o3": "o200k_base",
    "o4-mini": "o200k_base",
    "gpt-4": "cl100k_base",
    "gpt-3.5": "cl100k_base",
    "gpt-35": "cl100k_base",  # Azure's spelling
    "davinci-002": "cl100k_base",
    "babbage-002": "cl100k_base",
    # p50k_base only adds tokens for runs of spaces, so that this count is exact without such runs, and else too high.
    "text-davinci-002": "r50k_base",
    "text-davinci-003": "r50k_base",
    "text-davinci-001": "r50k_base",
    "text-curie-001": "r50k_base",
    "text-babbage-001": "r50k_base",
    "text-ada-001": "r50k_base",
    "davinci": "r50k_base",
    "curie": "r50k_base",
    "babbage": "r50k_base",
    "ada": "r50k_base",
}
# Tokens that OpenAI's chat format adds. Source: openai-cookbook, examples/Chat_finetuning_data_prep.ipynb, which
# calls the result an approximation.
PER_MESSAGE, PER_NAME, PER_REPLY = 3, 1, 3
MANY = 300_000  # characters, from which on it pays to prepare for fast counting, which takes 0.3 s


def encoding_of(model: str | None) -> str:
    """The encoding of a model: "local", "o200k_base", "cl100k_base" or "r50k_base"; an encoding's name is its own.

    Raises `LabkitError` for a model that the table does not know.
    """
    if model is None or model == LOCAL or model in ENCODINGS.values():
        return model or LOCAL
    base = base_name(model)
    for prefix, encoding in ENCODINGS.items():
        if base == prefix or base.startswith((f"{prefix}-", f"{prefix}.")):
            return encoding
    raise LabkitError(f"Which tokens {model!r} counts in is not known. Name a model that starts with one of "
                      f"{', '.join(ENCODINGS)}; or name the encoding: {', '.join(sorted(set(ENCODINGS.values())))}.")


def base_name(model: str) -> str:
    """The base of a model's name: `ft:gpt-4o-mini-2024-07-18:org::id` and `ada:ft-org-2022-…` name theirs."""
    if model.startswith("ft:"):
        return model.split(":")[1]
    return model.split(":ft-")[0]


def encode(text: str, model: str | None = None) -> list[int]:
    """The token ids of `text`, with nothing added before or after. Raises `AssetError`, `LabkitError`."""
    encoding = encoding_of(model)
    if encoding in (LOCAL, "r50k_base"):
        return _encode(text, encoding).ids
    return _openai(encoding).encode(_clean(text))


def count(text: str, model: str | None = None) -> int:
    """The number of tokens of `text`, with nothing added before or after. Raises `AssetError`, `LabkitError`."""
    encoding = encoding_of(model)
    if encoding in (LOCAL, "r50k_base"):
        return len(_encode(text, encoding))
    return _openai(encoding).count(_clean(text))


def count_many(texts: Iterable[str], model: str | None = None) -> list[int]:
    """`count` of each text, quickly: over 10 MB a second. Raises `AssetError`, `LabkitError`."""
    encoding, clean = encoding_of(model), [_clean(text) for text in texts]
    if encoding not in (LOCAL, "r50k_base"):
        backend = _openai(encoding)
        return [backend.count(text) for text in clean]
    if sum(map(len, clean)) < MANY:
        return [len(found) for found in _tokenizer(encoding).encode_batch_fast(clean, add_special_tokens=False)]
    return _counter(encoding)(clean)


def truncate(text: str, n: int, model: str | None = None) -> str:
    """The beginning of `text` that makes at most `n` tokens.

    It ends where a token ends, and never inside a character, whose bytes may be spread over
    several tokens. Raises `AssetError`, `LabkitError`.
    """
    places = spans(text, model)
    if len(places) <= n:
        return text
    while n > 0 and places[n][1] < places[n - 1][2]:
        n -= 1
    return text[: places[n - 1][2]] if n > 0 else ""


def array(text: str, model: str | None = None) -> np.ndarray:
    """The token ids as an int64 array of shape [tokens]; `torch.from_numpy` makes it a tensor without a copy."""
    return np.array(encode(text, model), dtype=np.int64)


def spans(text: str, model: str | None = None) -> list[tuple[int, int, int]]:
    """Each token's id, and where it begins and ends in `text`, in characters.

    Tokens that are only some bytes of one character all name that character's place.
    """
    encoding = encoding_of(model)
    if encoding in (LOCAL, "r50k_base"):
        found = _encode(text, encoding)
        return [(token, *place) for token, place in zip(found.ids, found.offsets, strict=True)]
    ids, clean = encode(text, model), _clean(text)
    # Byte positions -> character positions: a character begins at each byte that is not 10xxxxxx.
    first_bytes = np.cumsum((np.frombuffer(clean.encode(), np.uint8) & 0xC0) != 0x80)
    sizes = [len(piece) for piece in _bpe(encoding).decode_tokens_bytes(ids)]
    ends = np.cumsum(sizes, dtype=np.int64)
    return [(token, int(first_bytes[end - size]) - 1, int(first_bytes[end - 1]))
            for token, end, size in zip(ids, ends, sizes, strict=True)]


def show(text: str, model: str | None = None) -> "Cut":
    """The text cut into its tokens: boxes in a notebook, bars in a terminal."""
    return Cut(text, spans(text, model), encoding_of(model))


class Cut:
    """A text and its tokens; how Jupyter and `print` show it."""

    SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})

    def __init__(self, text: str, places: list[tuple[int, int, int]], encoding: str) -> None:
        self.text, self.places, self.encoding = text, places, encoding

    def pieces(self) -> list[str]:
        """What each token reads, spaces and line ends as signs; `…` where a character goes on in another token."""
        shown = []
        for index, (_, begin, end) in enumerate(self.places):
            before = "…" if index and begin < self.places[index - 1][2] else ""
            after = "…" if index + 1 < len(self.places) and self.places[index + 1][1] < end else ""
            shown.append(f"{before}{self.text[begin:end].translate(self.SIGNS)}{after}")
        return shown

    def __str__(self) -> str:
        return f"{len(self.places)} tokens, {self.encoding}: |{'|'.join(self.pieces())}|"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Every token in a box; neighbours differ in shade and in the line around them, not in colour alone."""
        import html

        looks = ("background:#dbeafe;border:1px solid #1e3a8a", "background:#fff;border:1px dashed #7c2d12")
        boxes = "".join(
            f"<span title='id {token}' style='{looks[index % 2]};color:#111;padding:0 1px;margin:1px;"
            f"display:inline-block;white-space:pre'>{html.escape(piece)}</span>" + ("<br>" if "↵" in piece else "")
            for index, ((token, _, _), piece) in enumerate(zip(self.places, self.pieces(), strict=True)))
        return (f"<div style='font-family:monospace;line-height:1.9'>{boxes}</div>"
                f"<div>{len(self.places)} tokens, {html.escape(self.encoding)}</div>")


# --- examples and chats ----------------------------------------------------------------------------


def count_chat(messages: Sequence[dict[str, Any]], model: str | None = None) -> int:
    """The tokens of a prompt of messages, up to where the answer begins.

    Exact for the local model, through its chat template. For OpenAI's models the published
    approximation: 3 a message, 1 a name, 3 for the reply, and every text; what is not text
    (tool calls) counts as its JSON. Raises `AssetError`, `LabkitError`.
    """
    if encoding_of(model) == LOCAL:
        return count(render(messages, header=True), model)
    texts, added = [], PER_REPLY
    for message in messages:
        added += PER_MESSAGE + (PER_NAME if message.get("name") else 0)
        values = [value for name, value in message.items() if name != "weight" and value is not None]
        texts += [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    return added + sum(count_many(texts, model))


def count_example(example: Example, model: str | None = None) -> tuple[int, int]:
    """Prompt and completion tokens of one training example; together they are what an epoch trains on.

    For OpenAI a chat is billed once, whole: its completion here is the last message's text. The local
    service trains each assistant turn of a chat as an example of its own, and adds an end-of-text
    token to each completion; this is its `trained_tokens` for one epoch, as long as nothing is cut.
    Raises `AssetError`, `LabkitError`.
    """
    end = 1 if encoding_of(model) == LOCAL else 0
    if not isinstance(example, Chat):
        prompt, completion = count_many([example.prompt, example.completion], model)
        return prompt, completion + end
    if not end:
        completion = count(example.messages[-1]["content"] or "", model)
        return count_chat(example.messages, model) - completion, completion
    turns = [index for index, trained in enumerate(example.trained) if trained]
    prompts = sum(count_chat(example.messages[:index]) for index in turns)
    return prompts, sum(count(example.messages[index]["content"]) + end for index in turns)


def render(messages: Sequence[dict[str, Any]], header: bool) -> str:
    """A chat as the local model reads it; `header` adds the beginning of the next answer."""
    turns = [{**turn, "role": "system" if turn["role"] == "developer" else turn["role"]} for turn in messages]
    return _chat_template().render(messages=turns, add_generation_prompt=header, **_special())


@lru_cache(maxsize=1)
def _chat_template() -> Any:
    """The local model's chat template, with the settings that transformers renders it with."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    folder = assets.base_model()
    file = folder / "chat_template.jinja"
    text = file.read_text("utf-8") if file.exists() else _settings().get("chat_template")
    if not isinstance(text, str):
        raise LabkitError(f"{folder} has no chat template, so chats cannot be counted for it. Count the texts instead.")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)


def _special() -> dict[str, str]:
    """The texts of the special tokens that a template may name: bos_token, eos_token …"""
    found = {name: value for name, value in _settings().items() if name.endswith("_token")}
    return {name: value["content"] if isinstance(value, dict) else value for name, value in found.items() if value}


@lru_cache(maxsize=1)
def _settings() -> dict[str, Any]:
    return json.loads((assets.base_model() / "tokenizer_config.json").read_text("utf-8"))


# --- the encodings ---------------------------------------------------------------------------------


def _encode(text: str, encoding: str = LOCAL) -> Encoding:
    return _tokenizer(encoding).encode(_clean(text), add_special_tokens=False)


@lru_cache(maxsize=2)
def _tokenizer(encoding: str = LOCAL) -> Tokenizer:
    folder = assets.base_model() if encoding == LOCAL else assets.gpt3_vocabulary()
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@lru_cache(maxsize=2)
def _openai(encoding: str) -> Any:
    """bpe-openai's tokenizer itself: its public wrapper cannot count, and refuses texts of 200,000 tokens."""
    from bpe_openai._bindings import tokenizer_for_encoding

    return tokenizer_for_encoding(encoding)


def _bpe(encoding: str) -> Any:
    import bpe_openai

    return bpe_openai.get_encoding(encoding)


def _clean(text: str) -> str:
    """`text`, with a replacement character for each half of a surrogate pair, which has no bytes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


@lru_cache(maxsize=2)
def _counter(encoding: str) -> Callable[[list[str]], list[int]]:
    return fast_count.counter(_tokenizer(encoding))
