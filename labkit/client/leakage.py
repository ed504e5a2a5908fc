"""What test posts share with training posts, how to take it out of them, and splits that prevent it."""

import re
from email.parser import HeaderParser
from typing import Any

import pandas as pd
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from labkit.errors import DataError

HEADER = re.compile(r"\A\s*[A-Za-z-]+: ")  # a post that begins with a header line
QUOTED = re.compile(r"^\s*[>|]|(wr[io]tes?|said|says?):\s*$|^in article\b", re.IGNORECASE)
RULE = re.compile(r"^\s*[-=_*~]{2,}\s*$")  # the line above a signature
SIGNATURE_LINES = 8


def fields(posts: pd.DataFrame) -> pd.DataFrame:
    """The posts with what their headers give away as columns: `thread` and `organization`, lower-case, NaN if absent.

    The thread is the subject without "Re:". A notebook passes the result to `overlap`.
    """
    heads: list[Any] = [HeaderParser().parsestr(text.lstrip()) if HEADER.match(text) else {} for text in posts["text"]]
    subject, organization = (
        pd.Series([str(head[name]) if name in head else None for head in heads], index=posts.index, dtype=object)
        for name in ("Subject", "Organization"))
    thread = subject.str.replace(r"^(\s*re(\[\d+\])?:)+", "", case=False, regex=True).str.strip().str.lower()
    return posts.assign(thread=thread, organization=organization.str.strip().str.lower())


def overlap(train: pd.DataFrame, test: pd.DataFrame,
            columns: tuple[str, ...] = ("author", "thread", "organization", "text")) -> pd.DataFrame:
    """What a lookup table would know: one row for each column, such as the author.

    `shared` is the share of test posts whose value occurs in training, `lookup_accuracy` how
    often the value's most frequent training label is right on those, `posts` their number. A
    notebook shows with it that the author alone nearly decides the label. Columns that a table
    lacks, or that hold nothing, are left out. Raises `DataError` when none is left.
    """
    rows = {}
    for column in columns:
        if column not in train or column not in test or train[column].isna().all():
            continue
        usual = train.dropna(subset=[column]).groupby(column)["label"].agg(lambda labels: labels.mode()[0])
        known = test[test[column].isin(usual.index)]
        right = known["label"].to_numpy() == known[column].map(usual).to_numpy()
        rows[column] = {"shared": len(known) / len(test) if len(test) else float("nan"),
                        "lookup_accuracy": right.mean() if len(known) else float("nan"), "posts": len(known)}
    if not rows:
        raise DataError(f"Neither table has a filled column of {', '.join(columns)}; leakage.fields(posts) adds some.")
    return pd.DataFrame.from_dict(rows, orient="index")


def strip(text: str, headers: bool = True, quotes: bool = True, footers: bool = True) -> str:
    """A post without its header, the lines it quotes, and its signature: what its author wrote about the matter.

    The rules are those of scikit-learn's `fetch_20newsgroups(remove=…)`, for posts already
    fetched, but nothing is taken for a header or signature that does not look like one.
    """
    if headers and HEADER.match(text):
        text = text.lstrip().partition("\n\n")[2]
    lines = text.split("\n")
    if quotes:
        lines = [line for line in lines if not QUOTED.search(line)]
    if footers:
        lines = _without_signature(lines)
    return "\n".join(lines).strip()


def _without_signature(lines: list[str]) -> list[str]:
    """Cut at the last rule or blank line, if little follows it and something stands before."""
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    for place in range(len(lines) - 1, max(0, len(lines) - 1 - SIGNATURE_LINES), -1):
        if RULE.match(lines[place]) or not lines[place].strip():
            return lines[:place] if any(line.strip() for line in lines[:place]) else lines
    return lines


def split(posts: pd.DataFrame, by: str = "random", share: float = 0.2,
          seed: int = 42) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and held-out posts: `by` "random" (labels in proportion), "author" (no author on both sides), or "date".

    By date the official split column is used: all test posts are younger than all training
    posts. Otherwise a `share` is held out of the posts given. Raises `DataError` when a post
    names no author, or there is nothing to split.
    """
    if by == "date":
        if "split" not in posts or set(posts["split"]) != {"train", "test"}:
            raise DataError("By date needs a column \"split\" of \"train\" and \"test\", as labkit.posts() has.")
        older, younger = posts["split"] == "train", posts["split"] == "test"
        return posts[older].reset_index(drop=True), posts[younger].reset_index(drop=True)
    if len(posts) < 4:
        raise DataError(f"{len(posts)} posts are too few to hold some out.")
    if by == "random":
        few = posts["label"].value_counts().min() < 2
        train, test = train_test_split(posts, test_size=share, random_state=seed,
                                       stratify=None if few else posts["label"])
    elif by == "author":
        if "author" not in posts or posts["author"].isna().any():
            raise DataError("Not every post names its author. Drop those posts: posts.dropna(subset=[\"author\"]).")
        chosen = GroupShuffleSplit(1, test_size=share, random_state=seed).split(posts, groups=posts["author"])
        train, test = (posts.iloc[rows] for rows in next(chosen))
    else:
        raise DataError(f"Posts are split by \"random\", \"author\" or \"date\", not {by!r}.")
    return train.reset_index(drop=True), test.reset_index(drop=True)
