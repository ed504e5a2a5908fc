"""The checks of notebook 02, pricing."""

import math
import random
from typing import Any

from labkit.lessons.exercises import call, exercise, same
from labkit.pricing import CACHE_MINIMUM, break_even


@exercise("02.1", "The price of a training run", level=1, hints=(
    "Every epoch reads the whole file once more, and is billed again.",
    "The price is for 1,000,000 tokens: divide by that.",
    "price * tokens * epochs / 1_000_000, not rounded.",
))
def training_usd(answer: Any) -> None:
    """A function of a price per million tokens, tokens and epochs: US dollars."""
    for _ in range(5):
        price, tokens, epochs = random.choice([0.4, 3, 8, 25]), random.randint(20_000, 900_000), random.randint(2, 9)
        same(call(answer, price, tokens, epochs), price * tokens * epochs / 1e6,
             f"{tokens:,} tokens, {epochs} epochs and a price of {price}")


@exercise("02.2", "Cheaper to use", level=1, hints=(
    "What does each of the two requests cost? Tokens times the price of a token.",
    "Compare the two costs; neither the tokens nor the prices decide alone.",
    "return alone * tuned < few_shot * base, which is True or False by itself.",
))
def cheaper(answer: Any) -> None:
    """A function of both requests' tokens and both prices of a token: whether the fine-tuned request costs less."""
    cases = [(800, 100, 2, 16), (800, 100, 2, 17), (800, 100, 2, 12), (300, 100, 5, 4)]  # level, dearer, cheaper, both
    for _ in range(6):
        alone, base = random.randint(50, 200), random.randint(2, 9)
        cases.append((alone * random.randint(2, 8), alone, base, base * random.randint(2, 8)))
    for few, alone, base, tuned in random.sample(cases, len(cases)):
        same(call(answer, few, alone, base, tuned), alone * tuned < few * base,
             f"{few} tokens at {base} against {alone} at {tuned}")


@exercise("02.3", "Break-even", level=2, hints=(
    "How much does one request save? Training is paid when the savings reach its cost.",
    'If a request saves nothing, or costs more than before, it never pays: float("inf").',
    "Half a request does not exist: round up, with math.ceil.",
))
def pays_after(answer: Any) -> None:
    """A function of training cost and cost of a request before and after: whole requests, or infinity."""
    cases = [(10.0, 0.5, 0.25), (10.0, 0.5, 0.125), (10.0, 0.25, 0.25), (3.0, 0.25, 0.5)]  # exact, not, level, dearer
    for _ in range(5):
        after = random.randint(1, 40) / 1024  # differences of these are exact, so that rounding up is no matter of luck
        cases.append((float(random.randint(1, 30)), after + random.randint(1, 40) / 1024, after))
    for training, before, after in cases:
        right = break_even(training, before, after)
        same(call(answer, training, before, after), math.inf if right is None else right,
             f"training at {training} USD, requests at {before:.6f} before and {after:.6f} after", tolerance=1e-9)


@exercise("02.4", "Cached tokens", level=2, hints=(
    "Cached tokens are part of the prompt: they cost the cached price instead of the full one, not on top of it.",
    "prompt - cached tokens at the full price, cached ones at theirs, the output at its own; divide by 1,000,000.",
    "If prompt is less than 1024, set cached to 0 first.",
))
def with_cache(answer: Any) -> None:
    """A function of prompt, cached and output tokens and their three prices per million: US dollars."""
    sizes = [CACHE_MINIMUM - 1, CACHE_MINIMUM, random.randint(200, 1000), *(random.randint(1100, 9000) for _ in "123")]
    for prompt in sizes:
        cached, output = random.randint(prompt // 4, prompt - 20), random.randint(500, 5000)
        prices = (1.0, random.choice([0.1, 0.25, 0.5]), random.choice([3.0, 4.0]))
        counts = cached if prompt >= CACHE_MINIMUM else 0
        right = ((prompt - counts) * prices[0] + counts * prices[1] + output * prices[2]) / 1e6
        same(call(answer, prompt, cached, output, *prices), right, tolerance=1e-9,
             case=f"a prompt of {prompt} tokens, {cached} cached, {output} of output, and the prices {prices}")


@exercise("02.5", "How long it lives", level=3, hints=(
    "First leave out what does not live long enough: days_left must be at least days.",
    "An offer costs training + use * prompt * per_day * days / 1_000_000.",
    'min(costs, key=costs.get, default="none") names the cheapest of a dictionary {name: cost}.',
))
def offer(answer: Any) -> None:
    """A function of {name: (training, use, days left)}, prompt, requests a day and days: the best offer's name."""
    names = ["mini", "nano", "old", "open"]
    for trial in range(12):
        prompt, per_day, days = random.randint(100, 400), random.randint(500, 4000), random.randint(30, 300)
        lives = [days, *(random.randint(1, 2 * days) for _ in names[1:])]
        if trial % 4 == 0:
            lives = [random.randint(1, days - 1) for _ in names]
        prices = [(round(random.uniform(1, 60), 2), round(random.uniform(0.1, 3), 2)) for _ in names]
        if trial % 4 == 1:  # the cheapest to train on is the dearest in all
            prompt, per_day, days, lives = 400, 4000, 300, [300] * 4
            prices = list(zip(sorted(random.sample(range(1, 60), 4)), (4, 3, 2, 1), strict=True))
        offers = {name: (*price, life)
                  for name, price, life in zip(random.sample(names, 4), prices, lives, strict=True)}
        costs = {name: training + use * prompt * per_day * days / 1e6
                 for name, (training, use, life) in offers.items() if life >= days}
        best = min(costs, key=lambda name: costs[name], default="none")
        same(call(answer, dict(offers), prompt, per_day, days), best,
             f"{offers}, prompts of {prompt} tokens, {per_day} a day for {days} days")
