"""A whole training or validation file, as the service checks it before a job.

A learner's check before upload is this same code, so the two cannot disagree.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.examples.rows import (
    BOM,
    MAX_LINE,
    MAX_LINES,
    MINIMUM,
    Chat,
    Example,
    Problem,
    decode,
    not_an_object,
    parse,
    too_long,
)


@dataclass
class Report:
    """The examples of a file and all that is wrong with it."""

    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """`"completion"`, `"chat"` or, for a file without examples, `"none"`."""
        if not self.examples:
            return "none"
        return "chat" if isinstance(self.examples[0], Chat) else "completion"

    def __str__(self) -> str:
        if not self.problems:
            return f"{len(self.examples)} {self.kind} examples, no problems found"
        shown = "\n".join(f"- {problem}" for problem in self.problems[:10])
        more = f"\n- and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
        return f"{len(self.problems)} problem(s):\n{shown}{more}"


def check(source: Path | str | bytes | Iterable[dict[str, Any]], minimum: int = MINIMUM) -> Report:
    """Read a training or validation file and find what a fine-tuning job would refuse.

    `source` is a path, the bytes of a file, or examples as dictionaries. `minimum` is the least
    number of examples (10 for a training file, 1 for validation). Raises `OSError` when the
    path cannot be read; all other trouble is a `Problem` in the report.
    """
    report = Report()
    for number, row in _rows(source):
        found = row if isinstance(row, Problem) else parse(row, number)
        if isinstance(found, Problem):
            report.problems.append(found)
        else:
            report.examples.append(found)
    kinds = Counter(type(example) for example in report.examples)
    if len(kinds) > 1:
        report.problems.append(Problem(
            0, "", "The file mixes prompt/completion and chat examples.", "Keep one of the two forms.",
            kind="mixed_forms"))
    if not report.problems and len(report.examples) < minimum:
        report.problems.append(Problem(
            0, "", f"The file has {len(report.examples)} example(s), but the minimum is {minimum}.",
            "Add more; 50 to 100 are a sensible start.", "invalid_n_examples", "too_few"))
    return report


def first_unreadable(path: Path) -> Problem | None:
    """The first line that is not a JSON object, or an empty file: what an upload refuses at once."""
    number = 0
    for number, row in _rows(path):
        if isinstance(row, Problem):
            return row
        if not isinstance(row, dict):
            return not_an_object(row, number)
    return None if number else Problem(0, "", "The file is empty.", "Write one JSON object a line.")


def _rows(source: Path | str | bytes | Iterable[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """Number and content of each non-blank line; a `Problem` in place of one that cannot be read."""
    if not isinstance(source, Path | str | bytes):
        yield from enumerate(source, 1)
        return
    for number, raw in enumerate(_lines(source), 1):
        if number > MAX_LINES:
            yield number, Problem(0, "", f"The file has more than {MAX_LINES:,} lines.", "Train on fewer examples.")
            return
        if len(raw) > MAX_LINE:  # no further: it is only the beginning of the line
            yield number, too_long(number)
            return
        raw = raw.removeprefix(BOM) if number == 1 else raw
        if raw.strip():
            yield number, decode(raw, number)


def _lines(source: Path | str | bytes) -> Iterator[bytes]:
    """A file's lines, one at a time: it may be larger than memory. Of a line beyond `MAX_LINE` comes the beginning."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as handle:
        while line := handle.readline(MAX_LINE + 1):
            yield line
