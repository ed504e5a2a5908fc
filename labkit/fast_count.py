"""Counts the tokens of many texts by tiktoken, with the ranks of a `tokenizer.json`: several times as fast as it.

Equal counts need two things. First, the same merges: tiktoken joins any neighbours that make a token,
the lowest rank first, where a `tokenizer.json` lists which pairs join. In a vocabulary as training
makes it, with one new token a merge, in order, both lead to the same tokens: a token's bytes alone
always become that token, so no other pair that spells it is ever left standing at its turn.
Second, the same pieces before merging: GPT-2's pattern, perhaps with each digit apart. What differs,
few and rare characters, is left to the tokenizer itself.
"""

import json
import re
from collections.abc import Callable, Iterable

from tokenizers import Tokenizer

# GPT-2's pattern. Source: openai/gpt-2, src/encoder.py. Where digits stand apart, each is a piece, and
# the space before it is not cut.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
APART = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
# Digits of Unicode 17, which tiktoken's tables have and those of tokenizers have not.
NEW_DIGITS = "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
LONGEST_SPACE = 100_000  # characters; tiktoken fails on a million in a row
Count = Callable[[list[str]], list[int]]


def counter(tokenizer: Tokenizer) -> Count:
    """A function that counts the tokens of each text, none added before or after, as `tokenizer` would."""
    def slowly(texts: list[str]) -> list[int]:
        return [len(found) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    whole = json.loads(tokenizer.to_str())
    pattern = _pattern(whole)
    ranks = _ranks(whole["model"]) if pattern else None
    if not pattern or not ranks:
        return slowly
    import tiktoken

    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    special = {token["content"]: token["id"] for token in whole["added_tokens"]}
    beyond = max([*ranks.values(), *special.values()]) + 1
    ranks.update({bytes([byte]): beyond + byte for byte in missing})
    cut = tiktoken.Encoding("local", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    strange = re.compile(f"[{_characters(missing)}{NEW_DIGITS}]").search
    gap = re.compile(rf"\s{{{LONGEST_SPACE}}}").search

    def quickly(text: str) -> int:
        return len(cut.encode(text, allowed_special="all", disallowed_special=()))

    def odd(text: str) -> bool:
        """Whether the text holds something that is left to the tokenizer."""
        return bool(strange(text) or len(text) >= LONGEST_SPACE and gap(text))

    def many(texts: list[str]) -> list[int]:
        if not odd("\n".join(texts)):
            return list(map(quickly, texts))
        return [slowly([text])[0] if odd(text) else quickly(text) for text in texts]

    return many


def _pattern(whole: dict) -> str | None:
    """How the tokenizer cuts text before merging, if it is one of the two known ways."""
    first = whole["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    special = sorted(token["content"] for token in whole["added_tokens"])
    if whole["normalizer"] is not None or any(
            token["lstrip"] or token["rstrip"] or token["single_word"] for token in whole["added_tokens"]) or any(
            longer.startswith(token) for token, longer in zip(special, special[1:], strict=False)):
        return None
    *before, last = steps
    if last.get("type") != "ByteLevel" or not last.get("use_regex") or last.get("add_prefix_space"):
        return None
    if not before:
        return WORDS
    digits = len(before) == 1 and before[0].get("type") == "Digits" and before[0].get("individual_digits")
    return APART if digits else None


def _ranks(model: dict) -> dict[bytes, int] | None:
    """Each token's bytes and rank; None unless every merge makes a token of its own, in the order of their ids."""
    plain = ("unk_token", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
             "ignore_merges")
    if model["type"] != "BPE" or any(model.get(name) for name in plain):
        return None
    vocabulary = model["vocab"]
    byte_of = _byte_of()
    pairs: Iterable[list[str]] = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    made = ["".join(pair) for pair in pairs]
    ids = [vocabulary[token] for token in made]
    single = [token for token in vocabulary if len(token) == 1 and token in byte_of]
    if any(later <= before for before, later in zip(ids, ids[1:], strict=False)) or (
            ids and ids[0] <= max(vocabulary[token] for token in single)):
        return None
    return {bytes(map(byte_of.__getitem__, token)): vocabulary[token] for token in [*single, *made]}


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for. Source: openai/gpt-2, src/encoder.py."""
    shown = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _characters(missing: list[int]) -> str:
    """For a pattern: all characters that may need one of these bytes, which the vocabulary does not have."""
    found = []
    for byte in missing:
        if byte < 0x80:
            found.append(f"\\x{byte:02x}")
        elif byte < 0xC0:  # inside characters of every kind
            found.append("\x80-\U0010ffff")
        elif 0xC2 <= byte <= 0xF4:  # the first byte of a character of two, three or four
            size, bits = (6, 5) if byte < 0xE0 else (12, 4) if byte < 0xF0 else (18, 3)
            low = (byte & ((1 << bits) - 1)) << size
            found.append(f"{chr(max(low, 0x80))}-{chr(min(low + (1 << size) - 1, 0x10FFFF))}")
    return "".join(found)
