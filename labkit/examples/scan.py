"""One pass over a file: everything the findings are drawn from, in about 140 bytes an example.

Texts are kept as 64-bit hashes and sketches only, so that a million examples fit into memory.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any

import numpy as np

from labkit import tokens
from labkit.examples import privacy, similar
from labkit.examples.rows import Chat, Completion, Preference, Problem, order_problem, recognise

BATCH = 2_000
PLACES = 5  # first places shown with a finding
MOST_LABELS = 1_000  # more different completions than this are no labels
LONGEST_COMMON = 2_000  # characters of a common prefix or suffix looked at
SEPARATORS = (" ->", "\n\n###\n\n", "\n\n===\n\n", "\n\n---\n\n", "\n\n===>\n\n", "\n\n--->\n\n")
ENDINGS = ("\n", ".", " END", "***", "+++", "&&&", "$$$", "@@@", "%%%")
KEYS = {"completion": {"prompt", "completion"},
        "chat": {"messages", "tools", "functions", "parallel_tool_calls"},
        "preference": {"input", "preferred_output", "non_preferred_output"}}
GROUPS = ("author", "user", "user_id", "customer", "patient", "speaker", "group", "session", "thread", "document")
Form = Completion | Chat | Preference
Row = tuple[int, int, Any, Any]  # place in the file from 0, line from 1, original row, row after the fixes


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

    def add(self, texts: list[str]) -> None:
        """Take in more texts."""
        if not texts:
            return
        if not self.count:
            self.prefix, self.suffix, self.first = texts[0][:LONGEST_COMMON], texts[0][-LONGEST_COMMON:], texts[0]
        self.count += len(texts)
        self.same = self.same and all(text == self.first for text in texts)
        self.shortest = min(self.shortest, min(len(text.strip()) for text in texts))
        for text in texts:
            while not text.startswith(self.prefix):
                self.prefix = self.prefix[:-1]
            while not text.endswith(self.suffix):
                self.suffix = self.suffix[1:]
        whole = "".join(texts)
        if whole.isascii():
            counts = np.bincount(np.frombuffer(whole.encode(), np.uint8), minlength=128)
            self.upper += int(counts[65:91].sum())
            self.lower += int(counts[97:123].sum())
        else:
            self.upper += sum(map(str.isupper, whole))
            self.lower += sum(map(str.islower, whole))


@dataclass
class Scan:
    """What one pass has found. Arrays have one entry an example, in the order of the file."""

    forms: Counter[str] = field(default_factory=Counter)
    index: Any = field(default_factory=lambda: array("Q"))
    lines: Any = field(default_factory=lambda: array("Q"))
    prompts: Any = field(default_factory=lambda: array("q"))
    completions: Any = field(default_factory=lambda: array("q"))
    tokens: Any = field(default_factory=lambda: array("L"))
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


def scan(rows: Iterable[Row], model: str | None = None, time_column: str | None = None,
         group_column: str | None = None, boilerplate: np.ndarray | None = None) -> Scan:
    """Read all rows once. `model` is whose tokens are counted (None: the local base model).

    `boilerplate` is that of another scan whose sketches are to be compared with these; without
    it, the first examples tell what many share.
    """
    found, count = Scan(boilerplate=boilerplate), TokenCounter(model)
    stream = iter(rows)
    while batch := list(islice(stream, BATCH)):
        _scan_batch(found, batch, count, time_column, group_column)
    for name, kind in (("index", np.uint64), ("lines", np.uint64), ("prompts", np.int64), ("completions", np.int64),
                       ("times", np.float64)):
        setattr(found, name, np.frombuffer(getattr(found, name), dtype=kind))
    found.tokens = np.array(found.tokens, dtype=np.uint32)
    found.sketches = np.frombuffer(found.sketches, dtype=np.uint16).reshape(-1, similar.PLACES)
    found.columns = {name: np.frombuffer(values, dtype=np.int64) for name, values in found.columns.items()}
    return found


def _scan_batch(found: Scan, batch: list[Row], count: "TokenCounter", time_column: str | None,
                group_column: str | None) -> None:
    kept: list[tuple[int, int, Any, Form]] = []
    for index, line, original, row in batch:
        found.rows += 1
        example = row if isinstance(row, Problem) else recognise(row, line)
        if isinstance(example, Problem):
            kind = "column_case" if isinstance(row, dict) and renamed(row) != row else example.kind
            found.problems.setdefault(kind, Spots()).add(line, example.field, example)
        else:
            kept.append((index, line, original, example))
            if row.keys() - KEYS[_form(example)]:
                found.spot("extra_columns", line, ", ".join(sorted(map(str, row.keys() - KEYS[_form(example)])))[:80])
    if not kept:
        return
    examples = [entry[3] for entry in kept]
    lines = [entry[1] for entry in kept]
    views = [view(example) for example in examples]
    found.index.extend(entry[0] for entry in kept)
    found.lines.extend(lines)
    found.forms.update(map(_form, examples))
    found.prompts.extend(hash(prompt) for prompt, _, _ in views)
    found.completions.extend(hash(completion) for _, completion, _ in views)
    found.tokens.extend(count(examples))
    texts = [text for _, _, text in views]
    if found.boilerplate is None:
        found.boilerplate = similar.boilerplate(texts)
    found.sketches += similar.sketches(texts, found.boilerplate).tobytes()
    _columns(found, kept, time_column, group_column)
    _privacy(found, views, lines)
    _labels(found, [completion for _, completion, _ in views])
    for example, line in zip(examples, lines, strict=True):
        _one(found, example, line)
    pairs = [example for example in examples if isinstance(example, Completion)]
    _shared(found, [pair.prompt for pair in pairs], [pair.completion for pair in pairs], lines)


def view(example: Form) -> tuple[str, str, str]:
    """An example as prompt, completion, and the text that is compared for likeness (without instructions)."""
    if isinstance(example, Completion):
        return example.prompt, example.completion, f"{example.prompt}\n{example.completion}"
    if isinstance(example, Chat):
        messages, last = example.messages, max(i for i, trained in enumerate(example.trained) if trained)
        before, answer = messages[:last], messages[last]["content"]
    else:
        before, answer = example.messages, f"{example.preferred}\n{example.other}"
    prompt = "\n".join([f"{message['role']}: {message['content']}" for message in before])
    text = "\n".join([message["content"] for message in before if message["role"] not in ("system", "developer")])
    return prompt, answer, f"{text}\n{answer}"


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `Prompt`, `COMPLETION` … in lower case, where that does not hide another field."""
    known = {"prompt", "completion", "messages"}
    plain = {name: str(name).strip().lower() for name in row}
    return {plain[name] if plain[name] in known and plain[name] not in row else name: value
            for name, value in row.items()}


