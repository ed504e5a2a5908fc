"""The statistics agree with scikit-learn and scipy; bad input gives a clear error or a defined result."""

import math
import string
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from sklearn.datasets import _twenty_newsgroups as newsgroups

from labkit.client import calibration, evaluate, leakage, mistakes, texts
from labkit.errors import DataError

QUICK = settings(max_examples=25, deadline=None)
LABELS = ["a", "b", "c"]


def table(truth: list[str], wrong: float = 0.3, off: float = 0.1, seed: int = 0,
          labels: list[str] = LABELS) -> pd.DataFrame:
    """Answers as `labkit.classify` gives them, partly wrong and partly off-label."""
    chance = np.random.default_rng(seed)
    rows = []
    for right in truth:
        shares = chance.dirichlet(np.ones(len(labels)))
        best = labels[int(shares.argmax())]
        if chance.random() > wrong:
            i = labels.index(right)
            j = int(shares.argmax())
            shares[i], shares[j] = shares[j], shares[i]
            best = right
        if chance.random() < off:
            best, shares = None, np.full(len(labels), np.nan)
        rows.append({"label": best, "probability": np.max(shares), **dict(zip(labels, shares, strict=True)),
                     "on_label": 1.0})
    return pd.DataFrame(rows).astype({"label": object})


cases = st.tuples(st.lists(st.sampled_from(LABELS), min_size=2, max_size=40), st.integers(0, 10**6))


@QUICK
@given(cases)
def test_metrics_agree_with_scikit_learn(case: tuple[list[str], int]) -> None:
    truth, seed = case
    answers = table(truth, seed=seed)
    given_labels = answers["label"].fillna("none").tolist()
    found = evaluate.evaluate(truth, answers)
    assert found.loc["accuracy", "value"] == pytest.approx(sk.accuracy_score(truth, given_labels))
    assert found.loc["macro F1", "value"] == pytest.approx(
        sk.f1_score(truth, given_labels, labels=sorted(set(truth)), average="macro", zero_division=0))
    assert found.loc["off-label", "value"] == pytest.approx(answers["label"].isna().mean())
    shares = answers[LABELS].fillna(1 / 3).to_numpy()
    assert found.loc["log loss", "value"] == pytest.approx(
        sk.log_loss(truth, np.clip(shares, 1e-6, 1), labels=LABELS), rel=1e-3)
    binary = [sk.roc_auc_score([t == name for t in truth], shares[:, i])
              for i, name in enumerate(LABELS) if 0 < truth.count(name) < len(truth)]
    assert found.loc["ROC-AUC", "value"] == pytest.approx(np.mean(binary)) if binary else math.isnan(
        found.loc["ROC-AUC", "value"])
    precise = [sk.average_precision_score([t == name for t in truth], shares[:, i])
               for i, name in enumerate(LABELS) if name in truth]
    assert found.loc["average precision", "value"] == pytest.approx(np.mean(precise))
    defined = found.dropna()
    assert (defined.low <= defined.value + 1e-9).all() and (defined.value <= defined.high + 1e-9).all()
    each = evaluate.per_class(truth, answers)
    report = sk.classification_report(truth, given_labels, labels=LABELS, output_dict=True, zero_division=0)
    assert all(each.loc[name, "recall"] == pytest.approx(report[name]["recall"]) for name in LABELS)
    matrix = evaluate.confusion(truth, answers)
    assert matrix.to_numpy().sum() == len(truth)
    assert matrix[evaluate.OFF_LABEL].sum() == answers["label"].isna().sum()


@QUICK
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20))
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int, both: int) -> None:
    n = only_first + only_second + both
    if not n:
        return
    first = ["x"] * only_first + ["y"] * only_second + ["x"] * both
    second = ["y"] * only_first + ["x"] * only_second + ["x"] * both
    pair = evaluate.compare(["x"] * n, {"one": first, "two": second}).iloc[0]
    lesser = min(only_first, only_second)
    exact = min(1.0, 2 * stats.binom.cdf(lesser, only_first + only_second, 0.5))
    assert (pair.only_first, pair.only_second) == (only_first, only_second)
    assert pair.p == pytest.approx(exact) and pair.difference == pytest.approx((only_first - only_second) / n)


def test_bootstrap_intervals_are_scipys_and_cover_what_they_should() -> None:
    chance = np.random.default_rng(0)
    sample = chance.normal(size=60)
    low, high = evaluate.interval(np.mean, sample)
    theirs = stats.bootstrap((sample,), np.mean, n_resamples=1000, method="percentile",
                             rng=np.random.default_rng(1)).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    covered = [(lambda ends: ends[0] <= 0 <= ends[1])(evaluate.interval(np.mean, chance.normal(size=50), seed=i))
               for i in range(60)]
    assert np.mean(covered) > 0.82  # 0.95 is what is promised; 0.82 is over four standard errors below
    assert all(math.isnan(end) for end in evaluate.interval(np.mean, [1.0]))


