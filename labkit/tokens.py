"""Counting tokens as the local base model sees them, without loading the model or torch."""

from functools import lru_cache

from tokenizers import Encoding, Tokenizer

from labkit import assets


def encode(text: str) -> list[int]:
    """The token ids of `text`, with nothing added before or after. Raises `AssetError`."""
    return _encode(text).ids


def count(text: str) -> int:
    """The number of tokens of `text`, with nothing added before or after. Raises `AssetError`."""
    return len(_encode(text))


def truncate(text: str, n: int) -> str:
    """The beginning of `text` that makes at most `n` tokens.

    It ends where a token ends, and never inside a character, whose bytes may be spread over
    several tokens. Raises `AssetError`.
    """
    encoding = _encode(text)
    if len(encoding) <= n:
        return text
    offsets = encoding.offsets  # (start, end) in characters; tokens of one character share both
    while n > 0 and offsets[n][0] < offsets[n - 1][1]:
        n -= 1
    return text[: offsets[n - 1][1]] if n > 0 else ""


def _encode(text: str) -> Encoding:
    return _tokenizer().encode(text, add_special_tokens=False)


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(assets.base_model() / "tokenizer.json"))
