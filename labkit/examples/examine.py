"""What a batch of rows shows, apart from the rest of the file: batches may be examined in several processes."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from labkit import tokens
from labkit.examples import fixes as mend
from labkit.examples import privacy, similar
from labkit.examples.evidence import ENDINGS, MOST_LABELS, SEPARATORS, Common, Scan, Spots
from labkit.examples.formats import decoded, dump
from labkit.examples.rows import (
    KEYS,
    Chat,
    Completion,
    Preference,
    Problem,
    order_problem,
    recognise,
    renamed,
    too_long,
)

GROUPS = ("author", "user", "user_id", "customer", "patient", "speaker", "group", "session", "thread", "document")
Form = Completion | Chat | Preference
Item = tuple[int, int, Any]  # place in the file from 0, line from 1, the row or, not yet decoded, its bytes


@dataclass(frozen=True)
class Question:
    """What is asked of every batch. `model` is whose tokens are counted (None: the local base model).

    `boilerplate` and `suffix` come from the beginning of the file: pairs of words that many
    examples share, and what all prompts end with.
    """

    fixes: tuple[mend.Fix, ...] = ()
    model: str | None = None
    time_column: str | None = None
    group_column: str | None = None
    boilerplate: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    suffix: str = ""


def examine(batch: list[Item], asked: Question) -> Scan:
    """All that is to be known of some rows, after the fixes."""
    found = Scan()
    kept = _recognised(found, batch, asked)
    if not kept:
        return found
    examples = [entry[3] for entry in kept]
    lines = [entry[1] for entry in kept]
    views = [view(example) for example in examples]
    found.index.extend(entry[0] for entry in kept)
    found.lines.extend(lines)
    found.forms.update(map(_form, examples))
    found.prompts.extend(digest(prompt) for prompt, _, _ in views)
    found.completions.extend(digest(completion) for _, completion, _ in views)
    found.tokens.extend(_counter(asked.model)(examples))
    texts = [text for _, _, text in views]
    found.sketches += similar.sketches(texts, asked.boilerplate).tobytes()
    _columns(found, kept, asked.time_column, asked.group_column)
    _privacy(found, views, lines)
    _labels(found, [completion for _, completion, _ in views])
    for example, line in zip(examples, lines, strict=True):
        _one(found, example, line)
    pairs = [example for example in examples if isinstance(example, Completion)]
    _shared(found, pairs, lines, asked.suffix)
    return found


def compared(first: list[Item], asked: Question, boilerplate: np.ndarray | None = None) -> Question:
    """The question with what the first rows tell about the file; `boilerplate` is kept if it is given."""
    examples = [example for *_, example in _recognised(Scan(), first, asked)]
    prompts = [example.prompt for example in examples if isinstance(example, Completion)]
    if boilerplate is None:
        texts = [view(example)[2] for example in examples]
        boilerplate = similar.boilerplate(texts) if texts else np.zeros(0, np.uint64)
    return replace(asked, boilerplate=boilerplate, suffix=Common.of(prompts).suffix if prompts else "")


def _recognised(found: Scan, batch: list[Item], asked: Question) -> list[tuple[int, int, Any, Form]]:
    """The examples among the rows; what is wrong with the others is noted."""
    kept: list[tuple[int, int, Any, Form]] = []
    repair = mend.repairs(asked.fixes)
    for index, line, content in batch:
        row = mend.mended(asked.fixes, index, decoded(line, content, repair)[0])[0]
        if row is None:
            continue
        found.rows += 1
        example = row if isinstance(row, Problem) else recognise(row, line)
        if not isinstance(example, Problem) and mend.too_large(row, content):
            example = too_long(line)
        if isinstance(example, Problem):
            kind = "column_case" if isinstance(row, dict) and renamed(row) != row else example.kind
            found.problems.setdefault(kind, Spots()).add(line, example.field, example)
        else:
            kept.append((index, line, row, example))
            found.size += len(dump({key: value for key, value in row.items() if key in KEYS[_form(example)]}))
            if row.keys() - KEYS[_form(example)]:
                found.spot("extra_columns", line, ", ".join(sorted(map(str, row.keys() - KEYS[_form(example)])))[:80])
    return kept


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


def _shared(found: Scan, pairs: list[Completion], lines: list[int], suffix: str) -> None:
    """What prompt/completion pairs have in common."""
    if not pairs:
        return
    prompts, completions = [pair.prompt for pair in pairs], [pair.completion for pair in pairs]
    found.prompt, found.completion = Common.of(prompts), Common.of(completions)
    for name, signs, texts in (("separators", SEPARATORS, prompts), ("endings", ENDINGS, completions)):
        whole = "\x00".join(texts)
        found.free[name] = {sign for sign in signs if sign not in whole}
        if name == "separators" and "\n" in whole:
            found.free[name].discard(" ->")
    if suffix.strip():
        for prompt, line in zip(prompts, lines, strict=False):
            if prompt.find(suffix) < len(prompt) - len(suffix):
                found.inside.add(line, "prompt")


def digest(text: str) -> int:
    """A 64-bit hash that is the same in every process, as Python's own is not."""
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little", signed=True)


def _labels(found: Scan, completions: list[str]) -> None:
    labels = Counter(completion.strip() for completion in completions)
    found.labels = labels if len(labels) <= MOST_LABELS else None


def _privacy(found: Scan, views: list[tuple[str, str, str]], lines: list[int]) -> None:
    for kind, places in privacy.find([f"{prompt}\n{completion}" for prompt, completion, _ in views]).items():
        for place in places:
            found.spot(kind, lines[place])


def _columns(found: Scan, kept: list[tuple[int, int, Any, Form]], time_column: str | None,
             group_column: str | None) -> None:
    """Hashes of the columns that name a group, and the times of the column to split by."""
    wanted = {*GROUPS, group_column} - {None, time_column}
    for name in {name for _, _, row, _ in kept for name in row if isinstance(name, str)
                 and (name.lower() in wanted or name in wanted)}:
        found.columns[name] = array("q", [digest(str(row[name])) if row.get(name) not in (None, "") else 0
                                          for _, _, row, _ in kept])
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


@lru_cache(maxsize=4)
def _counter(model: str | None) -> "TokenCounter":
    return TokenCounter(model)


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
