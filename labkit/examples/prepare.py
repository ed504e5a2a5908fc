"""Prepare a training file: look, mend, split, write. `labkit prepare` and `labkit.prepare` are this.

Where it differs from OpenAI's old tool (`openai tools fine_tunes.prepare_data`) tells data/README.md.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from labkit import paths
from labkit.errors import DataError
from labkit.examples import fixes as mend
from labkit.examples.catalogue import CATALOGUE
from labkit.examples.evidence import Scan
from labkit.examples.findings import Finder, Finding, frequent, token_limit
from labkit.examples.fixes import Fix, Gone
from labkit.examples.formats import dump, first_bytes_problem
from labkit.examples.rows import KEYS, MINIMUM
from labkit.examples.scan import scan
from labkit.examples.split import METHODS, held_out, leaks

ROUNDS = 10  # a fix may bring up another finding; each round reads the file again
Ask = Callable[[Finding, list[tuple[Any, Any]]], bool]  # the finding, and rows before and after its fix


@dataclass
class Prepared:
    """What was found in a file, what was mended, and what was written. Jupyter shows it as a panel."""

    file: Path
    model: str | None
    findings: list[Finding]
    form: str
    task: str
    examples: int
    tokens: np.ndarray  # of each example
    labels: dict[str, int]
    outputs: dict[str, Path] = field(default_factory=dict)  # train, valid, set_aside

    @property
    def fit(self) -> bool:
        """Whether a job would accept what was written, or the file as it is if nothing was."""
        return not any(finding.severity == "error" and not finding.fixed for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        from labkit.examples import report

        return report.as_dict(self)

    def __str__(self) -> str:
        from labkit.examples import report

        return report.as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from labkit.examples import report

        return report.as_html(self)


def prepare(file: str | Path, valid: str | Path | None = None, fix: str | list[str] | Ask | None = None,
            split: str | None = None, by: str | None = None, share: float | None = None, seed: int = 42,
            to: str | None = None, model: str | None = None, labels: list[str] | None = None,
            dry_run: bool = False) -> Prepared:
    """Look at a training file, mend what can be mended, and write it for a fine-tuning job.

    `fix` is None to look only, "all", names of findings to mend, or a function that is asked.
    Written are NAME_prepared.jsonl, or NAME_prepared_train.jsonl and NAME_prepared_valid.jsonl, and
    what was set aside, beside the file; nothing is overwritten, and nothing written unless it is fit.
    `split` is "random", "stratified", "grouped" or "time" (the last two `by` a column); `share` is
    the part held out (default: a fifth, at most 1,000). `to` converts to "chat" or "completion".
    `model` is whose tokens and limit count (default: the local base model); `labels` is the list
    that answers must be on; `dry_run` writes nothing in any case. Raises `DataError` when a file or
    a setting cannot be used.
    """
    if isinstance(fix, list | tuple) and (unknown := set(fix) - CATALOGUE.keys()):
        raise DataError(f"There is no fix named {', '.join(sorted(unknown))}. Fixes are named as their findings: "
                        f"{', '.join(CATALOGUE)}.")
    if split and split not in METHODS:
        raise DataError(f"There is no split {split!r}. Choose one of {', '.join(METHODS)}.")
    if split and valid:
        raise DataError("A validation file is given, so nothing is to be split. Leave out one of the two.")
    if split in ("grouped", "time") and not by:
        raise DataError(f"A {split} split needs the name of a column. Name it with --by.")
    work = _Work(Path(file), Path(valid) if valid else None, model, labels,
                 by if split == "time" else None, by if split == "grouped" else None)
    done = work.mend(fix, to)
    chosen = held_out(work.train, split, by, share, seed) if split and work.train.count else None
    if chosen is not None:
        done += work.check_split(chosen, fix)
    if not split and not valid and work.train.task == "classification":
        work.advise("no_validation", "No examples are held out.")
    result = work.result(done + work.findings)
    if fix is not None and result.fit and not dry_run:
        result.outputs = work.write(chosen)
    return result


@dataclass
class _Work:
    """The files at hand, and the fixes accepted so far."""

    file: Path
    valid_file: Path | None
    model: str | None
    labels: list[str] | None
    time_column: str | None
    group_column: str | None
    fixes: list[Fix] = field(default_factory=list)
    valid_fixes: list[Fix] = field(default_factory=list)
    train: Scan = field(default_factory=Scan)
    valid: Scan | None = None
    findings: list[Finding] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)  # training rows that the split sets aside

    def look(self) -> None:
        """Read the files through the fixes, and find what is left."""
        self.train, self.valid = Scan(), None  # the arrays of the last look would double the memory
        self.train = self._scan(self.file, self.fixes)
        finder = Finder(self.file.name, self.train, self.model, self.labels)
        self._first_bytes(finder, self.file)
        found = finder.all()
        if self.valid_file:
            self.valid = self._scan(self.valid_file, self.valid_fixes, self.train.boilerplate)
            labels = self.labels
            if labels is None and self.train.task == "classification" and self.train.labels:
                labels = frequent(self.train.labels)
            other = Finder(self.valid_file.name, self.valid, self.model, labels, self.train)
            self._first_bytes(other, self.valid_file)
            leaks(finder, self.train, np.ones(self.train.count, bool), self.valid, np.ones(self.valid.count, bool))
            if self.valid.count and self.train.count and self.valid.form != self.train.form:
                other.add("mixed_forms", f"Training has {self.train.form} examples, validation {self.valid.form}.",
                          self.valid.count)
            found = found + other.all()
        self.findings = found

    def _first_bytes(self, finder: Finder, file: Path) -> None:
        if problem := first_bytes_problem(file):
            finder.add(problem.kind, problem.message, 1, [(1, problem.field)])

    def _scan(self, file: Path, fixes: list[Fix], boilerplate: np.ndarray | None = None) -> Scan:
        return scan(file, fixes, self.model, self.time_column, self.group_column, boilerplate)

    def mend(self, fix: str | list[str] | Ask | None, to: str | None) -> list[Finding]:
        """Accept fixes until nothing that is wanted is left to mend; the findings that were mended."""
        self.look()
        if to:
            ends = [common.suffix if mend.is_sign(common.suffix) else ""
                    for common in (self.train.prompt, self.train.completion)]
            converted = mend.conversion(to, *ends)
            self.fixes.append(converted)
            self.valid_fixes.append(converted)
            self.look()
        done: list[Finding] = []
        refused: set[tuple[str, str]] = set()
        for _ in range(ROUNDS):
            accepted = [finding for finding in self.findings if finding.fixable
                        and (finding.file, finding.code) not in refused and self._wanted(finding, fix, refused)]
            if not accepted:
                break
            for finding in accepted:
                self.accept(finding)
            done += [replace(finding, fixed=True) for finding in accepted]
            self.look()
        return done

    def _wanted(self, finding: Finding, fix: str | list[str] | Ask | None, refused: set[tuple[str, str]]) -> bool:
        if callable(fix):
            if fix(finding, self.samples(finding)):
                return True
            refused.add((finding.file, finding.code))
            return False
        return fix == "all" or (fix is not None and finding.code in fix)

    def accept(self, finding: Finding) -> None:
        """Add the fix; changes of training texts are made in validation too, so that both stay alike."""
        made = mend.make(finding)
        if finding.file == self.file.name:
            self.fixes.append(made)
            if finding.drop is None and finding.code not in mend.SET_ASIDE:
                self.valid_fixes.append(made)
        else:
            self.valid_fixes.append(made)

    def samples(self, finding: Finding, count: int = 2) -> list[tuple[Any, Any]]:
        """The first rows that a fix changes, before and after; None after where it sets the row aside."""
        ours = finding.file == self.file.name
        file, fixes = (self.file, self.fixes) if ours or not self.valid_file else (self.valid_file, self.valid_fixes)
        made, shown = mend.make(finding), []
        only = _only(finding, count)
        repaired = iter(mend.stream(file, [*fixes, made], only))
        for before in mend.stream(file, fixes, only):
            after = next(repaired, None)
            if isinstance(before, Gone) or after is None:
                continue
            new = None if isinstance(after, Gone) else after[3]
            if new != before[3]:
                shown.append((before[3], new))
                if len(shown) == count:
                    break
        return shown

    def check_split(self, chosen: np.ndarray, fix: str | list[str] | Ask | None) -> list[Finding]:
        """Leaks between the parts of a split; accepted fixes set training examples aside."""
        finder = Finder(self.file.name, self.train, self.model)
        leaks(finder, self.train, ~chosen, self.train, chosen)
        found = []
        refused: set[tuple[str, str]] = set()
        for finding in finder.found:
            fixed = finding.fixable and self._wanted(finding, fix, refused)
            if fixed:
                self.dropped.update(dict.fromkeys(finding.drop.tolist(), finding.code))
            found.append(replace(finding, fixed=fixed))
        left = int((~chosen).sum()) - len(self.dropped)
        if left < MINIMUM:
            finder.found.clear()
            finder.add("too_few", f"The split leaves {left} examples to train on; the minimum is {MINIMUM}.")
            found += finder.found
        return found

    def advise(self, code: str, message: str) -> None:
        """One more finding about the training file as a whole."""
        finder = Finder(self.file.name, self.train, self.model)
        finder.add(code, message, self.train.count)
        self.findings = self.findings + finder.found

    def result(self, findings: list[Finding]) -> Prepared:
        """Everything found so far."""
        train = self.train
        counts = train.labels if train.labels is not None and train.task == "classification" else {}
        return Prepared(self.file, self.model, findings, train.form, train.task, train.count, train.tokens,
                        dict(sorted(counts.items(), key=lambda pair: -pair[1])))

    def write(self, chosen: np.ndarray | None) -> dict[str, Path]:
        """Write what is left, and what was set aside; the names."""
        parted = chosen is not None or self.valid_file is not None
        targets = _names(self.file, ("train", "valid") if parted else ("train",))
        held = frozenset(self.train.index[chosen].tolist()) if chosen is not None else frozenset()
        gone = 0
        with contextlib.ExitStack() as stack:
            open_files = {name: stack.enter_context(_writing(path)) for name, path in targets.items()}
            inputs = [(self.file, self.fixes, "train")]
            if self.valid_file:
                inputs.append((self.valid_file, self.valid_fixes, "valid"))
            for file, fixes, name in inputs:
                for entry in mend.stream(file, fixes):
                    if not isinstance(entry, Gone) and name == "train" and entry[0] in self.dropped:
                        entry = Gone(entry[0], entry[1], self.dropped[entry[0]], dump(entry[2]).decode().rstrip())
                    if isinstance(entry, Gone):
                        gone += 1
                        open_files["set_aside"].write(dump({"file": file.name, "line": entry.line,
                                                            "reason": entry.code, "content": entry.text}))
                        continue
                    own = {key: value for key, value in entry[3].items() if key in KEYS[self.train.form]}
                    open_files["valid" if entry[0] in held and name == "train" else name].write(dump(own))
        if not gone:
            targets.pop("set_aside").unlink()
        return targets


def _only(finding: Finding, count: int) -> Callable[[int, int], bool] | None:
    """Which rows show a fix, where that is known, so that no others are decoded to find them."""
    if finding.drop is not None:
        first = set(finding.drop[:count].tolist())
        return lambda index, line: index in first
    lines = {line for line, _ in finding.places}
    return (lambda index, line: line in lines) if lines else None


def _names(file: Path, parts: tuple[str, ...]) -> dict[str, Path]:
    """Names for the output that are not taken: the old tool's, with " (1)" and so on where they are."""
    number = 0
    while True:
        sign = f" ({number})" if number else ""
        names = {part: file.with_name(f"{file.stem}_prepared{f'_{part}' if len(parts) > 1 else ''}{sign}.jsonl")
                 for part in parts}
        names["set_aside"] = file.with_name(f"{file.stem}_prepared_set_aside{sign}.jsonl")
        if not any(path.exists() for path in names.values()):
            return names
        number += 1


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Any]:
    with paths.replacing(path) as temporary, open(temporary, "wb") as handle:
        yield handle


def sdk_lines(result: Prepared) -> str:
    """The Python lines that train on what was written."""
    names = result.outputs or {"train": result.file}
    hosted = result.model is not None and not result.model.startswith("smollm2")
    lines = ["import labkit", "", "client = labkit.connect(\"openai\")" if hosted else "client = labkit.connect()"]
    if token_limit(result.model)[0] is None:
        lines.insert(0, f"# The token limit of {result.model} is not known here and was not checked.")
    for name in ("train", "valid"):
        if name in names:
            opened = f"open({str(names[name])!r}, \"rb\")"
            lines.append(f"{name} = client.files.create(file={opened}, purpose=\"fine-tune\")")
    more = ", validation_file=valid.id" if "valid" in names else ""
    more += ", method={\"type\": \"dpo\"}" if result.form == "preference" else ""
    model = result.model or "smollm2-135m-instruct"
    lines.append(f"job = client.fine_tuning.jobs.create(model=\"{model}\", training_file=train.id{more})")
    lines.append("job = labkit.watch(job)")
    return "\n".join(lines)
