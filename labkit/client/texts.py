"""How good is what a language model writes? Perplexity, scores of free text, and a model as the judge."""

import json
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import openai
import pandas as pd

from labkit.client.classify import classify
from labkit.client.progress import each
from labkit.errors import DataError


def perplexity(client: openai.OpenAI, model: str, prompts: Sequence[str], completions: Sequence[str]) -> pd.DataFrame:
    """How surprised a model is by the right completions: `tokens` and `loss` (nats per token), one row each.

    `.attrs["perplexity"]` is that of all tokens together, e to the mean loss. Needs a completions
    endpoint with `echo`, which the local service has and chat-only models have not. A notebook
    sets the base model beside the fine-tuned one.
    """
    if not len(prompts) or len(prompts) != len(completions):
        raise DataError(f"As many prompts as completions are needed, got {len(prompts)} and {len(completions)}.")

    def ask(pair: tuple[str, str]) -> dict[str, float]:
        scores = client.completions.create(model=model, prompt=pair[0] + pair[1], max_tokens=0, echo=True,
                                           logprobs=0, temperature=0).choices[0].logprobs
        starts, found = (scores.text_offset or [], scores.token_logprobs or []) if scores else ([], [])
        own = [value for start, value in zip(starts, found, strict=True) if start >= len(pair[0]) and value is not None]
        if not own:
            raise DataError(f"The service gave no log-probabilities for the completion {pair[1]!r}.")
        return {"tokens": len(own), "loss": -float(np.mean(own))}

    table = pd.DataFrame(each(ask, list(zip(prompts, completions, strict=True)), "Measuring"))
    table.attrs["perplexity"] = float(np.exp(np.average(table["loss"], weights=table["tokens"])))
    return table


def text_scores(truth: Sequence[str], answers: Sequence[str]) -> pd.DataFrame:
    """Scores of free text against one right answer each: `exact`, `token_f1`, `rouge_l`, `json_valid`, 0 to 1.

    Words are compared in lower case without punctuation. `token_f1` is SQuAD's (Rajpurkar et al.
    2016): overlap of words, order ignored. `rouge_l` is the F1 of the longest common subsequence
    (Lin 2004). `json_valid` tells whether the answer is JSON at all, whatever it says. A notebook
    shows `.mean()`, then the rows where the scores disagree with the reader.
    """
    if not len(truth) or len(truth) != len(answers):
        raise DataError(f"As many right answers as answers are needed, got {len(truth)} and {len(answers)}.")
    rows = []
    for right, given in zip(truth, answers, strict=True):
        wanted, found = (re.findall(r"\w+", text.lower()) for text in (right, given))
        common = sum((Counter(wanted) & Counter(found)).values())
        rows.append({"exact": float(wanted == found and (bool(wanted) or right.strip() == given.strip())),
                     "token_f1": _f1(common, wanted, found), "rouge_l": _f1(_longest(wanted, found), wanted, found),
                     "json_valid": float(_is_json(given))})
    return pd.DataFrame(rows)


def judge(client: openai.OpenAI, model: str, questions: Sequence[str], answers: Sequence[str],
          references: Sequence[str], criterion: str = "says the same as the reference") -> pd.DataFrame:
    """Ask a model whether each answer meets a criterion: a table of `labkit.classify` for "yes" and "no".

    The column `yes` is the judge's probability, which says more than its word. Any chat model
    behind the SDK can judge; one as small as the local one is a poor judge, so a notebook first
    measures the judge on answers it knows to be right and wrong.
    """
    if not len(questions) == len(answers) == len(references):
        raise DataError(f"Got {len(questions)} questions, {len(answers)} answers and {len(references)} references.")
    asked = [[{"role": "system", "content": f"You grade answers. Say yes if the answer {criterion}, else no."},
              {"role": "user", "content": f"Question: {question}\nReference: {reference}\nAnswer: {answer}\n\n"
                                          f"Does the answer meet the criterion, yes or no?"}]
             for question, answer, reference in zip(questions, answers, references, strict=True)]
    return classify(client, model, asked, ["yes", "no"])


def _f1(common: int, wanted: list[str], found: list[str]) -> float:
    return 2 * common / (len(wanted) + len(found)) if wanted or found else 1.0


def _longest(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if word == other else max(before[place + 1], row[-1]))
    return row[-1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