def test_bad_input_is_told_and_odd_input_has_a_defined_result() -> None:
    with pytest.raises(DataError, match="no posts"):
        evaluate.evaluate([], [])
    with pytest.raises(DataError, match="2 right labels but 1 answers"):
        evaluate.evaluate(["a", "b"], ["a"])
    with pytest.raises(DataError, match="Row 1 has no right label"):
        evaluate.evaluate(["a", None], ["a", "a"])  # type: ignore[list-item]
    broken = table(["a", "b"], off=0)
    broken.loc[1, LABELS] = np.nan
    with pytest.raises(DataError, match="Row 1 has a label but no probability"):
        evaluate.evaluate(["a", "b"], broken)
    with pytest.raises(DataError, match="truth names \\['z'\\]"):
        evaluate.evaluate(["a", "z"], table(["a", "b"]))
    with pytest.raises(DataError, match="lengths"):
        evaluate.interval(np.mean, [])
    one_class = evaluate.evaluate(["a"] * 5, table(["a"] * 5, wrong=0, off=0))
    assert one_class.loc["accuracy", "value"] == 1 and one_class.loc["accuracy", "low"] < 0.6  # not a false certainty
    assert math.isnan(one_class.loc["ROC-AUC", "value"])
    never = evaluate.per_class(["a", "b"], ["a", "a"])
    assert never.loc["b", ["precision", "recall", "F1"]].tolist() == [0, 0, 0]
    nothing = evaluate.evaluate(["a", "b"], [None, None])
    assert nothing.loc["off-label", "value"] == 1 and nothing.loc["accuracy", "value"] == 0
    with pytest.raises(DataError, match="no probabilities"):
        calibration.reliability(["a"], ["a"])  # type: ignore[arg-type]


@QUICK
@given(cases)
def test_calibration_agrees_with_scikit_learn(case: tuple[list[str], int]) -> None:
    truth, seed = case
    answers = table(truth, seed=seed, off=0)
    right = (answers["label"].to_numpy() == np.array(truth)).astype(int)
    found = calibration.reliability(truth, answers)
    share_right, confidence = calibration_curve(right, answers["probability"].clip(0, 1 - 1e-9), n_bins=10)
    assert found["accuracy"].tolist() == pytest.approx(share_right.tolist())
    assert found["confidence"].tolist() == pytest.approx(confidence.tolist())
    assert found["posts"].sum() == len(truth)
    assert 0 <= calibration.expected_error(truth, answers) <= 1
    curve = calibration.abstention(truth, answers)
    assert curve.coverage.iloc[0] == 1 and curve.accuracy.iloc[0] == pytest.approx(right.mean())
    assert curve.coverage.is_monotonic_decreasing


def test_temperature_finds_how_much_too_sure_a_model_is() -> None:
    chance = np.random.default_rng(0)
    honest = chance.uniform(0.02, 0.98, 4000)
    truth = np.where(chance.random(4000) < honest, "a", "b")
    shares = np.stack([honest, 1 - honest], axis=1)
    too_sure = shares**3 / (shares**3).sum(axis=1, keepdims=True)
    answers = pd.DataFrame({"label": np.where(honest > 0.5, "a", "b"), "probability": too_sure.max(axis=1),
                            "a": too_sure[:, 0], "b": too_sure[:, 1], "on_label": 1.0})
    found = calibration.temperature(truth, answers)
    assert found == pytest.approx(3, rel=0.1)
    cooled = calibration.scaled(answers, found)
    assert calibration.expected_error(truth, cooled) < calibration.expected_error(truth, answers) / 3
    assert (cooled["label"] == answers["label"]).all()
    with pytest.raises(DataError, match="greater than 0"):
        calibration.scaled(answers, 0)
    off = table(["a", "b", "c", "a"], off=1)
    assert calibration.scaled(off, 2)["probability"].isna().all()
    assert calibration.abstention(["a"] * 4, off).threshold.tolist() == [0]


words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat"]), max_size=8).map(" ".join)


@QUICK
@given(words, words)
def test_text_scores_agree_with_their_definitions(right: str, found: str) -> None:
    scores = texts.text_scores([right], [found]).iloc[0]
    assert scores.exact == (right == found)

    def longest(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        return longest(a[1:], b[1:]) + 1 if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))

    total = len(right.split()) + len(found.split())
    assert scores.rouge_l == pytest.approx(2 * longest(right.split(), found.split()) / total if total else 1)
    assert scores.exact <= scores.rouge_l <= scores.token_f1


