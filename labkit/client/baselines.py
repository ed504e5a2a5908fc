"""The ladder: from the simplest rule to the fine-tuned model, all on the same posts.

A rung is a scikit-learn classifier over texts, or a `Prompted` language model.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import openai
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from labkit import pricing, tokens
from labkit.client.classify import classify
from labkit.client.evaluate import paired, share
from labkit.client.progress import Progress, each
from labkit.client.runs import digest, host, keep, kept, record
from labkit.errors import DataError, PriceError

CHUNK = 64  # texts between two saves
ALONE = 5  # texts sent one at a time to measure latency
EMBEDDED_AT_ONCE = 16  # texts of one embeddings request


class Prompted:
    """A rung that asks a language model: zero-shot, few-shot or fine-tuned, by its prompt alone.

    `prompt` makes a text into what is sent, a string or a list of chat messages; `options` go
    to every request, such as `logit_bias`. Every answer is kept under `LABKIT_HOME`.
    """

    def __init__(self, client: openai.OpenAI, model: str, prompt: Callable[[str], Any], **options: Any) -> None:
        self.client, self.model, self.prompt, self.options = client, model, prompt, options

    def answers(self, texts: Sequence[str], labels: Sequence[str],
                told: Callable[[int], None] = lambda done: None) -> pd.DataFrame:
        """The table of `labkit.classify` for `texts`; asks only what was not asked before. `told` hears of progress."""
        prompts = [self.prompt(text) for text in texts]
        where = host(self.client)
        keys = [digest(where, self.model, prompt, list(labels), self.options) for prompt in prompts]
        known = kept(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        for begin in range(0, len(missing), CHUNK):
            told(len(texts) - len(missing) + begin)
            some = missing[begin : begin + CHUNK]
            table = classify(self.client, self.model, [prompts[i] for i in some], labels, False, **self.options)
            # None, which JSON and the next classify agree on, where pandas writes NaN
            rows = table.astype({"label": object}).where(table.notna(), None).to_dict("records")
            fresh = dict(zip([keys[i] for i in some], rows, strict=True))
            keep(fresh)
            known |= fresh
        rows = pd.DataFrame([known[key] for key in keys])
        numbers = [name for name in rows.columns if name not in ("label", "answer")]
        return rows.astype(dict.fromkeys(numbers, float))

    def latency(self, texts: Sequence[str], labels: Sequence[str]) -> float:
        """Seconds that one request takes when it is alone: the median of five, each beginning with a word never sent
        before, so that no prompt cache helps beyond what all requests share."""
        key = digest("latency", host(self.client), self.model, [self.prompt(text) for text in texts[:ALONE]],
                     self.options)
        if not (known := kept([key])):
            fresh = [self.prompt(f"{secrets.token_hex(4)} {text}") for text in texts[:ALONE]]
            taken = [classify(self.client, self.model, [prompt], labels, False, **self.options)["seconds"][0]
                     for prompt in fresh]
            known = {key: float(np.median(taken))}
            keep(known)
        return known[key]


class Keywords(ClassifierMixin, BaseEstimator):
    """The label whose words occur most often in a text; on a tie or without any, the largest class."""

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        self.words = words

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> "Keywords":
        """Learns nothing but which class is the largest."""
        self.classes_ = np.unique(labels)
        self.largest_ = Counter(labels).most_common(1)[0][0]
        return self

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """One label a text."""
        return np.array([self._label(Counter(TfidfVectorizer().build_analyzer()(text))) for text in texts])

    def _label(self, found: Counter[str]) -> str:
        counts = Counter({label: sum(found[word.lower()] for word in words) for label, words in self.words.items()})
        (best, most), *others = counts.most_common()
        return self.largest_ if not most or any(count == most for _, count in others) else best


class Embeddings(TransformerMixin, BaseEstimator):
    """Texts to vectors through the SDK's `embeddings.create`; each is asked for once and kept."""

    def __init__(self, client: openai.OpenAI, model: str) -> None:
        self.client, self.model = client, model

    def fit(self, texts: Sequence[str], labels: Any = None) -> "Embeddings":
        """Nothing to learn."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """One row a text."""
        texts = list(texts)
        keys = [digest("embedding", host(self.client), self.model, text) for text in texts]
        known = kept(keys)
        missing = [(key, text) for key, text in dict(zip(keys, texts, strict=True)).items() if key not in known]
        groups = [missing[i : i + EMBEDDED_AT_ONCE] for i in range(0, len(missing), EMBEDDED_AT_ONCE)]

        def ask(group: list[tuple[str, str]]) -> dict[str, list[float]]:
            answer = self.client.embeddings.create(model=self.model, input=[text for _, text in group])
            vectors = {key: one.embedding for (key, _), one in zip(group, answer.data, strict=True)}
            keep(vectors)
            return vectors

        for vectors in each(ask, groups, "Embedding", len(groups) > 1):
            known |= vectors
        return np.array([known[key] for key in keys])


def majority() -> DummyClassifier:
    """Always the larger class: what any model must beat."""
    return DummyClassifier(strategy="most_frequent")


def tfidf() -> Pipeline:
    """TF-IDF and logistic regression: weighs words and draws a line. Trains in a second."""
    return make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))


def embedded(client: openai.OpenAI, model: str) -> Pipeline:
    """Logistic regression over a model's embeddings of the texts."""
    return make_pipeline(Embeddings(client, model), LogisticRegression(C=10, max_iter=1000))


