"""The checks of notebook 07, the lab."""

import random
from typing import Any

from labkit.lessons.exercises import Wrong, call, exercise, same

FAULTS = set("ACDFGIJKM")  # of the thirteen observations in the notebook


@exercise("07.1", "Accuracy, off-label answers included", level=1, hints=(
    "An off-label answer is None. What is it: right, wrong, or not there?",
    "It is wrong: someone asked and got no usable answer.",
    "Count the places where answer and label are equal, and divide by the number of labels, all of them.",
))
def accuracy(answer: Any) -> None:
    """A function of answers (a label or None) and labels: the share that is equal, None being wrong."""
    for _ in range(6):
        labels = random.choices(["baseball", "hockey"], k=random.randint(6, 15))
        given = [random.choice([label, label, "baseball", None]) for label in labels] + [None]
        labels = [*labels, "hockey"]
        right = sum(a == b for a, b in zip(given, labels, strict=True)) / len(labels)
        same(call(answer, given, labels), right, f"the answers {given} to {labels}")


@exercise("07.2", "Authors on both sides", level=2, hints=(
    "The question is about posts, not about authors: a busy author counts as often as he writes.",
    "Make a set of the training authors, then look each held-out post's author up in it.",
    "sum(author in known for author in held_out_authors) / len(held_out_authors)",
))
def shared(answer: Any) -> None:
    """A function of two lists of authors, one a post: the share of held-out posts whose author is in training."""
    for _ in range(6):
        names = random.sample(["ann", "bo", "cy", "di", "ed", "flo", "gus"], 7)
        train = random.choices(names[:5], k=12)
        held_out = random.choices(names[3:], k=6) + [train[0]] * random.randint(2, 4) + ["hal"]
        same(call(answer, train, held_out), sum(name in set(train) for name in held_out) / len(held_out),
             f"the training authors {sorted(set(train))} and the held-out authors {held_out}")


@exercise("07.3", "Find what is wrong", level=3, hints=(
    "For each line ask: would the code stop, or would a reader believe something that was not shown?",
    "Numbers typed by hand, prose that speaks of other output, and missing comparisons are faults, too.",
    "There are nine. The four sound lines are habits that this notebook has as well.",
))
def review(answer: Any) -> None:
    """The letters of all faulty lines, as a set, a list or a string."""
    try:
        letters = {str(letter).strip().upper() for letter in answer} - {"", ","}
    except TypeError:
        raise Wrong(f"A set of letters is wanted, such as {{'A', 'B'}}, not {answer!r:.60}.") from None
    if letters != FAULTS:
        raise Wrong(f"{len(letters & FAULTS)} of your letters are faults, {len(letters - FAULTS)} are none, "
                    f"{len(FAULTS - letters)} faults are missing.")
