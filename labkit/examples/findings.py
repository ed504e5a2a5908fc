"""What a scan means: findings, each with its place, why it matters and what to do."""

from collections import Counter
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from labkit.examples.catalogue import CATALOGUE, LIMITS
from labkit.examples.evidence import ENDINGS, SEPARATORS, Scan
from labkit.examples.rows import MAX_FILE, MAX_LINES, MINIMUM
from labkit.examples.similar import near_pairs


@dataclass(frozen=True)
class Finding:
    """One thing found: where (first lines and fields), how often, why it matters, and what to do."""

    file: str
    code: str
    severity: str
    count: int
    places: tuple[tuple[int, str], ...]  # (line, field), the first few
    message: str
    why: str
    fix: str
    fixable: bool = False
    drop: Any = None  # places in the file of examples that the fix sets aside
    values: Any = None  # what the fix needs to know, such as the separator to add
    fixed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shown = asdict(self)
        del shown["drop"], shown["values"], shown["places"]
        return shown | {"lines": [line for line, _ in self.places],
                        "fields": [where for _, where in self.places]}

    def __str__(self) -> str:
        place = ", ".join(f"{line}" for line, _ in self.places)
        return f"{self.severity} {self.code}: {self.message}" + (f" (line {place})" if place else "")


class Finder:
    """Turns a scan into findings. `labels`: the list that completions must be on, if there is one."""

    def __init__(self, file: str, scan: Scan, model: str | None = None, labels: list[str] | None = None,
                 train: Scan | None = None) -> None:
        """`train` is given with a validation file: what its pairs must look like."""
        self.file, self.scan, self.model, self.train = file, scan, model, train
        self.minimum = 1 if train else MINIMUM
        self.labels = labels
        self.found: list[Finding] = []

    def add(self, code: str, message: str, count: int = 1, places: list[tuple[int, str]] | None = None,
            **more: Any) -> None:
        """One more finding, with what the catalogue says about its code."""
        severity, why, fix = CATALOGUE[code]
        self.found.append(Finding(self.file, code, severity, int(count), tuple(places or ()), message, why,
                                  more.pop("advice", fix), **more))

    def at(self, rows: np.ndarray, where: str = "") -> list[tuple[int, str]]:
        """Lines of the first of some examples."""
        return [(int(line), where) for line in self.scan.lines[rows[:5]]]

    def all(self) -> list[Finding]:
        """Everything found, in the order in which fixes are applied."""
        self._readable()
        if self.scan.count:
            self._forms()
            self._repeated()
            self._lengths()
            self._pairs()
            self._labels()
            self._counted()
        self._size()
        return self.found

    def _readable(self) -> None:
        for code, spots in self.scan.problems.items():
            problem = spots.problem
            if problem is None:
                continue
            self.add(code, problem.message, spots.count, spots.places, fixable=True,
                     advice=CATALOGUE[code][2] + ("" if code == "column_case" else f" By hand: {problem.fix}"))

    def _forms(self) -> None:
        if len(self.scan.forms) > 1:
            said = ", ".join(f"{count} {form}" for form, count in self.scan.forms.most_common())
            self.add("mixed_forms", f"The file mixes forms: {said}.", self.scan.count, fixable=True)

    def _repeated(self) -> None:
        scan = self.scan
        first = first_of(scan.prompts, scan.completions)
        again = np.flatnonzero(first >= 0)
        if len(again):
            self.add("duplicates", f"{len(again)} examples repeat an earlier one.", len(again), self.at(again),
                     fixable=True, drop=scan.index[again])
        labels = scan.task == "classification"
        near = near_pairs(scan.sketches, scan.completions if labels else None)
        near[again] = -1
        alike = np.flatnonzero(near >= 0)
        if len(alike):
            pair = f"line {scan.lines[alike[0]]} is almost line {scan.lines[near[alike[0]]]}"
            self.add("near_duplicates", f"{len(alike)} examples are almost an earlier one: {pair}.", len(alike),
                     self.at(alike), fixable=True, drop=scan.index[alike])
        self._conflicts(np.flatnonzero(first < 0), labels)

    def _conflicts(self, unique: np.ndarray, labels: bool) -> None:
        scan = self.scan
        if self.scan.task == "open-ended" or scan.prompt.same and scan.prompt.count:
            return
        order = unique[np.argsort(scan.prompts[unique], kind="stable")]
        same = np.flatnonzero(scan.prompts[order][1:] == scan.prompts[order][:-1])
        if not len(same):
            return
        clashing = np.unique(scan.prompts[order[same]])
        rows = np.flatnonzero(np.isin(scan.prompts, clashing))
        drop = None
        if labels:
            counts = Counter(zip(scan.prompts[rows].tolist(), scan.completions[rows].tolist(), strict=True))
            best: dict[int, int] = {}
            for (prompt, completion), _ in counts.most_common():
                best.setdefault(prompt, completion)
            drop = scan.index[[row for row in rows if best[int(scan.prompts[row])] != scan.completions[row]]]
        self.add("conflicts", f"{len(clashing)} prompts have different completions.", len(rows), self.at(rows),
                 fixable=labels, drop=drop)

    def _lengths(self) -> None:
        limit, name = token_limit(self.model)
        over = np.flatnonzero(self.scan.tokens > (limit or np.inf))
        if len(over):
            self.add("over_token_limit", f"{len(over)} examples have more than {limit:,} tokens, the limit of {name}; "
                     f"the longest {int(self.scan.tokens.max()):,}.", len(over), self.at(over), fixable=True,
                     drop=self.scan.index[over])
        self._spots("long_examples", "{} examples have more than 10,000 characters.")

    def _spots(self, code: str, message: str, **more: Any) -> None:
        if spots := self.scan.spots.get(code):
            self.add(code, message.format(spots.count), spots.count, spots.places, **more)

    def _pairs(self) -> None:
        """The old tool's checks of prompt/completion pairs."""
        scan = self.scan
        prompt, completion = scan.prompt, scan.completion
        if not prompt.count or len(scan.forms) > 1:
            return
        for name, common in (("prompt", prompt), ("completion", completion)):
            if 2 * common.upper > common.lower:
                self.add(f"{name}_case", f"{common.upper:,} of {common.upper + common.lower:,} letters of the "
                         f"{name}s are upper case.", prompt.count, fixable=True)
        if self.train:
            self._like_training(self.train)
            return
        if scan.task != "open-ended":
            self._separator()
            if len(prompt.prefix) > 12 and not prompt.same:
                self.add("prompt_prefix", f"All prompts begin with {prompt.prefix[:60]!r}.", prompt.count,
                         fixable=True, values=prompt.prefix)
        if completion.same:
            self.add("equal_completions", f"All completions are {completion.first[:40]!r}.", completion.count)
        else:
            self._completions()
        self._spots("completion_space", "{} completions do not begin with a space.", fixable=True)

    def _like_training(self, train: Scan) -> None:
        """A validation file needs the separator, the ending and the space of the training file."""
        for code, ours, theirs in (("prompt_separator", train.prompt, self.scan.prompt),
                                   ("completion_suffix", train.completion, self.scan.completion)):
            if not ours.same and not theirs.suffix.endswith(ours.suffix):
                self.add(code, f"Unlike in training, not all end with {ours.suffix[-60:]!r}.", theirs.count,
                         fixable=True, values=ours.suffix, advice=f"Add {ours.suffix[-60:]!r}.")
        self._spots("completion_space", "{} completions do not begin with a space.", fixable=True)

    def _separator(self) -> None:
        prompt = self.scan.prompt
        if prompt.same:
            self.add("equal_prompts", f"All prompts are {prompt.first[:40]!r}.", prompt.count)
        elif not prompt.suffix:
            chosen = next((sign for sign in SEPARATORS if sign in self.scan.free["separators"]), "\n\n### =>\n\n")
            self.add("prompt_separator", "The prompts do not end alike.", prompt.count, fixable=True, values=chosen,
                     advice=f"Add {chosen!r} to every prompt, also when the model is used.")
        else:
            if len(prompt.suffix) > 10:
                self.add("long_separator", f"All prompts end with {prompt.suffix[:60]!r}.", prompt.count)
            if self.scan.inside.count:
                self.add("separator_inside", f"{prompt.suffix!r:.60}, with which all prompts end, occurs inside "
                         f"{self.scan.inside.count} of them.", self.scan.inside.count, self.scan.inside.places)

    def _completions(self) -> None:
        completion = self.scan.completion
        prefix = whole_words(completion.prefix)
        if len(prefix) >= 5 and completion.shortest > len(prefix.strip()):
            self.add("completion_prefix", f"All completions begin with {prefix[:60]!r}.", completion.count,
                     fixable=True, values=prefix)
        if self.scan.task == "generation" and not completion.suffix:
            chosen = next((sign for sign in ENDINGS if sign in self.scan.free["endings"]), " [END]")
            self.add("completion_suffix", "The completions do not end alike.", completion.count, fixable=True,
                     values=chosen, advice=f"Add {chosen!r}, and ask with stop={chosen!r}.")

    def _labels(self) -> None:
        counts = self.scan.labels
        if counts is None or (self.scan.task != "classification" and not self.labels):
            return
        wrong = spellings(counts, self.labels)
        if wrong:
            said = ", ".join(f"{old!r} for {new!r}" for old, new in list(wrong.items())[:4])
            self.add("label_spelling", f"Labels are spelt in several ways: {said}.",
                     sum(counts[old] for old in wrong), fixable=True, values=wrong)
        known = set(self.labels or frequent(counts))
        off = {label: count for label, count in counts.items() if label not in known and label not in wrong}
        if off:
            said = ", ".join(f"{label[:30]!r} ({count})" for label, count in list(off.items())[:4])
            self.add("off_list", f"{len(off)} completions are not on the list of {len(known)} labels: {said}.",
                     sum(off.values()), fixable=True, values=frozenset(off))
        kept = [count for label, count in counts.items() if label in known]
        if len(kept) > 1 and max(kept) >= 5 * min(kept):
            self.add("imbalance", f"The most frequent label has {max(kept):,} examples, the rarest {min(kept):,}.")

    def _counted(self) -> None:
        self._spots("roles_order", "{} chats have their roles in an unusual order.")
        self._spots("outer_whitespace", "{} answers begin or end with whitespace.", fixable=True)
        self._spots("equal_answers", "{} preference pairs have equal answers.")
        for kind in ("secret_keys", "email_addresses", "card_numbers"):
            self._spots(kind, "{} " + kind.replace("_", " ") + " were found.", fixable=True)
        self._spots("extra_columns", "{} rows carry fields that training does not use.")
        self._spots("no_time", "{} rows have no date or number to split by.")
        if self.model is None or self.model.startswith("smollm2"):
            self._spots("hosted_only", "{} examples can be trained at hosted providers only (tools, preferences).")

    def _size(self) -> None:
        if not self.scan.rows:
            self.add("no_examples", "The file is empty.")
        elif self.scan.count < self.minimum:
            self.add("too_few", f"The file has {self.scan.count} example(s); the minimum is {self.minimum}.")
        elif self.scan.count > MAX_LINES and (self.model is None or self.model.startswith("smollm2")):
            self.add("too_many", f"The file has {self.scan.count:,} examples; the local service takes {MAX_LINES:,}.")
        elif self.scan.size > MAX_FILE:
            self.add("too_large", f"The examples take {self.scan.size / (1 << 20):,.1f} MB as JSONL; a file may have "
                                  f"{MAX_FILE >> 20}.")
        elif self.scan.count < 100 and self.minimum > 1:
            self.add("few_examples", f"The file has {self.scan.count} examples.")