def ladder(rungs: Mapping[str, Any], train: pd.DataFrame,
           test: pd.DataFrame, price_model: str | None = None) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Measure all rungs on the same posts; returns the table and each rung's answers by its name.

    `rungs` are scikit-learn classifiers and `Prompted` models under the names to show; `train`
    and `test` have the columns `text` and `label`. The table has one row a rung: `accuracy` with
    its interval `low` to `high`, `off_label` (share of answers that are no label),
    `prompt_tokens` a request, `latency_ms` of a single text, and with a `price_model` such as
    "gpt-4o-mini-2024-07-18" `usd_per_1000`, what a thousand such requests cost today at its
    provider (NaN for rungs that send none, and where the price is not known). Requests are kept as they are
    answered, so that a second call, or one after an interruption, asks only what is missing.
    Every rung is recorded for `labkit.runs()`. A notebook shows the table, `plots.ladder` of it,
    and `labkit.compare(test.label, answers)` for which differences are real.
    """
    for name, table in (("train", train), ("test", test)):
        if missing := {"text", "label"} - set(table.columns):
            raise DataError(f"The {name} table has no column {' and '.join(sorted(missing))}; it has "
                            f"{', '.join(map(str, table.columns))}.")
    labels = sorted(train["label"].unique())
    if len(labels) < 2:
        raise DataError(f"Training posts of at least two labels are needed, found {labels}.")
    paired(test["label"], test["label"])  # empty and missing labels are told of before anything is asked
    data = digest(train[["text", "label"]], test[["text", "label"]])
    rows, answers = {}, {}
    with Progress("Ladder") as bar:
        for place, (name, rung) in enumerate(rungs.items()):
            def told(done: int, place: int = place, name: str = name) -> None:
                bar.show((place + done / len(test)) / len(rungs), f"{name}: {done} of {len(test)} posts")

            told(0)
            answers[name], seconds = _climb(rung, train, test, labels, told)
            rows[name] = _measured(test["label"], answers[name], seconds)
            if price_model is not None:
                rows[name]["usd_per_1000"] = _usd_per_1000(rung, test["text"].tolist(), price_model)
            model = {"model": rung.model} if isinstance(rung, Prompted) else {}
            record("ladder", digest("ladder", name, model, data, answers[name]["label"].tolist()), name=name, data=data,
                   examples=len(train), posts=len(test), **model, **rows[name])
        bar.show(1)
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table, answers


def _climb(rung: Any, train: pd.DataFrame, test: pd.DataFrame, labels: list[str],
           told: Callable[[int], None]) -> tuple[pd.DataFrame, float]:
    """One rung's answers to all test posts, and the seconds for a single one."""
    texts = test["text"].tolist()
    if isinstance(rung, Prompted):
        return rung.answers(texts, labels, told), rung.latency(texts, labels)
    rung.fit(train["text"], train["label"])
    answers = pd.DataFrame({"label": pd.Series(rung.predict(texts), dtype=object)})
    if hasattr(rung, "predict_proba"):
        shares = rung.predict_proba(texts)
        answers["probability"] = shares.max(axis=1)
        answers[list(rung.classes_)] = shares
    alone = []
    for text in texts[:ALONE]:
        unseen = f"{secrets.token_hex(4)} {text}"  # embeddings are kept, too
        begin = time.perf_counter()
        rung.predict([unseen])
        alone.append(time.perf_counter() - begin)
    return answers, float(np.median(alone))


def _usd_per_1000(rung: Any, texts: list[str], price_model: str) -> float:
    """With the provider's own tokens, one of them as the answer; NaN where there is no price."""
    if not isinstance(rung, Prompted):
        return float("nan")
    prompts = [prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)
               for prompt in map(rung.prompt, texts)]
    mean = float(np.mean(tokens.count_many(prompts, price_model)))
    try:
        return 1000 * pricing.request_cost(price_model, mean, 1, fine_tuned=rung.model.startswith("ft:"))
    except PriceError:
        return float("nan")


def _measured(truth: pd.Series, answers: pd.DataFrame, seconds: float) -> dict[str, float]:
    right, table = paired(truth, answers)
    accuracy, low, high = share(table["label"].to_numpy() == right)
    length = float(table["prompt_tokens"].mean()) if "prompt_tokens" in table else float("nan")
    return {"accuracy": accuracy, "low": low, "high": high, "off_label": float(table["label"].isna().mean()),
            "prompt_tokens": length, "latency_ms": 1000 * seconds}
