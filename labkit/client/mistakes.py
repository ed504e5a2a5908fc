"""Look at what went wrong: the mistakes, their neighbours in training, labels to mend, and other styles."""

import random
from collections.abc import Callable
from os import PathLike
from typing import Any

import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from labkit.client.evaluate import compare, paired, share
from labkit.client.leakage import strip
from labkit.errors import DataError

NEW_LABEL = "new_label"


def mistakes(test: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The posts that were answered wrong, the surest first: `test`'s columns, `answer`, `probability` and `words`.

    `test` has `text` and `label`. A notebook reads the first few, then sorts by `words`, or
    counts by author: `.groupby("author").size()`.
    """
    right, table = paired(test["label"], answers)
    found = test.assign(answer=table["label"].to_numpy(), words=test["text"].str.split().str.len())
    found["probability"] = table["probability"].to_numpy() if "probability" in table else float("nan")
    return found[table["label"].to_numpy() != right].sort_values("probability", ascending=False)


def error_rate(test: pd.DataFrame, answers: pd.DataFrame, by: str, bins: int = 4) -> pd.DataFrame:
    """The share of wrong answers with its interval, for each value of a column, most posts first.

    A column of many different numbers is cut into `bins` of equally many posts; `by="words"` and
    `by="probability"` are always there. Columns: `posts`, `error_rate`, `low`, `high`.
    """
    right, table = paired(test["label"], answers)
    frame = test.reset_index(drop=True).assign(words=test["text"].str.split().str.len().to_numpy())
    frame["probability"] = table["probability"] if "probability" in table else float("nan")
    if by not in frame:
        raise DataError(f"There is no column {by!r}; there are {', '.join(map(str, frame.columns))}.")
    values = frame[by]
    numbers = pd.api.types.is_numeric_dtype(values) and values.nunique() > bins
    groups = pd.qcut(values, bins, duplicates="drop") if numbers else values
    wrong = pd.Series(table["label"].to_numpy() != right)
    rows = {name: [len(some), *share(some)] for name, some in wrong.groupby(groups, observed=True, sort=numbers)}
    result = pd.DataFrame.from_dict(rows, orient="index", columns=["posts", "error_rate", "low", "high"])
    return result if numbers else result.sort_values("posts", ascending=False, kind="stable")


def neighbours(train: pd.DataFrame, posts: pd.DataFrame, count: int = 3) -> pd.DataFrame:
    """The training posts nearest to each of `posts` by TF-IDF.

    Columns: `post` (its index), `rank`, `similarity` (cosine, 0 to 1), `label`, `text`. A notebook
    looks up its mistakes: a neighbour near 1 with the other label is a label to doubt; none
    above 0.2, a kind of post that training lacks.
    """
    if train.empty or posts.empty:
        raise DataError(f"There are {len(train)} training posts and {len(posts)} posts to look up; both need some.")
    words = TfidfVectorizer(sublinear_tf=True).fit(train["text"])
    index = NearestNeighbors(n_neighbors=min(count, len(train)), metric="cosine").fit(words.transform(train["text"]))
    distances, places = index.kneighbors(words.transform(posts["text"]))
    rows = [[post, rank, 1 - distance, train["label"].iloc[place], train["text"].iloc[place]]
            for post, row, found in zip(posts.index, distances, places, strict=True)
            for rank, (distance, place) in enumerate(zip(row, found, strict=True), 1)]
    return pd.DataFrame(rows, columns=["post", "rank", "similarity", "label", "text"])


def to_relabel(posts: pd.DataFrame, path: str | PathLike[str]) -> None:
    """Write posts as a CSV with an empty column `new_label`, to be filled in by hand in a spreadsheet or notebook.

    The first column is the row's index; leave it alone, `relabelled` finds the post by it.
    """
    posts.assign(**{NEW_LABEL: ""}).to_csv(path, index_label="row", encoding="utf-8-sig")  # Excel needs the mark


def relabelled(posts: pd.DataFrame, path: str | PathLike[str]) -> pd.DataFrame:
    """The posts with the labels that were filled in; "drop" as a new label removes the post.

    Raises `DataError` for a row that `posts` has not, or a label that none of the posts has.
    """
    table = pd.read_csv(path, encoding="utf-8-sig", dtype={NEW_LABEL: str})
    if missing := {"row", NEW_LABEL} - set(table.columns):
        raise DataError(f"{path} has no column {' and '.join(sorted(missing))}; write it with to_relabel().")
    new = table.set_index("row")[NEW_LABEL].dropna().str.strip()
    new = new[new != ""]
    if unknown := sorted(set(new) - set(posts["label"]) - {"drop"}):
        raise DataError(f"{path}: {unknown} are no labels here. Use {sorted(set(posts['label']))}, or \"drop\".")
    if strange := sorted(set(new.index) - set(posts.index)):
        raise DataError(f"{path}: rows {strange[:5]} are not among these posts. Pass the posts it was written from.")
    result = posts.copy()
    result.loc[new.index, "label"] = new
    return result[result["label"] != "drop"]


def typos(text: str, rate: float = 0.1, seed: int = 0) -> str:
    """The text with two neighbouring letters swapped in a share of its words."""
    chance = random.Random(f"{seed}{text}")
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and chance.random() < rate:
            at = chance.randrange(len(word) - 1)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def first_words(text: str, count: int = 30) -> str:
    """The text cut after its first words."""
    return " ".join(text.split(" ")[:count])


CHANGES: dict[str, Callable[[str], str]] = {
    "typos in a tenth of the words": typos, "first 30 words": first_words, "lower case": str.lower,
    "upper case": str.upper, "no header, quotes, footer": strip,
}


def robustness(rung: Any, test: pd.DataFrame,
               changes: dict[str, Callable[[str], str]] | None = None) -> pd.DataFrame:
    """How much worse a model gets when the posts are changed in ways that leave the label alone.

    `rung` is a `Prompted` model or a fitted scikit-learn classifier; `changes` maps names to
    functions from text to text, by default typos, truncation, case and stripping. One row each:
    `accuracy`, `low`, `high`, and the `difference` to the posts as they are, with McNemar's `p`.
    """
    labels = sorted(test["label"].unique())

    def answered(texts: list[str]) -> pd.DataFrame:
        if hasattr(rung, "answers"):
            return rung.answers(texts, labels)
        return pd.DataFrame({"label": pd.Series(rung.predict(texts), dtype=object)})

    plain, rows = answered(test["text"].tolist()), {}
    right = test["label"].to_numpy()
    rows["as they are"] = [*share(plain["label"].to_numpy() == right), 0.0, 1.0]
    for name, change in (CHANGES if changes is None else changes).items():
        changed = answered([change(text) for text in test["text"]])
        pair = compare(right, {"changed": changed, "plain": plain}).iloc[0]
        rows[name] = [*share(changed["label"].to_numpy() == right), pair["difference"], pair["p"]]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["accuracy", "low", "high", "difference", "p"])
