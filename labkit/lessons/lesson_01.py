"""The checks of notebook 01, why fine-tune."""

import random
from collections import Counter
from typing import Any

from labkit.lessons.exercises import call, exercise, same


@exercise("01.1", "The score of knowing nothing", level=1, hints=(
    "Which label does the baseline always answer? The one that is most frequent in training.",
    "collections.Counter(train_labels).most_common(1)[0][0] is that label.",
    "Its accuracy is the share of test labels that are that label: look at the test labels only now.",
))
def majority(answer: Any) -> None:
    """A function of training labels and test labels: accuracy of the training majority on the test labels."""
    for _ in range(6):
        often, seldom = random.sample(["baseball", "hockey", "golf"], 2)
        train = [often] * random.randint(12, 20) + [seldom] * random.randint(1, 9)
        test = [often] * random.randint(1, 9) + [seldom] * random.randint(12, 20)
        random.shuffle(train)
        random.shuffle(test)
        same(call(answer, train, test), test.count(often) / len(test),
             f"training labels {dict(Counter(train))} and test labels {dict(Counter(test))}")


@exercise("01.2", "Off-label answers", level=1, hints=(
    'Answers arrive as tokens, often with a space before them: " hockey".',
    "Strip each answer, then ask whether it is in the list of labels.",
    "The share is a number from 0 to 1: count the answers that are in no label, divide by all answers.",
))
def off_label(answer: Any) -> None:
    """A function of answers and labels: the share of answers that, stripped, are none of the labels."""
    labels = ["baseball", "hockey"]
    others = [" sports", " the", " politics", "\n", " basket"]
    for _ in range(6):
        good = random.choices([" baseball", " hockey", "hockey"], k=random.randint(1, 12))
        bad = random.choices(others, k=random.randint(1, 12))
        given = random.sample(good + bad, len(good + bad))
        same(call(answer, given, labels), len(bad) / len(given), f"the answers {given}")


@exercise("01.3", "How many examples fit", level=2, hints=(
    "Not all of the window is for examples: what else must stand in it?",
    "The question and the answer need their tokens first; the examples share what is left.",
    "Half an example is of no use: divide with //. And there are never fewer than 0.",
))
def that_fit(answer: Any) -> None:
    """A function of window, question, answer and example tokens: whole examples that fit beside the others."""
    cases = [(2048, 130, 1, 70), (100, 90, 20, 10), (1000, 100, 100, 80)]
    cases += [(random.randint(1000, 9000), random.randint(50, 400), random.randint(1, 300), random.randint(20, 300))
              for _ in range(5)]
    for window, question, reply, example in cases:
        same(call(answer, window, question, reply, example), max(0, (window - question - reply) // example),
             f"a window of {window}, a question of {question}, an answer of {reply} and examples of {example} tokens")


@exercise("01.4", "Tokens saved", level=2, hints=(
    "Per request, the fine-tuned prompt saves the difference of the two prompts.",
    "Training has read tokens, too: its examples, once each epoch. Subtract them.",
    "requests * (few_shot - fine_tuned) - epochs * training_tokens; the answer may be negative.",
))
def saved(answer: Any) -> None:
    """A function of both prompts' tokens, requests, training tokens and epochs: tokens saved in all."""
    for scale in (1, 100) * 3:  # few requests: training costs more than they save
        few, tuned = random.randint(300, 900), random.randint(50, 250)
        requests, training, epochs = scale * random.randint(2, 9), random.randint(10_000, 90_000), random.randint(2, 5)
        same(call(answer, few, tuned, requests, training, epochs), requests * (few - tuned) - epochs * training,
             f"prompts of {few} and {tuned} tokens, {requests} requests and {epochs} epochs over {training} tokens")


@exercise("01.5", "The least that will do", level=3, hints=(
    "First keep only the candidates whose accuracy is at least what is needed.",
    'If none is left, answer "none".',
    "Of those left, take the one with the fewest prompt tokens: min(…, key=…); "
    "when two are level, the more accurate one.",
))
def least(answer: Any) -> None:
    """A function of {name: (accuracy, tokens)} and the accuracy needed: the cheapest candidate that reaches it."""
    names = ["zero-shot", "few-shot", "fine-tuned", "TF-IDF"]
    for trial in range(8):
        sizes = random.sample(range(0, 900, 10), 4)
        shares = [share / 100 for share in random.sample(range(50, 100), 4)]
        if trial % 2:  # the first two are level in tokens: accuracy decides, once for the first, once for the second
            sizes[1] = sizes[0] = min(sizes)
            shares[:2] = sorted(shares[:2], reverse=trial % 4 == 1)
        table = dict(zip(names, zip(shares, sizes, strict=True), strict=True))
        accuracies = sorted(accuracy for accuracy, _ in table.values())
        for needed in (accuracies[0], accuracies[1], accuracies[-1], 0.995):
            fit = {name: (size, -accuracy) for name, (accuracy, size) in table.items() if accuracy >= needed}
            best = {name for name in fit if fit[name] == min(fit.values())} or {"none"}
            found = call(answer, dict(table), needed)
            if found not in best:
                same(found, sorted(best)[0], f"{table} and {needed} needed")
