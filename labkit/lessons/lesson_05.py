"""The checks of notebook 05, evaluate."""

import math
import random
from collections import Counter
from typing import Any

from scipy.stats import binomtest

from labkit.lessons.exercises import call, exercise, same

LABELS = ["baseball", "hockey"]


@exercise("05.1", "Precision", level=1, hints=(
    "Precision looks at the posts that were answered with the label, recall at those that have it.",
    "Keep the right labels of the posts whose answer is the label. How many of these are the label?",
    "given = [t for t, a in zip(truth, answers) if a == label]; given.count(label) / len(given), or 0 if it is empty.",
))
def precision(answer: Any) -> None:
    """A function of right labels, answers and a label: the label's precision."""
    for _ in range(6):
        truth = random.choices(LABELS, k=12)
        answers = random.choices([*LABELS, None], k=12)
        answers[0], truth[0] = "hockey", "hockey"
        same(call(answer, list(truth), list(answers), "hockey"), _precision(truth, answers),
             f"the labels {truth} and the answers {answers}")
    same(call(answer, ["hockey", "baseball"], ["baseball", None], "hockey"), 0, "a label that was never answered")


def _precision(truth: list[str], answers: list[Any]) -> float:
    given = [right for right, one in zip(truth, answers, strict=True) if one == "hockey"]
    return given.count("hockey") / len(given)


@exercise("05.2", "The paired test", level=2, hints=(
    "Posts on which both are right, or both wrong, do not count at all.",
    "Count the posts that only the first got right, and those that only the second did: heads and tails of a coin.",
    "binomtest(only_first, only_first + only_second).pvalue; without such posts 1.",
))
def paired(answer: Any) -> None:
    """A function of right labels and two models' answers: the p of McNemar's exact test."""
    for only_first, only_second in [(0, 0), (5, 1), (1, 5), *((random.randint(0, 9), random.randint(1, 9))
                                                              for _ in range(3))]:
        rows: list[Any] = [("hockey", "hockey", "baseball")] * only_first + [("hockey", None, "hockey")] * only_second
        rows += [("baseball", "baseball", "baseball")] * 7 + [("hockey", "baseball", None)] * 3
        random.shuffle(rows)
        both = only_first + only_second
        wanted = float(binomtest(only_first, both).pvalue) if both else 1
        same(call(answer, *map(list, zip(*rows, strict=True))), wanted,
             f"{only_first} posts only the first got right and {only_second} only the second")


@exercise("05.3", "The author lookup", level=2, hints=(
    "Two steps: from train make a table from author to most frequent label; then go through test.",
    "collections.Counter counts; most_common(1)[0][0] is the most frequent. Divide by all test posts.",
    "An author who is not in the table gets the most frequent label of all training posts: table.get(author, usual).",
))
def lookup(answer: Any) -> None:
    """A function of (author, label) lists: the accuracy of knowing nothing but the author."""
    for _ in range(15):  # so many that another share is not the same in all of them by luck
        train = [(name, random.choice(LABELS)) for name in "ABCDF"] * 2
        train += [("E", "hockey"), ("E", "baseball"), ("E", "hockey")]  # 13 in all, so that no label ties
        test = [(name, random.choice(LABELS)) for name in random.choices("ABCDEF", k=5)]
        test += [("X", "baseball"), ("Y", "hockey"), ("Z", "hockey")]
        random.shuffle(train)
        same(call(answer, list(train), list(test)), _looked_up(train, test), f"train {train} and test {test}")


def _looked_up(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> float:
    usual = Counter(label for _, label in train).most_common(1)[0][0]
    by_author: dict[str, Counter[str]] = {}
    for author, label in train:
        by_author.setdefault(author, Counter())[label] += 1
    right = [(by_author[author].most_common(1)[0][0] if author in by_author else usual) == label
             for author, label in test]
    return sum(right) / len(right)


@exercise("05.4", "Another temperature", level=2, hints=(
    "log(p) / T and log(1 - p) / T; then exp of both. Do they still add up to 1?",
    "exp(log(p) / T) is p to the power of 1 / T.",
    "a = p ** (1 / T); b = (1 - p) ** (1 / T); a / (a + b). A higher T moves it towards one half.",
))
def tempered(answer: Any) -> None:
    """A function of a probability and a temperature: the probability at that temperature."""
    for temperature in (0.5, 1, 2, random.uniform(0.3, 4)):
        p = round(random.uniform(0.05, 0.95), 3)
        wanted = 1 / (1 + math.exp((math.log(1 - p) - math.log(p)) / temperature))
        same(call(answer, p, temperature), wanted, f"p = {p} and T = {temperature:.3g}")


@exercise("05.5", "Choose a threshold", level=3, hints=(
    "The accuracy at a threshold is that of all posts at or above it, not of the one post that stands there.",
    "Try the confidences as thresholds from the lowest up, and return the first that reaches the wanted accuracy.",
    "Posts of equal confidence stand or fall together: use >=. After the loop, return 2.",
))
def threshold(answer: Any) -> None:
    """A function of confidences, rights and a wanted accuracy: the lowest threshold that reaches it."""
    cases = [([0.9, 0.9, 0.6, 0.7], [True, False, True, True], 0.9), ([0.5, 0.8, 0.9], [True, False, True], 1.0),
             ([0.6, 0.7, 0.8, 0.95], [True, True, False, True], 0.75)]
    for _ in range(6):
        sure = [round(random.uniform(0.5, 1), 1) for _ in range(12)]
        cases.append((sure, [random.random() < one for one in sure], random.choice([0.7, 0.8, 0.9, 1.0])))
    for sure, rights, wanted in cases:
        reached = [one for one in sorted(set(sure)) if _accuracy_from(one, sure, rights) >= wanted]
        same(call(answer, list(sure), list(rights), wanted), reached[0] if reached else 2,
             f"confidences {sure}, rights {rights} and {wanted}")


def _accuracy_from(lowest: float, sure: list[float], rights: list[bool]) -> float:
    kept = [right for one, right in zip(sure, rights, strict=True) if one >= lowest]
    return sum(kept) / len(kept)
