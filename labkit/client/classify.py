"""Use a model as a classifier: many requests at once, labels with probabilities."""

import math
import time
from collections.abc import Sequence
from typing import Any

import openai
import pandas as pd

from labkit.client.progress import each
from labkit.errors import DataError


def classify(
    client: openai.OpenAI,
    model: str,
    texts: Sequence[str] | Sequence[list[dict[str, str]]],
    labels: Sequence[str],
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Ask `model` for one token after each text and read which label it begins.

    `texts` are prompts as the model was trained on them (separator included), or lists of chat
    messages. One row per text, in order: `label` (None when the most likely tokens begin none of
    the labels: off-label, never guessed), `probability` (of that label among `labels`), one
    column per label with its share, `answer` (the token itself), `on_label` (how much of the
    probability fell on labels at all), `prompt_tokens`, `cached_tokens` and `seconds`. `options`
    go to every request, such as `logit_bias`.

    Raises `DataError` when two labels cannot be told apart by their first token, and the SDK's
    own errors when a request fails.
    """
    names = list(labels)
    if len(set(names)) < 2:
        raise DataError(f"Need at least two different labels, got {names}.")

    def ask(text: Any) -> dict[str, Any]:
        begin = time.perf_counter()
        row = _ask(client, model, text, names, options)
        return {**row, "seconds": time.perf_counter() - begin}

    rows = each(ask, texts, "Classifying", progress)
    columns = ["label", "probability", *names, "on_label", "answer", "prompt_tokens", "cached_tokens", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def _ask(client: openai.OpenAI, model: str, text: Any, labels: list[str], options: dict[str, Any]) -> dict[str, Any]:
    if isinstance(text, str):
        completion = client.completions.create(
            model=model, prompt=text, max_tokens=1, temperature=0, logprobs=5, **options
        )
        scores = completion.choices[0].logprobs
        top = dict(scores.top_logprobs[0]) if scores and scores.top_logprobs else {}
        return _row(completion.choices[0].text, top, labels, completion.usage)
    chat = client.chat.completions.create(
        model=model, messages=text, max_completion_tokens=1, temperature=0, logprobs=True, top_logprobs=5, **options
    )
    content = chat.choices[0].logprobs
    top = {t.token: t.logprob for t in content.content[0].top_logprobs} if content and content.content else {}
    return _row(chat.choices[0].message.content or "", top, labels, chat.usage)


def _row(answer: str, top: dict[str, float], labels: list[str], usage: Any) -> dict[str, Any]:
    mass = dict.fromkeys(labels, 0.0)
    for token, logprob in top.items():
        if begun := [label for label in labels if token.strip() and label.startswith(token.strip())]:
            if len(begun) > 1:
                raise DataError(f"The labels {begun} begin with the same token {token!r}; rename one of them.")
            mass[begun[0]] += math.exp(logprob)
    total = sum(mass.values())
    best = max(labels, key=lambda label: mass[label])
    details = usage.prompt_tokens_details
    return {
        "label": best if total > 0 else None,
        "probability": mass[best] / total if total > 0 else float("nan"),
        **{label: share / total if total > 0 else float("nan") for label, share in mass.items()},
        "on_label": total,
        "answer": answer,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": details.cached_tokens if details and details.cached_tokens else 0,
    }
