"""Fixes: each a function from a row to a mended row, or to None when the row is set aside.

They are named by the findings that they answer, applied in the order in which they were accepted,
and never change the file they read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.examples import privacy
from labkit.examples.catalogue import REPAIRS, SET_ASIDE
from labkit.examples.findings import Finding
from labkit.examples.formats import decoded, dump, lines
from labkit.examples.rows import KEYS, MAX_LINE, Chat, Completion, Problem, recognise, renamed

Change = Callable[[int, Any], Any]
Row = tuple[int, int, Any, Any]  # place in the file from 0, line from 1, original row, row after the fixes
SEPARATOR = "\n\n###\n\n"  # ends the prompts that a conversion makes


@dataclass(frozen=True)
class Fix:
    """One accepted fix. `change` takes a row's place in the file and its content.

    `drop` are the places of the rows that it sets aside, if it is one that does nothing else.
    """

    code: str
    change: Change
    drop: Any = None


@dataclass(frozen=True)
class Gone:
    """A row that a fix has set aside."""

    index: int
    line: int
    code: str
    text: str


def stream(path: Path, fixes: list[Fix], only: Callable[[int, int], bool] | None = None) -> Iterator[Row | Gone]:
    """The rows of a file after the fixes, and those that are set aside. The original row goes with each.

    `only` tells by place and line which rows are wanted.
    """
    repair = repairs(fixes)
    for index, (line, content) in enumerate(lines(path, repair)):
        if only and not only(index, line):
            continue
        original, raw = decoded(line, content, repair)
        row, code = mended(fixes, index, original)
        if row is None:
            text = raw if isinstance(original, Problem) else dump(original).decode("utf-8", "replace").rstrip()
            yield Gone(index, line, code, text)
        else:
            yield index, line, original, row


def repairs(fixes: Iterable[Fix]) -> frozenset[str]:
    """What is to be mended while reading."""
    return frozenset(fix.code for fix in fixes if fix.code in REPAIRS)


def mended(fixes: Iterable[Fix], index: int, row: Any) -> tuple[Any, str]:
    """A row after the fixes; None, and the code of the fix that sets it aside."""
    for fix in fixes:
        row = fix.change(index, row)
        if row is None:
            return None, fix.code
    return row, ""


def too_large(row: Any, content: Any = None) -> bool:
    """Whether a row would be written as more than `MAX_LINE` bytes, as after a fix that makes it longer.

    `content` is what it was read from. Bytes far below the limit spare the measuring: neither the fixes
    nor another way of writing numbers and letters makes them sixteen times as long.
    """
    if isinstance(content, bytes) and len(content) < MAX_LINE // 16:
        return False
    return len(dump(row)) > MAX_LINE


def make(finding: Finding) -> Fix:
    """The fix that answers a finding."""
    return Fix(finding.code, _change(finding), finding.drop)


def _change(finding: Finding) -> Change:
    code, values = finding.code, finding.values
    if code in REPAIRS:
        return _repair(code)
    if code == "too_long":
        return lambda index, row: None if _kind(row) == code or too_large(row) else row
    if code in SET_ASIDE:
        return lambda index, row: None if _kind(row) == code else row
    if finding.drop is not None:
        dropped = frozenset(finding.drop.tolist())
        return lambda index, row: None if index in dropped else row
    changes: dict[str, Change] = {
        "column_case": lambda index, row: renamed(row) if isinstance(row, dict) else row,
        "mixed_forms": lambda index, row: to_chat(row),
        "prompt_case": _on("prompt", str.lower),
        "completion_case": _on("completion", str.lower),
        "prompt_separator": _on("prompt", lambda text: text if text.endswith(values) else text + values),
        "prompt_prefix": _on("prompt", lambda text: text.removeprefix(values)),
        "completion_prefix": _on("completion", lambda text: _without(text, values)),
        "completion_suffix": _on("completion", lambda text: text if text.endswith(values) else text + values),
        "completion_space": _on("completion", lambda text: text if text.startswith(" ") else f" {text}"),
        "outer_whitespace": _on("answer", str.strip),
        "label_spelling": _on("answer", lambda text: _respelt(text, values)),
        "off_list": lambda index, row: None if answer(row).strip() in values else row,
    }
    if code in privacy.KINDS:
        return _on("all", lambda text: privacy.mask(text, code))
    return changes[code]


def _repair(code: str) -> Change:
    """What reading has mended already; a null character may also stand in the text as \\u0000."""
    def clean(text: str) -> str:
        return text.replace("\x00", "").encode("utf-8", "replace").decode()

    return _on("all", clean)


def _kind(row: Any) -> str:
    if isinstance(row, Problem):
        return row.kind
    found = recognise(row)
    return found.kind if isinstance(found, Problem) else ""


def _without(text: str, prefix: str) -> str:
    rest = text.removeprefix(prefix)
    return f" {rest}" if prefix.startswith(" ") and not rest.startswith(" ") else rest


def _respelt(text: str, wrong: dict[str, str]) -> str:
    label = text.strip()
    return text.replace(label, wrong[label]) if label in wrong else text


def _on(which: str, function: Callable[[str], str]) -> Change:
    """A change of texts: the "prompt" or "completion" of a pair, the "answer" of any form, or "all" texts."""
    def change(index: int, row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        if which in row:
            return {**row, which: function(row[which])} if isinstance(row[which], str) else row
        if which == "answer" and isinstance(row.get("completion"), str):
            return {**row, "completion": function(row["completion"])}
        if which in ("answer", "all"):
            wanted = None if which == "all" else "assistant"
            return {name: _texts(value, wanted, function) if name in FIELDS else value for name, value in row.items()}
        return row

    return change


FIELDS = set().union(*KEYS.values()) - {"tools", "functions", "parallel_tool_calls"}


def _texts(value: Any, role: str | None, function: Callable[[str], str]) -> Any:
    """Every message's content in a part of a row, of one role or of all; a bare text when all are wanted."""
    if isinstance(value, str):
        return function(value) if role is None else value
    if isinstance(value, dict):
        if "messages" in value:
            return {**value, "messages": _texts(value["messages"], role, function)}
        if isinstance(value.get("content"), str) and (
                role is None or (value.get("role") == role and value.get("weight", 1) == 1)):
            return {**value, "content": function(value["content"])}
        return value
    return [_texts(part, role, function) for part in value] if isinstance(value, list) else value


