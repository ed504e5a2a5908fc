"""The checks of notebook 04, train."""

import math
import random
from typing import Any

from labkit.examples import auto_epochs
from labkit.lessons.exercises import call, exercise, same


@exercise("04.1", "Steps", level=1, hints=(
    "One epoch first: how many batches does it take to see every example?",
    "17 examples in batches of 16 are two batches: round up.",
    "math.ceil(examples / batch_size), once for each epoch.",
))
def steps(answer: Any) -> None:
    """A function of examples, batch size and epochs: the steps of a job."""
    for examples, size in [(32, 16), (33, 16), (10, 16), *((random.randint(10, 2000), random.randint(2, 64))
                                                         for _ in range(4))]:
        epochs = random.randint(2, 6)
        same(call(answer, examples, size, epochs), math.ceil(examples / size) * epochs,
             f"{examples} examples, batches of {size} and {epochs} epochs")


@exercise("04.2", "Perplexity", level=1, hints=(
    "The loss is the mean surprise; a token's surprise is minus its log-probability.",
    "Perplexity is exp(loss). Mind the sign: it is never below 1.",
    "math.exp(-sum(logprobs) / len(logprobs)).",
))
def perplexity(answer: Any) -> None:
    """A function of log-probabilities: the perplexity."""
    for length in (1, 3, 20):
        logprobs = [math.log(random.uniform(0.01, 0.99)) for _ in range(length)]
        same(call(answer, logprobs), math.exp(-sum(logprobs) / length),
             f"the log-probabilities {[round(value, 3) for value in logprobs]}")


@exercise("04.3", "Automatic epochs", level=2, hints=(
    "Three cases: tiny, ordinary, huge. Which one is it? Compare examples * 3 with the two bounds.",
    "Without remainder is // in Python.",
    "min(25, …) for tiny sets, max(1, …) for huge ones, 3 for the rest.",
))
def epochs(answer: Any) -> None:
    """A function of the number of examples: the epochs of OpenAI's published rule."""
    for examples in (10, 33, 34, 8_333, 8_334, 25_001, *(random.randint(10, 33) for _ in range(3)),
                     random.randint(100, 5_000), random.randint(9_000, 24_000)):
        same(call(answer, examples), auto_epochs(examples), f"{examples:,} examples")


@exercise("04.4", "Choose a checkpoint", level=2, hints=(
    "Which of the two losses tells how the model does on posts that it has not learned from?",
    "The least validation loss; its step, not its place in the list.",
    "min(checkpoints, key=lambda c: (c[2], c[0]))[0]: the second key decides between level ones.",
))
def checkpoint(answer: Any) -> None:
    """A function of (step, training loss, validation loss) rows: the step of the best checkpoint."""
    for level in (False, True) * 3:
        steps = random.sample(range(10, 400), 4)
        training = sorted((random.uniform(0.01, 1) for _ in steps), reverse=True)
        rows = [(step, round(loss, 3), round(random.uniform(0.2, 1.2), 3))
                for step, loss in zip(sorted(steps), training, strict=True)]
        best, later = sorted(random.sample(range(4), 2))
        rows[best] = (*rows[best][:2], 0.1)
        if level:
            rows[later] = (*rows[later][:2], 0.1)
        random.shuffle(rows)
        same(call(answer, list(rows)), min(rows, key=lambda row: (row[2], row[0]))[0], f"the checkpoints {rows}")


@exercise("04.5", "The loss mask", level=3, hints=(
    "Write down a prompt of 2 tokens and a completion of 2: tokens 0 1 | 2 3. There are three losses; which are ours?",
    "The last token of the prompt predicts the first of the completion. That loss counts.",
    "losses[prompt_length - 1:] are the completion's; take their mean.",
))
def masked(answer: Any) -> None:
    """A function of an example's losses and its prompt's length: the mean loss on the completion."""
    for prompt, completion in zip(range(1, 7), random.sample((1, 1, 2, 2, 3, 4), 6), strict=True):
        losses = [round(random.uniform(0, 5), 2) for _ in range(prompt + completion - 1)]
        wanted = losses[prompt - 1:]
        same(call(answer, list(losses), prompt), sum(wanted) / len(wanted),
             f"the losses {losses} and a prompt of {prompt} tokens")
