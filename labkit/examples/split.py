"""Splits into training and validation, seeded: random, stratified, grouped, or by time; and the leaks between."""

import numpy as np

from labkit.errors import DataError
from labkit.examples.evidence import Scan
from labkit.examples.findings import Finder
from labkit.examples.similar import near_pairs

METHODS = ("random", "stratified", "grouped", "time")


def held_out(scan: Scan, method: str, by: str | None = None, share: float | None = None, seed: int = 42) -> np.ndarray:
    """Which examples validate: bool of shape [examples].

    `share` is the part held out, by default the old tool's: a fifth, but at most 1,000 examples.
    "stratified" keeps the shares of the completions, "grouped" keeps rows with an equal value of
    column `by` together, "time" holds out the latest by column `by`. The first two keep equal
    examples together, too, so that duplicates make their parts somewhat larger or smaller.
    Raises `DataError`.
    """
    count = scan.count
    wanted = min(1_000, count // 5) if share is None else round(share * count)
    refusal = DataError(f"{count} examples cannot be split into training and {wanted} for validation. "
                        f"Add examples that differ, or choose another --share.")
    if not 0 < wanted < count:
        raise refusal
    order = np.random.default_rng(seed).permutation(count)
    chosen = np.zeros(count, dtype=bool)
    if method in ("random", "stratified"):
        chosen[order[:wanted] if method == "random" else _stratified(scan.completions, order, wanted)] = True
        chosen = _with_copies(scan, chosen)
    elif method == "grouped":
        groups = scan.columns.get(by or "")
        if groups is None:
            raise DataError(f"There is no column {by!r} to group by. Columns that name a group: "
                            f"{', '.join(scan.columns) or 'none'}. Name one with --by.")
        chosen = _grouped(groups, order, wanted)
        if not chosen.any() or chosen.all():
            raise DataError(f"The column {by!r} has too few different values to split by. Split by another column.")
    else:
        if not by or not np.isfinite(scan.times).any():
            raise DataError(f"There is no column {by!r} with dates or numbers. Name one with --by.")
        chosen[np.argsort(scan.times, kind="stable")[count - wanted:]] = True
    if not chosen.any() or chosen.all():
        raise refusal
    return chosen


def _with_copies(scan: Scan, chosen: np.ndarray) -> np.ndarray:
    """Each example on the side of the first one that equals it."""
    order = np.lexsort((scan.completions, scan.prompts))  # stable: of equal examples the first in the file leads
    prompts, completions = scan.prompts[order], scan.completions[order]
    leads = np.append(True, (prompts[1:] != prompts[:-1]) | (completions[1:] != completions[:-1]))
    together = np.empty_like(chosen)
    together[order] = chosen[order[leads]][np.cumsum(leads) - 1]
    return together


def _stratified(labels: np.ndarray, order: np.ndarray, wanted: int) -> np.ndarray:
    """Every k-th example of the shuffled examples in the order of their labels: each label gets its share."""
    _, first, codes = np.unique(labels, return_index=True, return_inverse=True)
    by_label = order[np.argsort(first[codes[order]], kind="stable")]  # hashes differ from run to run, places do not
    return by_label[((np.arange(wanted) + 0.5) * len(labels) / wanted).astype(np.int64)]


def _grouped(groups: np.ndarray, order: np.ndarray, wanted: int) -> np.ndarray:
    """Whole groups, in random order, until there are about enough; rows without a value are groups of their own."""
    keys = np.where(groups == 0, -np.arange(1, len(groups) + 1), groups)
    _, names, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    _, first = np.unique(names[order], return_index=True)
    chosen = np.zeros(len(sizes), dtype=bool)
    taken = 0
    for name in np.argsort(first):  # groups in the order in which the shuffled rows name them
        if taken < wanted and taken + sizes[name] <= max(wanted * 1.1, 1):
            chosen[name] = True
            taken += sizes[name]
    return chosen[names]


def leaks(finder: Finder, train: Scan, train_rows: np.ndarray, valid: Scan, valid_rows: np.ndarray) -> None:
    """Add what validation shares with training: equal examples, near ones, and groups. Rows are bool masks.

    A group may only be known by hash, so its name is not told, but its lines are.
    """
    def key(scan: Scan, rows: np.ndarray) -> np.ndarray:
        return scan.prompts[rows] if scan.task != "open-ended" else scan.completions[rows]

    inside = np.flatnonzero(train_rows)
    held = np.flatnonzero(valid_rows)
    exact = np.isin(key(train, train_rows), key(valid, valid_rows))
    seen = np.isin(key(valid, valid_rows), key(train, train_rows))
    if seen.any():
        finder.add("overlap", f"{seen.sum()} of {len(held)} validation prompts are also in training.", seen.sum(),
                   finder.at(inside[exact], "prompt"), fixable=True, drop=train.index[inside[exact]])
    # Validation first: the near one found for a training example is then mostly of validation.
    both = np.concatenate([valid.sketches[held][~seen], train.sketches[inside[~exact]]])
    near = near_pairs(both)
    border = int((~seen).sum())
    close = np.flatnonzero((near[border:] >= 0) & (near[border:] < border))
    if len(close):
        rows = inside[~exact][close]
        finder.add("near_overlap", f"{len(rows)} training examples are almost one of validation.", len(rows),
                   finder.at(rows), fixable=True, drop=train.index[rows])
    for name in train.columns.keys() & valid.columns.keys():
        ours, theirs = train.columns[name][train_rows], valid.columns[name][valid_rows]
        shared = np.isin(theirs, ours[ours != 0])
        if shared.any():
            finder.add("group_overlap", f"{shared.sum()} of {len(held)} validation examples ({shared.mean():.0%}) "
                       f"share their {name} with training.", shared.sum(),
                       finder.at(inside[np.isin(ours, theirs[theirs != 0])], name))
