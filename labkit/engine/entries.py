"""What enters an adapter's first layer, worked out once for each example.

The layers below the first one that an adapter changes are frozen and see nothing of it, so
their work on an example is the same in every epoch. It is kept in a temporary file, some
kilobytes an example: memory stays flat however many there are.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from labkit.engine import attention
from labkit.engine.cache import Past
from labkit.engine.encode import Encoded
from labkit.engine.model import BaseModel


class Entries:
    """Hidden states of examples' tails where they enter layer number `first`, in a file in `folder` without a name.

    `folder` None is the system's own for temporary files, which on some systems is in memory.
    """

    def __init__(self, model: BaseModel, first: int, folder: Path | None) -> None:
        self.model, self.first = model, first
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, open as long as this object lives
        self._places: dict[int, tuple[int, int]] = {}  # of an example, by its id(): where it begins, how many tokens
        self.full = first == 0 or not model.enterable  # nothing to gain, no way to do it, or no room on the disk

    @torch.no_grad()
    def add(
        self, batch: Sequence[Encoded], past: Past, lengths: Sequence[int], ids: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Run each example's tail through the layers below `first`, on top of its past, and keep what comes out.

        `ids` and `positions` are `[rows, longest tail]`, filled at the right; a row's tail has so many of `lengths`.
        """
        if self.full:
            return
        with self.model.stopping_before(self.first) as reached, attention.over(past.states, past.lengths):
            self.model.network.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        for example, hidden, length in zip(batch, reached[0], lengths, strict=True):
            self._places[id(example)] = (self._file.seek(0, os.SEEK_END), length)
            try:
                self._file.write(hidden[:length].contiguous().view(torch.uint8).numpy().data)
                self._file.flush()
            except OSError:  # a full disk: what is kept saves time, and changes results by a rounding only
                self.full = True
                return

    def of(self, batch: Sequence[Encoded]) -> torch.Tensor | None:
        """What was kept of some examples, `[rows, longest tail, hidden width]`, zeros at the right; None if not all."""
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
