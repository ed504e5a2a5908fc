"""What enters an adapter's first layer, worked out once for each example.

The layers below the first one that an adapter changes are frozen and see nothing of it, so
their work on an example is the same in every epoch, and in every job of a sweep. It is kept in
a temporary file, some kilobytes an example: memory stays flat however many there are.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from labkit.engine import attention
from labkit.engine.adapter import Adapter
from labkit.engine.cache import Past
from labkit.engine.encode import Encoded
from labkit.engine.model import BaseModel


class Entries:
    """Hidden states of the tails of `examples` where they enter `adapter`'s first layer, in a file without a name.

    It is in `folder`; None is the system's own for temporary files, which on some systems is in memory.
    """

    def __init__(self, model: BaseModel, adapter: Adapter, folder: Path | None, examples: Sequence[Encoded]) -> None:
        self.model, self.adapter, self.digest = model, adapter, _digest(examples)
        self._order = [id(example) for example in examples]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, open as long as this object lives
        self._places: dict[int, tuple[int, int]] = {}  # of an example, by its id(): where it begins, how many tokens
        # Nothing to gain, no way to do it, or no room on the disk.
        self.full = adapter.first == 0 or not model.enterable

    def serve(self, adapter: Adapter, examples: Sequence[Encoded]) -> bool:
        """Go over to another training, if it has the same examples in the same order; whether it has.

        What is kept is found by the examples' id(): those of the training served last must stay alive meanwhile.
        """
        before = self.adapter.first, self.adapter.start, self.digest
        if self.full or before != (adapter.first, adapter.start, _digest(examples)):
            return False
        order = [id(example) for example in examples]
        self._places = {new: self._places[old] for new, old in zip(order, self._order, strict=True)
                        if old in self._places}
        self.adapter, self._order = adapter, order
        return True

    def hold(self, batch: Sequence[Encoded]) -> bool:
        """Whether all these examples were added."""
        return not self.full and all(id(example) in self._places for example in batch)

    @torch.no_grad()
    def add(
        self, batch: Sequence[Encoded], past: Past, lengths: Sequence[int], ids: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Run each example's tail through the layers below the adapter's, on top of its past, and keep what comes out.

        `ids` and `positions` are `[rows, longest tail]`, filled at the right; a row's tail has so many of `lengths`.
        """
        if self.full:
            return
        with self.model.stopping_before(self.adapter.first) as reached, attention.over(past.states, past.lengths):
            self.model.network.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        for example, hidden, length in zip(batch, reached[0], lengths, strict=True):
            self._places[id(example)] = (self._file.seek(0, os.SEEK_END), length)
            try:
                self._file.write(hidden[:length].contiguous().view(torch.uint8).numpy().data)
                self._file.flush()
            except OSError:  # a full disk: entries save time, and change results by a rounding only
                self.full = True
                self._places.clear()
                with suppress(OSError):
                    os.ftruncate(self._file.fileno(), 0)
                return

    def of(self, batch: Sequence[Encoded]) -> torch.Tensor | None:
        """What was kept of examples, `[rows, longest tail, hidden width]`, zeros at the right; None if nothing is."""
        if self.full:
            return None
        places = [self._places[id(example)] for example in batch]
        network = self.model.network
        hidden = torch.zeros(len(places), max(count for _, count in places), network.config.hidden_size,
                             dtype=network.dtype)
        for row, (begin, count) in enumerate(places):
            self._file.seek(begin)
            kept = bytearray(self._file.read(count * hidden.shape[2] * hidden.itemsize))
            hidden[row, :count] = torch.frombuffer(kept, dtype=network.dtype).view(count, -1)
        return hidden


def _digest(examples: Sequence[Encoded]) -> str:
    """A hash of all tokens, of where each example's adapter and completion begin, and of the order."""
    found = hashlib.sha256()
    for example in examples:
        ids = example.prompt.ids
        found.update(np.array([example.prompt.start, len(ids), len(example.completion), *ids, *example.completion],
                              dtype="<i8").tobytes())
    return found.hexdigest()
