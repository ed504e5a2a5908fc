"""The quiz at the end of a notebook: its questions are `notebooks/quiz/NN.json`, shown by jupyterquiz."""

import json

from labkit import paths
from labkit.errors import LabkitError

QUIZZES = paths.COURSE / "notebooks" / "quiz"


def quiz(lesson: str) -> None:
    """Show the quiz of a lesson, such as "01", below the cell; it works without network and keeps nothing.

    Raises `LabkitError` when the lesson has none.
    """
    from jupyterquiz import display_quiz

    file = QUIZZES / f"{lesson}.json"
    if not file.exists():
        there = ", ".join(sorted(path.stem for path in QUIZZES.glob("*.json")))
        raise LabkitError(f"There is no quiz {lesson!r}; there are {there}.")
    display_quiz(json.loads(file.read_text("utf-8")))