def answer(row: Any) -> str:
    """The completion of a row, or its last learned answer; empty for a row that is no example."""
    found = recognise(row)
    if isinstance(found, Completion):
        return found.completion
    if isinstance(found, Chat):
        return [turn["content"] for turn, trained in zip(found.messages, found.trained, strict=True) if trained][-1]
    return ""


# --- conversion ------------------------------------------------------------------------------------


def conversion(to: str, prompt_end: str = "", completion_end: str = "") -> Fix:
    """Converts every row to "chat" or "completion"; `prompt_end` and `completion_end` are no part of a chat."""
    if to == "chat":
        return Fix("to_chat", lambda index, row: to_chat(row, prompt_end, completion_end))
    return Fix("to_completion", lambda index, row: to_completion(row))


def is_sign(text: str) -> bool:
    """Whether what all texts end with is a separator rather than their common words."""
    return len(text) >= 2 and not any(sign.isalnum() for sign in text) or text in (" END", " [END]")


def to_chat(row: Any, prompt_end: str = "", completion_end: str = "") -> Any:
    """A pair as a chat of one question; what is no pair stays as it is."""
    found = recognise(row)
    if not isinstance(found, Completion):
        return row
    said = found.completion.removesuffix(completion_end).strip() or found.completion
    asked = found.prompt.removesuffix(prompt_end)
    others = {name: value for name, value in row.items() if name not in KEYS["completion"]}
    question = [{"role": "user", "content": asked}] if asked else []
    return {"messages": [*question, {"role": "assistant", "content": said}], **others}


def to_completion(row: Any) -> Any:
    """A chat without tools as a pair whose completion is the last learned answer; what is no such chat stays.

    A single question keeps its text, after the instruction if there is one; with more turns each
    message begins with who speaks.
    """
    found = recognise(row)
    if not isinstance(found, Chat) or found.tools:
        return row
    last = max(index for index, trained in enumerate(found.trained) if trained)
    before = found.messages[:last]
    turns = [message for message in before if message["role"] not in ("system", "developer")]
    texts = [message["content"] if len(turns) < 2 else f"{message['role'].capitalize()}: {message['content']}"
             for message in before]
    others = {name: value for name, value in row.items() if name not in KEYS["chat"]}
    prompt = "\n\n".join(texts) + SEPARATOR if texts else ""
    return {"prompt": prompt, "completion": f" {found.messages[last]['content'].strip()}", **others}
