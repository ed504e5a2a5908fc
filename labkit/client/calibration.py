"""Can a model's probabilities be believed, and what to do with posts it is not sure of?

All functions take the right labels and a table of `labkit.classify`; off-label answers have
confidence 0 and are wrong.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from labkit.client.evaluate import FLOOR, labels_of, paired, share, shares_of
from labkit.errors import DataError


def reliability(truth: Sequence[str], answers: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Posts in bins of equal width by confidence: `confidence` (mean), `accuracy`, `low`, `high`, `posts`.

    In a calibrated model confidence and accuracy agree in every bin. Empty bins are left out. A
    notebook draws it with `plots.reliability`.
    """
    confidence, right = _confidence(truth, answers)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = []
    for one in np.unique(place):
        accuracy, low, high = share(right[place == one])
        rows.append([confidence[place == one].mean(), accuracy, low, high, int((place == one).sum())])
    return pd.DataFrame(rows, columns=["confidence", "accuracy", "low", "high", "posts"])


def expected_error(truth: Sequence[str], answers: pd.DataFrame, bins: int = 10) -> float:
    """The expected calibration error, 0 to 1: the mean distance of confidence and accuracy (Naeini et al. 2015)."""
    table = reliability(truth, answers, bins)
    return float(np.average((table["confidence"] - table["accuracy"]).abs(), weights=table["posts"]))


def temperature(truth: Sequence[str], answers: pd.DataFrame) -> float:
    """The temperature that makes the probabilities fit best (Guo et al. 2017): least log loss, between 0.05 and 20.

    Above 1 the model was too sure, below 1 not sure enough. Fit it on validation posts, apply it
    to test posts with `scaled`.
    """
    right, table = _with_shares(truth, answers)
    logs = np.log(np.clip(shares_of(table), FLOOR, 1))
    hot = right[:, None] == np.array(labels_of(table))[None, :]

    def loss(log_temperature: float) -> float:
        scaled = logs / np.exp(log_temperature)
        return float(np.mean(np.log(np.exp(scaled).sum(axis=1)) - scaled[hot]))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def scaled(answers: pd.DataFrame, temperature: float) -> pd.DataFrame:
    """The answers with probabilities at another temperature; the labels stay as they are. Raises `DataError` at ≤ 0."""
    if not temperature > 0:
        raise DataError(f"A temperature is greater than 0, not {temperature}.")
    names, table = labels_of(answers), answers.copy()
    powers = np.clip(answers[names].to_numpy(float), FLOOR, 1) ** (1 / temperature)
    table[names] = powers / powers.sum(axis=1, keepdims=True)
    table["probability"] = table[names].max(axis=1, skipna=False)
    return table


def abstention(truth: Sequence[str], answers: pd.DataFrame) -> pd.DataFrame:
    """What answering only when sure buys: for each `threshold` of confidence, `coverage` and `accuracy`.

    Coverage is the share of posts that are answered, the rest goes to a person; `accuracy` is
    that on the answered ones, with `low` and `high`; `errors` counts the wrong answers that get
    through. One row for each confidence that occurs, from all posts answered to the surest only.
    A notebook picks the threshold on validation posts and reads its price here.
    """
    confidence, right = _confidence(truth, answers)
    rows = []
    for threshold in np.unique(confidence):
        answered = confidence >= threshold
        rows.append([threshold, answered.mean(), *share(right[answered]), int((~right[answered]).sum())])
    return pd.DataFrame(rows, columns=["threshold", "coverage", "accuracy", "low", "high", "errors"])


def _confidence(truth: Sequence[str], answers: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Of each post: how sure the model was, and whether it was right."""
    right, table = _with_shares(truth, answers)
    shares_of(table)  # raises for a label without a probability
    return table["probability"].fillna(0).to_numpy(float), table["label"].to_numpy() == right


def _with_shares(truth: Sequence[str], answers: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    right, table = paired(truth, answers)
    if not labels_of(table):
        raise DataError("These answers carry no probabilities; use the table that labkit.classify returns.")
    return right, table
