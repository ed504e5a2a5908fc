"""Token ids cut into blocks with names, and which blocks are computed or attended over together: no tensors here.

A block is named by a hash of the weights and of all tokens up to its end, so prompts that begin
alike share their first blocks.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 64  # tokens
ROWS = 16  # blocks computed in one forward pass: with 1,024 tokens the intermediate results still fit the caches


@dataclass(frozen=True)
class Block:
    """A stretch of a prompt: `ids`, which begin at `position` tokens, under a name for all up to there."""

    name: str
    ids: tuple[int, ...]
    position: int


def blocks(ids: Sequence[int], model: str, cut: int = 0) -> list[Block]:
    """A prompt in blocks, for a `model` of that name; one ends at `cut`, and the next ones are counted from there."""
    found, name = [], hashlib.sha256(f"{model}/{BLOCK}".encode()).digest()
    begins = [*range(0, cut, BLOCK), *range(cut, len(ids), BLOCK)]
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=False):
        piece = tuple(ids[begin:end])
        name = hashlib.sha256(name + np.array(piece, dtype="<i8").tobytes()).digest()
        found.append(Block(name.hex()[:40], piece, begin))
    return found


def beginnings(rows: list[list[Block]]) -> list[tuple[list[Block], list[int]]]:
    """The blocks that several rows begin with, and which rows these are."""
    alike: dict[str, list[int]] = {}
    for row, blocks in enumerate(rows):
        if blocks:
            alike.setdefault(blocks[0].name, []).append(row)
    found = []
    for members in alike.values():
        if len(members) > 1:
            found.append((common([rows[row] for row in members]), members))
    return found


def endings(rows: list[list[Block]], following: Sequence[int]) -> dict[str, int]:
    """By the name of each prompt's last block the token that follows it, where that is the same in all rows."""
    pairs = {(blocks[-1].name, token) for blocks, token in zip(rows, following, strict=False) if blocks}
    names = Counter(name for name, _ in pairs)
    return {name: token for name, token in pairs if names[name] == 1}


def common(rows: list[list[Block]]) -> list[Block]:
    """The blocks that all these rows begin with."""
    return rows[0][: len(os.path.commonprefix([[block.name for block in row] for row in rows]))]


def by_width(todo: dict[tuple[int, int], list[list[Block]]]) -> Iterator[tuple[int, list[list[Block]]]]:
    """Passes of rows of the same width and past: what comes out does not depend on the others then."""
    for (width, _), rows in sorted(todo.items()):
        for begin in range(0, len(rows), ROWS):
            yield width, rows[begin : begin + ROWS]


def packed(todo: dict[tuple[int, int], list[list[Block]]]) -> Iterator[tuple[int, list[list[Block]]]]:
    """Passes of rows of nearly the same width, as many as come to the same number of tokens."""
    rows = [(width, row) for (width, _), alike in sorted(todo.items()) for row in alike]
    while rows:
        count = max(n for n in range(1, len(rows) + 1) if n == 1 or n * rows[n - 1][0] <= ROWS * BLOCK)
        yield rows[count - 1][0], [row for _, row in rows[:count]]
        rows = rows[count:]
