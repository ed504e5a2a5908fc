"""The checks of notebook 06, iterate."""

import math
import random
import statistics
from typing import Any

from scipy import stats

from labkit.lessons.exercises import call, exercise, same

LABELS = ["baseball", "hockey"]


@exercise("06.1", "How many jobs", level=1, hints=(
    "Two values of one setting and three of another make six combinations, not five.",
    "Multiply the numbers of values of all settings. What do the seeds do?",
    "math.prod(len(values) for values in settings.values()) * seeds.",
))
def jobs(answer: Any) -> None:
    """A function of settings with their values and a number of seeds: the jobs of the full grid."""
    for count in (1, 2, 3, 4):
        settings = {name: list(range(1, random.randint(2, 4) + 1))
                    for name in ["n_epochs", "rank", "batch_size", "learning_rate_multiplier"][:count]}
        seeds = random.randint(2, 5)
        same(call(answer, dict(settings), seeds), math.prod(map(len, settings.values())) * seeds,
             f"{settings} and {seeds} seeds")


@exercise("06.2", "Stop early", level=2, hints=(
    "Go through the epochs, and remember the best one so far.",
    "A loss that is only level with the best is no improvement; the best stays where it was.",
    "After each epoch: if epoch - best >= patience, return (epoch, best). After the loop: (len(losses), best).",
))
def stop(answer: Any) -> None:
    """A function of validation losses and a patience: the epochs run, and the best of them."""
    cases = [([0.5, 0.3, 0.4, 0.2, 0.1], 1), ([0.5, 0.3, 0.4, 0.2, 0.1], 2), ([0.5, 0.4, 0.3], 1),
             ([0.3, 0.3, 0.2], 1), ([0.4, 0.3, 0.35, 0.34, 0.32, 0.1], 2)]
    cases += [([round(random.uniform(0.1, 0.9), 2) for _ in range(8)], random.randint(1, 3)) for _ in range(5)]
    for losses, patience in cases:
        same(call(answer, list(losses), patience), _stopped(losses, patience), f"{losses} with patience {patience}")


def _stopped(losses: list[float], patience: int) -> tuple[int, int]:
    best = 1
    for epoch in range(1, len(losses) + 1):
        if losses[epoch - 1] < losses[best - 1]:
            best = epoch
        if epoch - best >= patience:
            return epoch, best
    return len(losses), best


@exercise("06.3", "An interval over seeds", level=2, hints=(
    "Three factors: t, the standard deviation, and one over the square root of n.",
    "numpy's std divides by n unless told otherwise: ddof=1. And t has n - 1 degrees of freedom.",
    "scipy.stats.t.ppf(0.975, n - 1) * np.std(accuracies, ddof=1) / n ** 0.5.",
))
def half_width(answer: Any) -> None:
    """A function of accuracies over seeds: half the width of the interval of their mean."""
    for n in (2, 3, 5, 10):
        found = [round(random.uniform(0.7, 0.9), 3) for _ in range(n - 1)] + [0.95]
        same(call(answer, list(found)), float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(found) / n**0.5,
             f"the accuracies {found}")


@exercise("06.4", "Labels to doubt", level=2, hints=(
    "What does the second opinion say about the label that the post has, not about the one that it prefers?",
    "Sort the positions, not the probabilities: sorted(range(n), key=…).",
    "sorted(range(len(labels)), key=lambda i: shares[i][labels[i]])[:count].",
))
def doubt(answer: Any) -> None:
    """A function of labels, a second opinion's shares, and a number: the positions to look at."""
    for _ in range(5):
        hockey = random.sample(range(1, 100, 4), 8)  # no two add up to 100, so that no trust is level with another
        labels = [LABELS[0], LABELS[1], *random.choices(LABELS, k=6)]
        shares = [{"baseball": (100 - one) / 100, "hockey": one / 100} for one in hockey]
        trust = [share[label] for share, label in zip(shares, labels, strict=True)]
        same(call(answer, list(labels), list(shares), 3), sorted(range(8), key=trust.__getitem__)[:3],
             f"the labels {labels} and shares of hockey {[share['hockey'] for share in shares]}")


@exercise("06.5", "The cheapest that is not worse", level=3, hints=(
    "First find the best mean. How far below it may a setting be?",
    "The standard error is that of the best setting alone: its standard deviation / sqrt(n).",
    "Dictionaries keep their order: return the first name whose mean is at least best mean - error.",
))
def cheapest(answer: Any) -> None:
    """A function of accuracies by setting, cheapest first: the one of the one-standard-error rule."""
    cases = [{"rank 2": [0.80, 0.82, 0.81], "rank 8": [0.86, 0.90, 0.88], "rank 16": [0.89, 0.85, 0.93]},
             {"rank 2": [0.90, 0.80, 0.70], "rank 8": [0.85, 0.86, 0.87], "rank 16": [0.90, 0.91, 0.92]},
             {"rank 2": [0.86, 0.88, 0.87], "rank 8": [0.91, 0.85, 0.88], "rank 16": [0.5, 0.6, 0.7]}]
    cases += [{f"rank {rank}": [round(random.uniform(0.7, 0.9), 2) for _ in range(4)] for rank in (2, 4, 8, 16)}
              for _ in range(4)]
    for results in cases:
        same(call(answer, dict(results)), _cheapest(results), f"{results}")


def _cheapest(results: dict[str, list[float]]) -> str:
    best = max(results.values(), key=statistics.mean)
    lowest = statistics.mean(best) - statistics.stdev(best) / len(best) ** 0.5
    return next(name for name, found in results.items() if statistics.mean(found) >= lowest)