def _form(example: Form) -> str:
    return {Completion: "completion", Chat: "chat"}.get(type(example), "preference")


def _one(found: Scan, example: Form, line: int) -> None:
    """What concerns one example alone."""
    if isinstance(example, Completion):
        if len(example.prompt) + len(example.completion) > 10_000:
            found.spot("long_examples", line, "prompt")
        if not example.completion.startswith(" "):
            found.spot("completion_space", line, "completion")
        return
    if example.tools:
        found.spot("hosted_only", line, "tools")
    if isinstance(example, Preference):
        found.spot("hosted_only", line, "preferred_output")
        if example.preferred == example.other:
            found.spot("equal_answers", line, "non_preferred_output")
    elif any(trained and message["content"] != message["content"].strip()
             for message, trained in zip(example.messages, example.trained, strict=True)):
        found.spot("outer_whitespace", line, "messages")
    if odd := order_problem(example.messages):
        found.spot("roles_order", line, f"{odd[0]}: {odd[1]}")


def _shared(found: Scan, prompts: list[str], completions: list[str], lines: list[int]) -> None:
    """What prompt/completion pairs have in common."""
    found.prompt.add(prompts)
    found.completion.add(completions)
    for name, texts in (("separators", prompts), ("endings", completions)):
        if texts and found.free[name]:
            whole = "\x00".join(texts)
            found.free[name] = {sign for sign in found.free[name] if sign not in whole}
            if name == "separators" and "\n" in whole:
                found.free[name].discard(" ->")
    suffix = found.prompt.suffix
    if suffix.strip():
        for prompt, line in zip(prompts, lines, strict=False):
            if prompt.find(suffix) < len(prompt) - len(suffix):
                found.inside.add(line, "prompt")


