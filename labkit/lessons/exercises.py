"""Exercises that answer back: `labkit.check` tries an answer on fresh cases and says what it found.

An exercise is a function that takes the learner's answer and raises `Wrong` where it fails; it
computes what is right anew, on cases of its own, so that the text of an answer never matters.
Answers are values or functions. What a learner has done is kept in `LABKIT_HOME/progress.json`
and sent nowhere.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from labkit import paths
from labkit.errors import LabkitError

LESSONS = paths.COURSE / "labkit" / "lessons"


class Wrong(Exception):
    """What is wrong with an answer, in words that the learner sees."""


class NotAttempted(Exception):
    """The answer is still the empty one that the notebook came with."""


@dataclass(frozen=True)
class Exercise:
    """One exercise: `verify` raises `Wrong`; `hints` lead on, one more with each wrong try; `level` is 1 to 3."""

    number: str
    title: str
    level: int
    hints: tuple[str, ...]
    verify: Callable[[Any], None]


@dataclass(frozen=True)
class Result:
    """What a check found: shown as its message, true when the answer is right."""

    state: str  # "right", "wrong" or "not attempted"
    message: str

    def __bool__(self) -> bool:
        return self.state == "right"

    def __repr__(self) -> str:
        return self.message


_known: dict[str, Exercise] = {}


def exercise(number: str, title: str, level: int, hints: tuple[str, ...]) -> Callable[..., Callable[[Any], None]]:
    """Register the decorated function as the check of exercise `number`, such as "01.2"."""
    def register(verify: Callable[[Any], None]) -> Callable[[Any], None]:
        _known[number] = Exercise(number, title, level, hints, verify)
        return verify
    return register


def call(answer: Any, *arguments: Any) -> Any:
    """What the learner's function returns for `arguments`.

    Raises `NotAttempted` when it returns None, as an empty one does, and `Wrong` when it is no
    function or stops with an error.
    """
    if not callable(answer):
        raise Wrong(f"A function is wanted, not {answer!r:.60}.")
    shown = ", ".join(f"{argument!r:.70}" for argument in arguments)
    try:
        returned = answer(*arguments)
    except Exception as error:
        raise Wrong(f"With ({shown}) it stopped with {type(error).__name__}: {error}") from error
    if returned is None:
        raise NotAttempted
    return returned


def same(found: Any, right: Any, case: str, tolerance: float = 1e-6) -> None:
    """Raise `Wrong` unless `found` is `right`; numbers may differ by `tolerance`, relative or absolute."""
    if isinstance(right, int | float) and not isinstance(right, bool):
        try:
            agree = not isinstance(found, bool | str) and math.isclose(
                float(found), right, rel_tol=tolerance, abs_tol=tolerance)
        except (TypeError, ValueError):
            agree = False
    else:
        agree = type(found) is type(right) and found == right
    if not agree:
        raise Wrong(f"For {case} the answer is {right!r:.80}, and yours is {found!r:.80}.")


def exercises(lesson: str = "") -> list[Exercise]:
    """All exercises in order, or those of one lesson, such as "01"."""
    for file in sorted(LESSONS.glob("lesson_*.py")):
        import_module(f"labkit.lessons.{file.stem}")
    return [_known[number] for number in sorted(_known) if number.startswith(lesson)]


def check(number: str, answer: Any) -> Result:
    """Try `answer` to exercise `number` (such as "01.2") on fresh cases, and note the outcome.

    The result shows "not attempted", "right", or "wrong" with what failed and a hint; each wrong
    try brings one hint more. Raises `LabkitError` when there is no such exercise.
    """
    found = next((e for e in exercises() if e.number == number), None)
    if not found:
        there = ", ".join(e.number for e in exercises()) or "none"
        raise LabkitError(f"There is no exercise {number!r}; there are {there}.")
    try:
        if answer is None:
            raise NotAttempted
        found.verify(answer)
    except NotAttempted:
        return Result("not attempted", f"{number} not attempted yet: fill in the cell above (a function must return "
                                       "something), run it, then run this one again.")
    except Wrong as wrong:
        tries = _note(number, right=False)
        depth = min(tries, len(found.hints))
        hint = f"\nHint {depth} of {len(found.hints)}: {found.hints[depth - 1]}" if depth else ""
        return Result("wrong", f"{number} not right yet. {wrong}{hint}")
    _note(number, right=True)
    return Result("right", f"{number} right: {found.title}.")


def progress() -> str:
    """What has been done, as text: one line an exercise."""
    noted, lines, lesson = _noted(), [], ""
    for item in exercises():
        if item.number[:2] != lesson:
            lesson = item.number[:2]
            lines += ["", f"Notebook {lesson}"]
        note = noted.get(item.number, {})
        state = f"right {note['right']}" if note.get("right") else f"not yet, tries: {note['tries']}" if note else "–"
        lines.append(f"  {item.number}  level {item.level}  {item.title:<50} {state}")
    done = sum(bool(noted.get(item.number, {}).get("right")) for item in exercises())
    return "\n".join([*lines[1:], "", f"{done} of {len(exercises())} exercises right. "
                                      f"Kept on this machine only: {_file()}"])


def _file() -> Path:
    return paths.home() / "progress.json"


def _noted() -> dict[str, dict[str, Any]]:
    """What is noted of each exercise: `tries` so far, and `right`, the day of the first right answer."""
    try:
        return json.loads(_file().read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LabkitError(f"{_file()} cannot be read ({error}); delete it to start the record afresh.") from error


def _note(number: str, right: bool) -> int:
    """Record one try; how many there were."""
    noted = _noted()
    note = noted.setdefault(number, {"tries": 0})
    note["tries"] += 1
    if right:
        note.setdefault("right", time.strftime("%Y-%m-%d"))
    paths.write_text(_file(), json.dumps(noted, indent=1, sort_keys=True))
    return note["tries"]
