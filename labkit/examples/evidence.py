"""What a pass over a file has found: the evidence from which the findings are drawn, about 130 bytes an example.

Texts are kept as 64-bit hashes and sketches only, so that a million examples fit into memory.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from labkit.examples import similar
from labkit.examples.rows import Problem

PLACES = 5  # first places shown with a finding
MOST_LABELS = 1_000  # more different completions than this are no labels
LONGEST_COMMON = 2_000  # characters of a common prefix or suffix looked at
SEPARATORS = (" ->", "\n\n###\n\n", "\n\n===\n\n", "\n\n---\n\n", "\n\n===>\n\n", "\n\n--->\n\n")
ENDINGS = ("\n", ".", " END", "***", "+++", "&&&", "$$$", "@@@", "%%%")


@dataclass
class Spots:
    """How often something occurs, and where first."""

    count: int = 0
    places: list[tuple[int, str]] = field(default_factory=list)
    problem: Problem | None = None

    def add(self, line: int, where: str = "", problem: Problem | None = None) -> None:
        """Count one more."""
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append((line, where))
            self.problem = self.problem or problem

    def take(self, other: "Spots") -> None:
        """Count what was found further on in the file."""
        self.count += other.count
        self.places = (self.places + other.places)[:PLACES]
        self.problem = self.problem or other.problem


@dataclass
class Common:
    """What all texts of a field share."""

    prefix: str = ""
    suffix: str = ""
    shortest: int = 1 << 60  # characters of the shortest text, outer whitespace aside
    same: bool = True  # all texts are equal
    upper: int = 0
    lower: int = 0
    count: int = 0
    first: str = ""

    @classmethod
    def of(cls, texts: list[str]) -> "Common":
        """What these texts share; at least one."""
        found = cls(texts[0][:LONGEST_COMMON], texts[0][-LONGEST_COMMON:], count=len(texts), first=texts[0])
        found.shortest = min(len(text.strip()) for text in texts)
        found.same = all(text == found.first for text in texts)
        found._shorten(texts, texts)
        whole = "".join(texts)
        if whole.isascii():
            counts = np.bincount(np.frombuffer(whole.encode(), np.uint8), minlength=128)
            found.upper, found.lower = int(counts[65:91].sum()), int(counts[97:123].sum())
        else:
            found.upper, found.lower = sum(map(str.isupper, whole)), sum(map(str.islower, whole))
        return found

    def take(self, other: "Common") -> None:
        """What these share with others."""
        if not self.count or not other.count:
            self.__dict__.update((self if self.count else other).__dict__)
            return
        self.shortest = min(self.shortest, other.shortest)
        self.same = self.same and other.same and self.first == other.first
        self._shorten([other.prefix], [other.suffix])
        self.count, self.upper, self.lower = (
            self.count + other.count, self.upper + other.upper, self.lower + other.lower)

    def _shorten(self, begins: list[str], ends: list[str]) -> None:
        for text in begins:
            while not text.startswith(self.prefix):
                self.prefix = self.prefix[:-1]
        for text in ends:
            while not text.endswith(self.suffix):
                self.suffix = self.suffix[1:]


COLUMNS = {"index": np.uint64, "lines": np.uint64, "prompts": np.int64, "completions": np.int64,
           "tokens": np.uint32, "times": np.float64}


@dataclass
class Scan:
    """What one pass has found. Arrays have one entry an example, in the order of the file.

    Arrays grow while the file is read; `finish` makes numpy's of them.
    """

    forms: Counter[str] = field(default_factory=Counter)
    index: Any = field(default_factory=lambda: array("Q"))
    lines: Any = field(default_factory=lambda: array("Q"))
    prompts: Any = field(default_factory=lambda: array("q"))
    completions: Any = field(default_factory=lambda: array("q"))
    tokens: Any = field(default_factory=lambda: array("I"))
    sketches: Any = field(default_factory=bytearray)
    columns: dict[str, Any] = field(default_factory=dict)
    times: Any = field(default_factory=lambda: array("d"))
    problems: dict[str, Spots] = field(default_factory=dict)
    spots: dict[str, Spots] = field(default_factory=dict)
    prompt: Common = field(default_factory=Common)
    completion: Common = field(default_factory=Common)
    free: dict[str, set[str]] = field(default_factory=lambda: {
        "separators": set(SEPARATORS), "endings": set(ENDINGS)})  # candidates that occur nowhere
    inside: Spots = field(default_factory=Spots)  # the common prompt suffix again, inside prompts
    labels: Counter[str] | None = field(default_factory=Counter)
    rows: int = 0
    size: int = 0  # bytes of the examples as JSONL
    boilerplate: np.ndarray | None = None  # pairs of words that many examples share

    @property
    def count(self) -> int:
        """Readable examples."""
        return len(self.lines)

    @property
    def form(self) -> str:
        """The form of most examples: "completion", "chat", "preference", or "none"."""
        return self.forms.most_common(1)[0][0] if self.forms else "none"

    @property
    def task(self) -> str:
        """The old tool's guess: "open-ended" (no prompts), "classification" (few different completions), "generation".

        Source: `_validators.py` of openai-python 0.26, `infer_task_type`.
        """
        if self.form == "completion" and self.prompt.count and self.prompt.same and not self.prompt.first:
            return "open-ended"
        different = len(np.unique(self.completions)) if self.count else 0
        return "classification" if self.form != "preference" and different < self.count / 3 else "generation"

    def spot(self, code: str, line: int, where: str = "") -> None:
        """Count one more of `code`."""
        self.spots.setdefault(code, Spots()).add(line, where)

    def take(self, part: "Scan") -> None:
        """Add what was found further on in the file."""
        before = self.count
        self.forms.update(part.forms)
        for mine, theirs in ((self.problems, part.problems), (self.spots, part.spots)):
            for code, spots in theirs.items():
                mine.setdefault(code, Spots()).take(spots)
        for name in COLUMNS:
            getattr(self, name).extend(getattr(part, name))
        self.sketches += part.sketches
        for name, values in part.columns.items():
            self.columns.setdefault(name, array("q", bytes(8 * before))).extend(values)
        for values in self.columns.values():
            values.extend(array("q", bytes(8 * (self.count - len(values)))))
        self.prompt.take(part.prompt)
        self.completion.take(part.completion)
        self.inside.take(part.inside)
        self.free = {name: signs & part.free[name] for name, signs in self.free.items()}
        self.labels = None if self.labels is None or part.labels is None else self.labels
        if self.labels is not None:
            self.labels.update(part.labels)
            self.labels = self.labels if len(self.labels) <= MOST_LABELS else None
        self.rows += part.rows
        self.size += part.size

    def finish(self) -> None:
        """Turn the arrays into numpy's, without a copy."""
        for name, kind in COLUMNS.items():
            setattr(self, name, np.frombuffer(getattr(self, name), dtype=kind))
        self.sketches = np.frombuffer(self.sketches, dtype=np.uint16).reshape(-1, similar.PLACES)
        self.columns = {name: np.frombuffer(values, dtype=np.int64) for name, values in self.columns.items()}
