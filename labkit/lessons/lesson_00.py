"""The checks of notebook 00, start here."""

import math
import random
from typing import Any

from labkit import tokens
from labkit.lessons.exercises import Wrong, call, exercise, same


@exercise("00.1", "Ask the model", level=1, hints=(
    "Copy the call for France and change the prompt; keep max_tokens=1 and temperature=0.",
    'The prompt is "The capital of Italy is", without a space at its end.',
    "Assign the whole object that client.completions.create returns to `answer`, not its text.",
))
def ask(answer: Any) -> None:
    """A completion object: the right prompt, by its number of tokens, one token of answer, and Rome."""
    try:
        text, usage = answer.choices[0].text, answer.usage
    except (AttributeError, IndexError, TypeError):
        raise Wrong(f"The object that the SDK returned is wanted, not {answer!r:.60}.") from None
    same(usage.prompt_tokens, tokens.count("The capital of Italy is"), "the number of prompt tokens")
    same(usage.completion_tokens, 1, "the number of completion tokens")
    same(text.strip(), "Rome", "the capital of Italy")


@exercise("00.2", "Count tokens", level=2, hints=(
    "A token is not a word: rare words and names take several.",
    "labkit.tokens.count(text) counts them; the cell above uses it.",
    "Divide the number of tokens by the number of words; text.split() gives the words.",
))
def tokens_per_word(answer: Any) -> None:
    """A function of a text: tokens over words, on texts put together at random."""
    words = ["ice", "the", "goalkeeper", "unforgettable", "Zamboni", "innings", "42", "extraordinarily", "and"]
    for _ in range(5):
        text = " ".join(random.choices(words, k=random.randint(3, 12)))
        same(call(answer, text), tokens.count(text) / len(text.split()), f"the text {text!r}")


@exercise("00.3", "From log-probabilities to probabilities", level=3, hints=(
    "The API gives natural logarithms; math.exp undoes them.",
    "Keep the keys, and turn each value: {token: math.exp(logprob) for …}.",
    "Divide each by the sum of all, so that those listed add up to 1.",
))
def shares(answer: Any) -> None:
    """A function of {token: log-probability}: {token: share}, the shares adding up to 1."""
    for size in (2, 3, 5):
        weights = [random.uniform(0.01, 0.19) for _ in range(size)]
        names = random.sample([" Rome", " Paris", " the", " a", " Milan", " Naples"], size)
        given = {name: math.log(weight) for name, weight in zip(names, weights, strict=True)}
        found = call(answer, given)
        if not isinstance(found, dict) or set(found) != set(given):
            raise Wrong(f"A dictionary with the keys {list(given)} is wanted, not {found!r:.80}.")
        for name, weight in zip(names, weights, strict=True):
            same(found[name], weight / sum(weights), f"{name!r} among {list(given)}")