def _labels(found: Scan, completions: list[str]) -> None:
    if found.labels is not None:
        found.labels.update(completion.strip() for completion in completions)
        if len(found.labels) > MOST_LABELS:
            found.labels = None


def _privacy(found: Scan, views: list[tuple[str, str, str]], lines: list[int]) -> None:
    for kind, places in privacy.find([f"{prompt}\n{completion}" for prompt, completion, _ in views]).items():
        for place in places:
            found.spot(kind, lines[place])


def _columns(found: Scan, kept: list[tuple[int, int, Any, Form]], time_column: str | None,
             group_column: str | None) -> None:
    """Hashes of the columns that name a group, and the times of the column to split by."""
    before = len(found.lines) - len(kept)
    wanted = {*GROUPS, group_column} - {None, time_column}
    for name in {name for _, _, row, _ in kept for name in row if isinstance(name, str)
                 and (name.lower() in wanted or name in wanted)}:
        values = found.columns.setdefault(name, array("q", bytes(8 * before)))
        values.extend([0] * (before - len(values)))
        values.extend(hash(str(row[name])) if row.get(name) not in (None, "") else 0 for _, _, row, _ in kept)
    for values in found.columns.values():
        values.extend([0] * (before + len(kept) - len(values)))
    if time_column:
        for _, line, row, _ in kept:
            moment = _moment(row.get(time_column))
            if moment is None:
                found.spot("no_time", line, time_column)
            found.times.append(moment if moment is not None else -np.inf)


def _moment(value: Any) -> float | None:
    """Seconds since 1970 of a number, an ISO date or an e-mail's date; None for anything else."""
    if isinstance(value, int | float):
        return float(value)
    readers: tuple[Callable[[str], float], ...] = (
        float,
        lambda text: _utc(datetime.fromisoformat(text.replace("Z", "+00:00"))),
        lambda text: _utc(parsedate_to_datetime(text)),
    )
    for reader in readers:
        try:
            return reader(str(value))
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None


def _utc(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


class TokenCounter:
    """Token counts of whole examples, many at once.

    A chat costs its texts and what the format adds. For the local model the addition depends on
    the roles only, as each text stands between line ends and special tokens; it is measured once
    for each order of roles. A text that begins with whitespace, which may join the line end before
    it, is counted by rendering the whole chat.
    """

    def __init__(self, model: str | None) -> None:
        self.model, self.local = model, tokens.encoding_of(model) == tokens.LOCAL
        self._added: dict[tuple[str, ...], int] = {}

    def __call__(self, examples: list[Form]) -> Iterator[int]:
        """The tokens of each example: prompt and completion, a chat whole, a pair with its longer answer."""
        texts: list[str] = []
        sizes: list[tuple[int, int]] = []  # how many of the texts belong to an example, and what is added
        for example in examples:
            mine, added = self._texts(example)
            texts += mine
            sizes.append((len(mine), added))
        counts = iter(tokens.count_many(texts, self.model))
        for size, added in sizes:
            yield sum(islice(counts, size)) + added

    def _texts(self, example: Form) -> tuple[list[str], int]:
        if isinstance(example, Completion):
            return [example.prompt, example.completion], 1 if self.local else 0
        messages = example.messages
        if isinstance(example, Preference):
            answer = max(example.preferred, example.other, key=len)
            messages = (*messages, {"role": "assistant", "content": answer})
        contents = [message["content"] for message in messages]
        roles = tuple(message["role"] for message in messages)
        if not self.local:
            return [*contents, *roles], tokens.PER_MESSAGE * len(messages)
        if any(content[:1].isspace() or not content for content in contents):
            return [tokens.render(messages, header=False)], 0
        if roles not in self._added:
            bare = tuple({"role": role, "content": "x"} for role in roles)
            self._added[roles] = tokens.count(tokens.render(bare, header=False)) - len(roles) * tokens.count("x")
        return contents, self._added[roles]
