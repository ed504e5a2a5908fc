"""The exercises: naive wrong answers fail, empty ones are not attempts, hints deepen, progress is kept."""

import math
import random
import statistics
from collections.abc import Callable
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest, t

import labkit
from labkit import assets, cli
from labkit.errors import LabkitError
from labkit.lessons import exercises as lessons


class Answer:
    """Something with the shape of the SDK's completion object."""

    def __init__(self, text: str, prompt_tokens: int, completion_tokens: int = 1) -> None:
        self.choices = [type("Choice", (), {"text": text})()]
        self.usage = type("Usage", (), {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens})()


rows = partial(zip, strict=True)

# What learners are likely to answer first, for every exercise.
WRONG: dict[str, list[Any]] = {
    "00.1": [" Rome", Answer(" Paris", 5), Answer(" Rome", 6), Answer(" Rome. It", 5, 3)],
    "00.2": [lambda text: len(text.split()), lambda text: 1.3, lambda text: len(text) / len(text.split()), 4],
    "00.3": [
        lambda given: {name: math.exp(value) for name, value in given.items()},
        lambda given: {name: 10**value for name, value in given.items()},
        lambda given: {name: value / sum(given.values()) for name, value in given.items()},
        lambda given: list(given.values()),
    ],
    "01.1": [
        lambda train, test: max(map(test.count, test)) / len(test),  # the majority of the test labels
        lambda train, test: max(map(train.count, train)) / len(train),
        lambda train, test: 0.5,
    ],
    "01.2": [
        lambda answers, labels: sum(answer not in labels for answer in answers) / len(answers),  # spaces left on
        lambda answers, labels: sum(answer.strip() in labels for answer in answers) / len(answers),
        lambda answers, labels: sum(answer.strip() not in labels for answer in answers),
    ],
    "01.3": [
        lambda window, question, answer, example: window // example,
        lambda window, question, answer, example: (window - question) // example,
        lambda window, question, answer, example: (window - question - answer) / example,
        lambda window, question, answer, example: (window - question - answer) // example,  # below 0
    ],
    "01.4": [
        lambda few, tuned, requests, training, epochs: requests * (few - tuned),
        lambda few, tuned, requests, training, epochs: requests * (few - tuned) - training,
        lambda few, tuned, requests, training, epochs: max(0, requests * (few - tuned) - epochs * training),
    ],
    "01.5": [
        lambda table, needed: max(table, key=lambda name: table[name][0]),
        lambda table, needed: min(table, key=lambda name: table[name][1]),
        lambda table, needed: min(
            (name for name in table if table[name][0] > needed), key=lambda name: table[name][1], default="none"),
        lambda table, needed: min(  # right but for those level in tokens
            (name for name in table if table[name][0] >= needed), key=lambda name: table[name][1], default="none"),
    ],
    "02.1": [
        lambda price, tokens, epochs: price * tokens / 1e6,
        lambda price, tokens, epochs: price * tokens * epochs / 1000,  # as if per 1,000
        lambda price, tokens, epochs: round(price * tokens * epochs / 1e6),
    ],
    "02.2": [
        lambda few, alone, base, tuned: alone < few,
        lambda few, alone, base, tuned: tuned < base,
        lambda few, alone, base, tuned: alone * tuned <= few * base,
    ],
    "02.3": [
        lambda training, before, after: training / (before - after) if before > after else math.inf,
        lambda training, before, after: math.ceil(training / before),
        lambda training, before, after: math.ceil(training / abs(before - after)) if before != after else math.inf,
        lambda training, before, after: training // (before - after) + 1 if before > after else math.inf,
    ],
    "02.4": [
        lambda prompt, cached, output, *prices: (prompt * prices[0] + output * prices[2]) / 1e6,
        lambda prompt, cached, output, *prices: (  # cached tokens on top
            prompt * prices[0] + cached * prices[1] + output * prices[2]) / 1e6,
        lambda prompt, cached, output, *prices: (  # short prompts cached as well
            (prompt - cached) * prices[0] + cached * prices[1] + output * prices[2]) / 1e6,
    ],
    "02.5": [
        lambda offers, prompt, per_day, days: min(  # whatever is switched off in between
            offers, key=lambda name: offers[name][0] + offers[name][1] * prompt * per_day * days / 1e6),
        lambda offers, prompt, per_day, days: min(
            (name for name in offers if offers[name][2] >= days), key=lambda name: offers[name][0], default="none"),
        lambda offers, prompt, per_day, days: max(offers, key=lambda name: offers[name][2]),
    ],
    "03.1": [
        lambda prompt, completion, separator: {"messages": [
            {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]},
        lambda prompt, completion, separator: {"messages": [  # also where it stands inside
            {"role": "user", "content": prompt.replace(separator, "")},
            {"role": "assistant", "content": completion.removeprefix(" ")}]},
        lambda prompt, completion, separator: {"messages": [  # more than the one space
            {"role": "user", "content": prompt.removesuffix(separator)},
            {"role": "assistant", "content": completion.strip()}]},
        lambda prompt, completion, separator: [prompt, completion],
    ],
    "03.2": [
        lambda typed, labels: typed if typed in labels else "unknown",
        lambda typed, labels: next((label for label in labels if label.lower() == typed.strip().lower()), "unknown"),
        lambda typed, labels: typed.strip(" .").lower(),
        lambda typed, labels: next((name for name in labels if typed.strip(" .").lower() in name.lower()), "unknown"),
    ],
    "03.3": [
        lambda prompt, completion, end: prompt + completion + [end],
        lambda prompt, completion, end: [-100] * len(prompt) + completion,
        lambda prompt, completion, end: [-100] * len(prompt) + completion + [-100],
        lambda prompt, completion, end: [-100] * (len(prompt) - 1) + completion + [end],
    ],
    "03.4": [
        lambda lengths, size: max(lengths) * len(lengths) - sum(lengths),
        lambda lengths, size: sum(
            max(lengths[i:i + size]) * size - sum(lengths[i:i + size]) for i in range(0, len(lengths), size)),
        lambda lengths, size: sum(max(lengths[i:i + size]) for i in range(0, len(lengths), size)) * size,
    ],
    "03.5": [
        lambda authors, share: list(range(math.ceil(share * len(authors)))),  # posts, not authors
        lambda authors, share: list(range(len(authors))),
        lambda authors, share: [i for i, name in enumerate(authors) if name == max(authors, key=authors.count)][:1],
        lambda authors, share: [  # everyone but the busiest
            i for i, name in enumerate(authors) if name != max(authors, key=authors.count)],
    ],
    "05.1": [
        lambda truth, answers, label: sum(t == a == label for t, a in rows(truth, answers)) / truth.count(label),
        lambda truth, answers, label: sum(map(eq, truth, answers)) / len(truth),
        lambda truth, answers, label: sum(t == a == label for t, a in rows(truth, answers)) / answers.count(label),
    ],
    "05.2": [
        lambda truth, first, second: binomtest(sum(map(eq, truth, first)), len(truth)).pvalue,
        lambda truth, first, second: binomtest(sum(map(eq, truth, first)),  # what both got right counts, too
                                               sum(map(eq, truth, first)) + sum(map(eq, truth, second))).pvalue,
        lambda truth, first, second: binomtest(sum(a == t != b for t, a, b in rows(truth, first, second)),
                                               sum(a != b for a, b in rows(first, second))).pvalue,
    ],
    "05.3": [
        lambda train, test: sum(pair in train for pair in test) / len(test),
        lambda train, test: sum(dict(train).get(author) == label for author, label in test) / len(test),
        lambda train, test: sum(author in dict(train) for author, _ in test) / len(test),
    ],
    "05.4": [
        lambda p, T: p / T,
        lambda p, T: p ** (1 / T),
        lambda p, T: p ** T / (p ** T + (1 - p) ** T),
    ],
    "05.5": [
        lambda sure, rights, wanted: max(sure),
        lambda sure, rights, wanted: min(c for c, right in rows(sure, rights) if right),
        lambda sure, rights, wanted: next(  # posts at the threshold itself are left out
            c for c in sorted(sure) if sum(r for s, r in rows(sure, rights) if s > c)
            >= wanted * sum(s > c for s in sure)),
        lambda sure, rights, wanted: max((c for c in sure if sum(r for s, r in rows(sure, rights) if s >= c)
                                          >= wanted * sum(s >= c for s in sure)), default=2),  # the highest
    ],
    "06.1": [
        lambda settings, seeds: sum(map(len, settings.values())) * seeds,
        lambda settings, seeds: math.prod(map(len, settings.values())),
        lambda settings, seeds: math.prod(map(len, settings.values())) + seeds,
        lambda settings, seeds: len(settings) * seeds,
    ],
    "06.2": [
        lambda losses, patience: (len(losses), losses.index(min(losses)) + 1),
        lambda losses, patience: (losses.index(min(losses)) + 1 + patience, losses.index(min(losses)) + 1),
        lambda losses, patience: next(  # the first rise, whatever the patience
            ((i + 1, i) for i in range(1, len(losses)) if losses[i] >= losses[i - 1]), (len(losses), len(losses))),
    ],
    "06.3": [
        lambda found: 1.96 * statistics.stdev(found) / len(found) ** 0.5,
        lambda found: t.ppf(0.975, len(found) - 1) * statistics.pstdev(found) / len(found) ** 0.5,
        lambda found: t.ppf(0.975, len(found) - 1) * statistics.stdev(found),
        lambda found: t.ppf(0.975, len(found)) * statistics.stdev(found) / len(found) ** 0.5,
    ],
    "06.4": [
        lambda labels, shares, count: sorted(range(len(labels)), key=lambda i: max(shares[i].values()))[:count],
        lambda labels, shares, count: sorted(range(len(labels)), key=lambda i: -shares[i][labels[i]])[:count],
        lambda labels, shares, count: sorted(shares[i][labels[i]] for i in range(len(labels)))[:count],
    ],
    "06.5": [
        lambda results: max(results, key=lambda name: statistics.mean(results[name])),
        lambda results: max(results, key=lambda name: max(results[name])),
        lambda results: min(results, key=lambda name: statistics.stdev(results[name])),
        lambda results: next(name for name in results),
    ],
    "07.1": [
        lambda answers, labels: sum(map(eq, answers, labels)) / sum(a is not None for a in answers),
        lambda answers, labels: (sum(map(eq, answers, labels)) + answers.count(None)) / len(labels),
        lambda answers, labels: sum(map(eq, answers, labels)),
    ],
    "07.2": [
        lambda train, held_out: len(set(train) & set(held_out)) / len(set(held_out)),  # authors, not posts
        lambda train, held_out: sum(name in set(held_out) for name in train) / len(train),
        lambda train, held_out: sum(name in set(train) for name in held_out),
    ],
    "07.3": [set("ABC"), set("ABCDEFGHIJKLM"), "ACDFGIJK", 9],
    "04.1": [
        lambda examples, size, epochs: examples // size * epochs,
        lambda examples, size, epochs: math.ceil(examples * epochs / size),  # an epoch's last batch stays small
        lambda examples, size, epochs: math.ceil(examples / size),
    ],
    "04.2": [
        lambda logprobs: math.exp(sum(logprobs) / len(logprobs)),
        lambda logprobs: -sum(logprobs) / len(logprobs),
        lambda logprobs: math.exp(-sum(logprobs)),
    ],
    "04.3": [
        lambda examples: 3,
        lambda examples: min(25, 100 // examples) if examples < 100 else 3,
        lambda examples: min(25, 100 / examples) if examples * 3 < 100 else 3,
    ],
    "04.4": [
        lambda rows: max(rows)[0],  # the last
        lambda rows: min(rows, key=lambda row: row[1])[0],
        lambda rows: min(rows, key=lambda row: row[2]),
        lambda rows: min(rows, key=lambda row: (row[2], -row[0]))[0],
    ],
    "04.5": [
        lambda losses, prompt: sum(losses) / len(losses),
        lambda losses, prompt: sum(losses[prompt:]) / len(losses[prompt:]),
        lambda losses, prompt: sum(losses[prompt - 1:]),
    ],
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of progress for each test."""
    base_model = assets.base_model()  # before the home moves
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    monkeypatch.setattr("labkit.assets.base_model", lambda: base_model)


@pytest.mark.parametrize("item", lessons.exercises(), ids=lambda item: item.number)
def test_naive_wrong_answers_fail(item: lessons.Exercise) -> None:
    assert len(WRONG[item.number]) >= 3
    for answer in WRONG[item.number]:
        result = labkit.check(item.number, answer)
        assert result.state == "wrong" and "Hint" in result.message


def empty(*arguments: Any) -> None:
    """A function as the learner gets it."""


@pytest.mark.parametrize("item", lessons.exercises(), ids=lambda item: item.number)
def test_an_untouched_answer_is_no_attempt(item: lessons.Exercise) -> None:
    untouched = empty if callable(WRONG[item.number][0]) else None
    result = labkit.check(item.number, untouched)
    assert result.state == "not attempted" and not result
    assert "0 of" in lessons.progress()


def test_hints_deepen_and_progress_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = WRONG["01.4"][0]
    hints = lessons.exercises("01.4")[0].hints
    for tried in range(len(hints) + 2):
        shown = repr(labkit.check("01.4", wrong))
        assert f"Hint {min(tried + 1, 3)} of 3: {hints[min(tried, 2)]}" in shown
    assert "not yet, tries: 5" in lessons.progress()
    right = labkit.check("01.4", lambda few, tuned, requests, training, epochs:
                         requests * (few - tuned) - epochs * training)
    assert right and repr(right) == "01.4 right: Tokens saved."
    labkit.check("01.4", wrong)  # what was right once stays done
    assert cli.main(["progress"]) == 0
    shown = capsys.readouterr().out
    assert f"1 of {len(lessons.exercises())} exercises right" in shown and "Notebook 00" in shown
    assert "Tokens saved" in next(line for line in shown.splitlines() if "right 20" in line)


def test_an_answer_that_stops_is_wrong_and_says_why() -> None:
    result = labkit.check("01.1", lambda train, test: train[len(train)])
    assert result.state == "wrong" and "it stopped with IndexError" in result.message


def test_unknown_numbers_are_named() -> None:
    with pytest.raises(LabkitError, match=r"no exercise '01\.9'; there are 00\.1, "):
        labkit.check("01.9", 1)
    with pytest.raises(LabkitError, match="no quiz '99'"):
        labkit.quiz("99")


def test_a_broken_record_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text("{")
    with pytest.raises(LabkitError, match=r"progress\.json cannot be read .* delete it"):
        lessons.progress()


@pytest.mark.parametrize("answer", [True, "3", [3], 3.1, float("nan")])
def test_same_takes_numbers_by_value_and_nothing_else(answer: Any) -> None:
    with pytest.raises(lessons.Wrong):
        lessons.same(answer, 3, "three")
    lessons.same(3.0000001, 3, "three")
    lessons.same(random.choice(["a"]), "a", "a letter")


def test_call_shows_what_it_tried() -> None:
    def broken(text: str) -> float:
        return 1 / 0

    fails: Callable[..., Any] = broken
    with pytest.raises(lessons.Wrong, match=r"With \('post'\) it stopped with ZeroDivisionError"):
        lessons.call(fails, "post")