def test_text_scores_of_json_case_and_nothing() -> None:
    scores = texts.text_scores(['{"a": 1}', "Yes.", "", "!"], ['{"a": 1}', "yes", "", "?"])
    assert scores.json_valid.tolist() == [1, 0, 0, 0] and scores.exact.tolist() == [1, 1, 1, 0]
    with pytest.raises(DataError, match="As many right answers"):
        texts.text_scores([], [])


POST = """From: {author}@example.org
Subject: Re: {thread}
Organization: Rink University
Lines: 5

In article <1@x> someone@else.org writes:
> who won
The goalie {author} played well tonight.
More text here.

--
{author}, of the rink"""


def posts(count: int = 40) -> pd.DataFrame:
    return pd.DataFrame([{"text": POST.format(author=f"name{i % 8}", thread=f"game {i % 5}"), "author": f"name{i % 8}",
                          "label": "ab"[i % 2], "split": "train" if i < 30 else "test"} for i in range(count)])


def test_stripping_agrees_with_scikit_learn_where_both_apply() -> None:
    text = POST.format(author="bob", thread="game")
    theirs = newsgroups.strip_newsgroup_footer(
        newsgroups.strip_newsgroup_quoting(newsgroups.strip_newsgroup_header(text)))
    ours = leakage.strip(text)
    assert ours == "The goalie bob played well tonight.\nMore text here." == theirs.strip()
    assert leakage.strip(text, headers=False, quotes=False, footers=False) == text
    headless = "no header here\n\nsecond paragraph of one post"
    assert leakage.strip(headless, footers=False) == headless
    assert leakage.strip("") == ""


def test_leakage_is_found_and_splits_prevent_it() -> None:
    table = leakage.fields(posts())
    assert set(table["thread"]) == {f"game {i}" for i in range(5)}
    train, test = leakage.split(table, "random")
    found = leakage.overlap(train, test)
    assert found.loc["author", "shared"] == 1 and found.loc["author", "lookup_accuracy"] == 1
    assert "organization" in found.index
    train, test = leakage.split(table, "author")
    assert leakage.overlap(train, test, ("author",)).loc["author", "shared"] == 0
    train, test = leakage.split(table, "date")
    assert (len(train), len(test)) == (30, 10)
    with pytest.raises(DataError, match="names its author"):
        leakage.split(table.assign(author=None), "author")
    with pytest.raises(DataError, match="not 'month'"):
        leakage.split(table, "month")
    with pytest.raises(DataError, match="filled column"):
        leakage.overlap(train, test, ("nobody",))


def test_mistakes_their_neighbours_and_new_labels(tmp_path: Path) -> None:
    test = posts(8)
    answers = table(["a"] * 8, wrong=0, off=0, labels=["a", "b"])
    wrong = mistakes.mistakes(test, answers)
    assert (wrong["label"] == "b").all() and wrong["probability"].is_monotonic_decreasing and len(wrong) == 4
    rates = mistakes.error_rate(test, answers, "author")
    assert rates["posts"].sum() == 8 and set(rates["error_rate"]) == {0, 1}
    assert len(mistakes.error_rate(test, answers, "probability", bins=2)) == 2
    near = mistakes.neighbours(posts(), wrong, 2)
    assert near.groupby("post")["similarity"].max().min() == pytest.approx(1) and len(near) == 8

    mistakes.to_relabel(wrong, tmp_path / "wrong.csv")
    assert mistakes.relabelled(test, tmp_path / "wrong.csv").equals(test)  # nothing filled in
    sheet = pd.read_csv(tmp_path / "wrong.csv", encoding="utf-8-sig", dtype=str)
    sheet.loc[0, "new_label"], sheet.loc[1, "new_label"] = "a", "drop"
    sheet.to_csv(tmp_path / "wrong.csv", index=False)
    mended = mistakes.relabelled(test, tmp_path / "wrong.csv")
    assert len(mended) == 7 and mended.loc[wrong.index[0], "label"] == "a"
    sheet.loc[0, "new_label"] = "basbeall"
    sheet.to_csv(tmp_path / "wrong.csv", index=False)
    with pytest.raises(DataError, match="basbeall"):
        mistakes.relabelled(test, tmp_path / "wrong.csv")


@QUICK
@given(st.text(string.ascii_letters + " \n", max_size=200), st.integers(0, 9))
def test_typos_keep_the_letters(text: str, seed: int) -> None:
    changed = mistakes.typos(text, 0.5, seed)
    assert sorted(changed) == sorted(text) and changed == mistakes.typos(text, 0.5, seed)
