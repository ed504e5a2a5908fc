"""How good is a classifier, and is it better than another? Metrics with their uncertainty.

`truth` is a column of right labels; answers are a table from `labkit.classify`, or a plain
column of labels in which None stands for an answer that is none of the labels. Such off-label
answers count as wrong and as off-label; nothing maps them to a label. What comes back is a
DataFrame. Wrong input raises `DataError`.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn import metrics as sk

from labkit.errors import DataError

OFF_LABEL = "(off-label)"
FLOOR = 1e-6  # a probability of zero is one that was too small to be among the answer's top tokens
RESAMPLES = 1000
NOT_LABELS = ("label", "probability", "on_label", "answer", "prompt_tokens", "cached_tokens", "seconds")


def evaluate(truth: Sequence[str], answers: Any) -> pd.DataFrame:
    """The usual metrics of one model, one row each, with 95 % intervals: `value`, `low`, `high`.

    Always accuracy, off-label share and macro F1. With probabilities also ROC-AUC and average
    precision (each label against the rest, averaged; labels absent from `truth` left out), and
    log loss in nats. An off-label answer knows nothing there: all labels get equal shares.
    Intervals of shares are Wilson's (sound even when everything is right), the others bootstrap.
    A notebook shows this table for the fine-tuned model before it compares anything.
    """
    right, table = paired(truth, answers)
    given = table["label"].to_numpy()
    rows = {"accuracy": share(given == right), "off-label": share(table["label"].isna().to_numpy()),
            "macro F1": _with_interval(_macro_f1, right, table["label"].fillna(OFF_LABEL).to_numpy())}
    if names := labels_of(table):
        shares = shares_of(table)
        hot = right[:, None] == np.array(names)[None, :]
        rows["ROC-AUC"] = _with_interval(_auc, hot, shares)
        rows["average precision"] = _with_interval(_average_precision, hot, shares)
        loss = -np.log(np.clip(shares[hot], FLOOR, 1))
        rows["log loss"] = _with_interval(np.mean, loss)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])


def per_class(truth: Sequence[str], answers: Any) -> pd.DataFrame:
    """Precision, recall, F1 and number of posts of each label; a label never answered has precision 0."""
    right, table = paired(truth, answers)
    given = table["label"].fillna(OFF_LABEL).to_numpy()
    names = _names(right, table)
    columns = sk.precision_recall_fscore_support(right, given, labels=names, zero_division=0)
    return pd.DataFrame(np.array(columns).T, index=names, columns=["precision", "recall", "F1", "posts"]) \
        .astype({"posts": int})


def confusion(truth: Sequence[str], answers: Any) -> pd.DataFrame:
    """How often each label (rows) was answered by which (columns, the last for off-label answers)."""
    right, table = paired(truth, answers)
    names = [*_names(right, table), OFF_LABEL]
    counts = sk.confusion_matrix(right, table["label"].fillna(OFF_LABEL).to_numpy(), labels=names)
    return pd.DataFrame(counts[:-1], index=pd.Index(names[:-1], name="truth"),
                        columns=pd.Index(names, name="answered"))


def compare(truth: Sequence[str], answers: Mapping[str, Any]) -> pd.DataFrame:
    """McNemar's exact test between every two models on the same posts, one row a pair.

    `answers` holds each model's answers under its name. `only_first` and `only_second` count the
    posts that one of the two got right and the other wrong: all the evidence there is.
    `difference` is accuracy of the first minus that of the second, `low` and `high` its 95 %
    bootstrap interval over posts, `p` the probability of so lopsided a count or worse if both
    were equally good. A notebook asks with it which rungs of the ladder really differ; with many
    pairs some small `p` comes by chance.
    """
    right = {name: (lambda pair: pair[1]["label"].to_numpy() == pair[0])(paired(truth, given))
             for name, given in answers.items()}
    rows = []
    for first, second in combinations(right, 2):
        only_first, only_second = (int(n.sum()) for n in (right[first] & ~right[second], ~right[first] & right[second]))
        apart = right[first].astype(float) - right[second]
        p = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
        rows.append([first, second, only_first, only_second, *_with_interval(np.mean, apart), p])
    return pd.DataFrame(rows, columns=["first", "second", "only_first", "only_second", "difference", "low",
                                       "high", "p"])


def interval(statistic: Callable[..., float], *columns: Any, confidence: float = 0.95,
             seed: int = 0) -> tuple[float, float]:
    """The bootstrap percentile interval of `statistic(*columns)`, rows drawn together (`scipy.stats.bootstrap`).

    Resamples in which the statistic is not defined, such as ROC-AUC with one class only, are
    left out. One row alone has no interval: NaN. Raises `DataError` for none, or unequal lengths.
    """
    arrays = [np.asarray(column) for column in columns]
    if not arrays or len({len(array) for array in arrays}) != 1 or not len(arrays[0]):
        raise DataError(f"Columns of one length are needed, got lengths {[len(array) for array in arrays]}.")
    if len(arrays[0]) < 2:
        return math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of its own interval, which is not used
        drawn = stats.bootstrap(
            (np.arange(len(arrays[0])),), lambda rows: statistic(*(array[rows] for array in arrays)),
            vectorized=False, n_resamples=RESAMPLES, method="percentile",
            rng=np.random.default_rng(seed)).bootstrap_distribution
    if np.isnan(drawn).all():
        return math.nan, math.nan
    low, high = np.nanpercentile(drawn, [50 - 50 * confidence, 50 + 50 * confidence])
    return float(low), float(high)


def share(hits: Any) -> tuple[float, float, float]:
    """A share of posts with its 95 % Wilson interval. Raises `DataError` when there are none."""
    if not len(hits):
        raise DataError("There are no posts to take a share of.")
    found = stats.binomtest(int(np.sum(hits)), len(hits))
    bounds = found.proportion_ci(0.95, method="wilson")
    return float(found.statistic), float(bounds.low), float(bounds.high)


def paired(truth: Sequence[str], answers: Any) -> tuple[np.ndarray, pd.DataFrame]:
    """Truth and answers, checked to belong together. Raises `DataError` when they do not."""
    table = answers if isinstance(answers, pd.DataFrame) else pd.DataFrame({"label": list(answers)}, dtype=object)
    right = np.asarray(truth, dtype=object)
    if "label" not in table:
        raise DataError(f"Answers need a column \"label\"; found {', '.join(map(repr, table.columns)) or 'none'}.")
    if len(right) != len(table):
        raise DataError(f"{len(right)} right labels but {len(table)} answers. Pass the same posts in the same order.")
    if not len(right):
        raise DataError("There are no posts to evaluate on. Was the held-out table filtered to nothing?")
    if pd.isna(right).any():
        raise DataError(f"Row {int(np.argmax(pd.isna(right)))} has no right label. Fill it in or drop the row.")
    if (names := labels_of(table)) and (unknown := sorted(set(right) - set(names))):
        raise DataError(f"The truth names {unknown}, but the model was asked for {names}. Classify with all labels.")
    return right, table.reset_index(drop=True)


def labels_of(answers: pd.DataFrame) -> list[str]:
    """The labels that a table of `labkit.classify` has shares for; empty for a plain column of labels."""
    return [name for name in answers.columns if name not in NOT_LABELS] if "probability" in answers else []


def shares_of(answers: pd.DataFrame) -> np.ndarray:
    """The labels' shares, posts × labels; equal ones where the answer was off-label.

    Raises `DataError` for a NaN beside a label.
    """
    shares = answers[labels_of(answers)].to_numpy(float)
    missing = np.isnan(shares).any(axis=1)
    if (odd := missing & answers["label"].notna().to_numpy()).any():
        raise DataError(f"Row {int(np.argmax(odd))} has a label but no probability (NaN). Classify that post again.")
    return np.where(missing[:, None], 1 / shares.shape[1], shares)


def _names(right: np.ndarray, table: pd.DataFrame) -> list[str]:
    return labels_of(table) or sorted({*right, *table["label"].dropna()})


def _with_interval(statistic: Callable[..., Any], *columns: np.ndarray) -> tuple[float, float, float]:
    return float(statistic(*columns)), *interval(statistic, *columns)


def _macro_f1(right: np.ndarray, given: np.ndarray) -> float:
    """As sklearn's `f1_score(average="macro")` over the labels of the truth, but quick enough to resample."""
    scores = []
    for name in dict.fromkeys(right):
        hits, is_label = ((right == name) & (given == name)).sum(), (right == name).sum() + (given == name).sum()
        scores.append(2 * hits / is_label)
    return float(np.mean(scores))


def _auc(hot: np.ndarray, shares: np.ndarray) -> float:
    """Mann and Whitney's form of sklearn's `roc_auc_score`, 30 times as quick, which resampling needs."""
    wins = []
    for is_label, scores in zip(hot.T, shares.T, strict=True):
        n = int(is_label.sum())
        if 0 < n < len(is_label):
            above = stats.rankdata(scores)[is_label].sum() - n * (n + 1) / 2
            wins.append(above / (n * (len(is_label) - n)))
    return float(np.mean(wins)) if wins else math.nan


def _average_precision(hot: np.ndarray, shares: np.ndarray) -> float:
    """As sklearn's `average_precision_score`, and as quick as `_auc`; equal scores are one step of the curve."""
    areas = []
    for is_label, scores in zip(hot.T, shares.T, strict=True):
        if is_label.any():
            order = np.argsort(-scores)
            steps = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
            found = np.cumsum(is_label[order])[steps]
            areas.append(float(np.sum(np.diff(found, prepend=0) * found / (steps + 1)) / found[-1]))
    return float(np.mean(areas))