def first_of(prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
    """For each example the place of the first equal one before it, or -1."""
    order = np.lexsort((np.arange(len(prompts)), completions, prompts))
    first = np.full(len(prompts), -1, dtype=np.int64)
    if len(order) > 1:
        same = (prompts[order][1:] == prompts[order][:-1]) & (completions[order][1:] == completions[order][:-1])
        first[order[1:][same]] = order[:-1][same]
    return first


def token_limit(model: str | None) -> tuple[int | None, str]:
    """The most tokens of one example, and the model's name; None where it is not known."""
    name = model or "smollm2-135m-instruct"
    base = name.split(":")[1] if name.startswith("ft:") else name
    return next((limit for prefix, limit in LIMITS.items() if base.startswith(prefix)), None), name


def whole_words(prefix: str) -> str:
    """The prefix without the beginning of a word: " base" of " baseball" and " baseline" is no prefix."""
    while prefix and prefix[-1].isalnum():
        prefix = prefix[:-1]
    return prefix


def frequent(counts: Counter[str]) -> list[str]:
    """The labels proper: those that occur at least 3 times and in 0.5 % of the examples, if they cover 95 %."""
    total = counts.total()
    often = [label for label, count in counts.items() if count >= max(3, 0.005 * total)]
    return often if sum(counts[label] for label in often) >= 0.95 * total else list(counts)


def spellings(counts: Counter[str], labels: list[str] | None) -> dict[str, str]:
    """Labels that differ from a listed or more frequent one by case, space, punctuation, or a rare slip.

    Slips are looked for within words only: "irrelevant" is no slip of "relevant", nor "unit 2" of "unit 1".
    """
    ranked = list(labels or []) + [label for label, _ in counts.most_common() if label not in (labels or [])]
    chosen: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for label in ranked:
        plain = "".join(sign for sign in label.casefold() if sign.isalnum()) or label
        if plain not in chosen:
            worth = len(plain) >= 5 and len(chosen) <= 100 and plain.isalpha()
            close = get_close_matches(plain, [one for one in chosen if one[:1] == plain[:1]], 1, 0.85) if worth else []
            listed = bool(close) and chosen[close[0]] in (labels or [])
            if not close or label in (labels or []) or not (listed or 20 * counts[label] <= counts[chosen[close[0]]]):
                chosen[plain] = label
                continue
            plain = close[0]
        if label != chosen[plain] and label not in (labels or []):
            wrong[label] = chosen[plain]
    return wrong

