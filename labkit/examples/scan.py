"""One pass over a file, a batch of rows at a time; the batches of a large file go to several processes."""

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from labkit.examples import fixes as mend
from labkit.examples.evidence import Scan
from labkit.examples.examine import Item, Question, compared, examine
from labkit.examples.formats import lines

BATCH = 2_000  # rows
LARGE = 32_000_000  # bytes; a smaller file is done before other processes have started
PROCESSES = 2  # at most; each takes about 120 MB
SHOW_PROGRESS = 20_000_000  # bytes of a file from which on a bar is shown


def scan(path: Path, fixes: list[mend.Fix], model: str | None = None, time_column: str | None = None,
         group_column: str | None = None, boilerplate: np.ndarray | None = None) -> Scan:
    """Read a whole file through the fixes. `model` is whose tokens are counted (None: the local base model).

    `boilerplate` is that of another scan whose sketches are to be compared with these; without
    it, the first examples tell what many share. Raises `DataError` for a file that cannot be used.
    """
    batches = _batches(path, fixes)
    first = next(batches, [])
    # What the fixes set aside by place in the file is left out here: it need not go to every process.
    asked = Question(tuple(fix for fix in fixes if fix.drop is None), model, time_column, group_column)
    asked = compared(first, asked, boilerplate)
    found = Scan(boilerplate=asked.boilerplate)
    for part in _examined(chain([first], batches), asked, path.stat().st_size >= LARGE):
        found.take(part)
    found.finish()
    return found


def _batches(path: Path, fixes: list[mend.Fix]) -> Iterator[list[Item]]:
    from tqdm import tqdm

    dropped = {int(index) for fix in fixes if fix.drop is not None for index in fix.drop}
    rows = tqdm(lines(path, mend.repairs(fixes)), desc=path.name, unit=" rows", unit_scale=True,
                disable=None if path.is_file() and path.stat().st_size > SHOW_PROGRESS else True)
    items = ((index, line, content) for index, (line, content) in enumerate(rows) if index not in dropped)
    while batch := list(islice(items, BATCH)):
        yield batch


def _examined(batches: Iterator[list[Item]], asked: Question, large: bool) -> Iterator[Scan]:
    """What each batch shows, in the order of the batches."""
    processes = min(PROCESSES, os.cpu_count() or 1)
    if not large or processes == 1:
        yield from (examine(batch, asked) for batch in batches)
        return
    from joblib import Parallel, delayed  # starts processes on every system without a guard in the caller's script
    from joblib.externals.loky import get_reusable_executor

    work: Any = (delayed(examine)(batch, asked) for batch in batches)
    try:
        yield from Parallel(processes, return_as="generator", pre_dispatch=processes + 1, batch_size=1,
                            max_nbytes=None)(work)
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)  # the findings need their memory
