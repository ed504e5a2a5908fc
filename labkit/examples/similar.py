"""Near-duplicates in bounded memory: MinHash sketches of word pairs, 96 bytes an example.

Two texts are near-duplicates when their sketches agree in at least `ALIKE` of the places, which
estimates the Jaccard similarity of their pairs of neighbouring words within about 0.06. Source:
Broder, "On the resemblance and containment of documents", 1997; candidates come from bands of
four places as in Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3.
What many texts share, such as an instruction in every prompt, would make all of them alike; it is
left out of the comparison.
"""

import re
from zlib import crc32

import numpy as np

PLACES, BAND, ALIKE = 48, 4, 0.8
NEIGHBOURS = 3  # each text is compared with so many before it that share a band
SHARED, FEW = 0.1, 5  # a pair in more than this share of the texts, and in more than so many, is boilerplate
# One odd multiplier a place: the high bits of a product are a hash of their own (Dietzfelbinger et al., 1997).
_factors = np.random.default_rng(1).integers(1 << 63, size=PLACES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_words, _ascii_words = re.compile(r"\w+").findall, re.compile(rb"\w+").findall


def _hashes(text: str) -> list[int]:
    """The hash of each word. Python's own differs from one run to the next."""
    if text.isascii():
        return list(map(crc32, _ascii_words(text.lower().encode()) or [text.encode()]))
    return [crc32(word.encode("utf-8", "replace")) for word in _words(text.lower()) or [text]]


def boilerplate(texts: list[str]) -> np.ndarray:
    """The pairs of words that many of the texts share: uint64, sorted."""
    pairs, begins = _pairs(texts)
    owner = np.repeat(np.arange(len(begins), dtype=np.uint64), np.diff([*begins, len(pairs)]))
    once = np.unique(pairs ^ (owner * np.uint64(0x9E3779B97F4A7C15)), return_index=True)[1]  # once a text
    found, counts = np.unique(pairs[once], return_counts=True)
    return found[counts > max(FEW, SHARED * len(texts))]


def sketches(texts: list[str], ignored: np.ndarray) -> np.ndarray:
    """The sketch of each text: uint16 of shape [texts, PLACES]; case, punctuation and `ignored` pairs do not count.

    A text that has nothing but ignored pairs is sketched whole.
    """
    pairs, begins = _pairs(texts)
    if len(ignored):
        at = np.minimum(np.searchsorted(ignored, pairs), len(ignored) - 1)
        kept = ignored[at] != pairs
        bare = np.maximum.reduceat(kept, begins)
        kept |= np.repeat(~bare, np.diff([*begins, len(pairs)]))
        begins = np.concatenate([[0], np.cumsum(np.add.reduceat(kept, begins, dtype=np.int64))[:-1]])
        pairs = pairs[kept]
    places = [np.minimum.reduceat((pairs * factor) >> np.uint64(32), begins) for factor in _factors]
    return np.stack(places, axis=1).astype(np.uint16)


def _pairs(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of neighbouring words of all texts, uint64 [n], and where each text's begin, int64 [texts]."""
    words: list[int] = []
    begins = []
    for text in texts:
        begins.append(len(words))
        mine = _hashes(text)
        words += mine if len(mine) > 1 else 2 * mine
    first = np.array(words, dtype=np.uint64)
    # Pairs of neighbours; the pair that would reach into the next text repeats the one before it.
    ends = np.array([*begins[1:], len(words)]) - 1
    second = np.append(first[1:], np.uint64(0))
    pairs = first * np.uint64(0x9E3779B97F4A7C15) + second
    pairs[ends] = pairs[ends - 1]
    return (pairs ^ (pairs >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9), np.array(begins)


def near_pairs(sketches: np.ndarray, same: np.ndarray | None = None) -> np.ndarray:
    """For each text the place of an earlier near-duplicate, or -1: int64 of shape [texts].

    `same` [texts] limits pairs to texts with equal values (labels). Time grows as n log n.
    """
    count = len(sketches)
    found = np.full(count, -1, dtype=np.int64)
    for band in range(0, PLACES, BAND):
        keys = np.ascontiguousarray(sketches[:, band:band + BAND]).view(np.uint64).ravel()
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for step in range(1, NEIGHBOURS + 1):
            at = np.flatnonzero(keys[step:] == keys[:-step])
            earlier, later = order[at], order[at + step]
            if same is not None:
                kept = same[earlier] == same[later]
                earlier, later = earlier[kept], later[kept]
            _keep_alike(sketches, earlier, later, found)
    return found


def _keep_alike(sketches: np.ndarray, earlier: np.ndarray, later: np.ndarray, found: np.ndarray) -> None:
    for begin in range(0, len(earlier), 100_000):  # in pieces: a pair takes 2 × 96 bytes here
        one, other = earlier[begin:begin + 100_000], later[begin:begin + 100_000]
        alike = (sketches[one] == sketches[other]).mean(axis=1) >= ALIKE
        found[other[alike]] = one[alike]
