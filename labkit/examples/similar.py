"""Near-duplicates in bounded memory: MinHash sketches of word pairs, 96 bytes an example.

Two texts are near-duplicates when their sketches agree in at least `ALIKE` of the places, which
estimates the Jaccard similarity of their pairs of neighbouring words within about 0.06. Source:
Broder, "On the resemblance and containment of documents", 1997; candidates come from bands of
four places as in Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3.
"""

import re

import numpy as np

PLACES, BAND, ALIKE = 48, 4, 0.8
NEIGHBOURS = 3  # each text is compared with so many before it that share a band
_words = re.compile(r"\w+").findall


def sketches(texts: list[str]) -> np.ndarray:
    """The sketch of each text: uint16 of shape [texts, PLACES]; case and punctuation do not count."""
    from rensa import RMinHash

    digests = []
    for text in texts:
        words = _words(text.lower())
        sketch = RMinHash(num_perm=PLACES, seed=1)
        sketch.update([*map(" ".join, zip(words, words[1:], strict=False))] or words or [text])
        digests.append(sketch.digest())
    return np.array(digests, dtype=np.uint32).reshape(-1, PLACES).astype(np.uint16)


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
