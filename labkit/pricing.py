"""What fine-tuning costs: prices by model and date, jobs, workloads, break-even, and who may still start a job.

    price("ada", "training", "2023-03-01").usd            0.4 (USD per 1M tokens)
    training_cost("gpt-4o-mini", tokens=100_000, epochs=3)
    request_cost("gpt-4o-mini", prompt=400, output=2, cached=0, fine_tuned=True, batch=False)
    compare("train.jsonl", ["gpt-4o-mini", "gpt-6-luna"], requests=100_000)       a DataFrame

Every number comes from data/prices.csv and data/availability.csv, with its source and confidence
(data/README.md names the sources). A price that is not known raises `PriceError`; it is never zero.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import examples, paths, tokens
from labkit.errors import DataError, PriceError

if TYPE_CHECKING:
    import pandas as pd

Day = date | str | None  # a date, "YYYY-MM-DD", or None for today
SHOTS = 4  # examples in a few-shot prompt, as in the lab
CACHE_MINIMUM = 1024  # tokens; shorter prompts get no cached price (docs.litellm.ai, prompt caching, October 2026)
# The local service's own cost. One forward pass over the prompts takes 2 floating-point operations a parameter and
# token; the adapter's steps cost about 6 GFLOP an example and epoch (README of the engine: 0.07 to 0.1 s
# a step of 16 examples at 950 GFLOPS). Within a factor of two on other machines.
PARAMETERS, STEP_FLOP = 135e6, 6e9
WATTS = 45.0  # assumption: a laptop at full load, the thermal design power of common laptop processors
USD_PER_KWH = 0.17  # assumption: US households, EIA February 2025 (chooseenergy.com: 17.01 cents)


@dataclass(frozen=True)
class Price:
    """One row of data/prices.csv: `usd` per `unit` from `since` until the day before `until`; None: not known."""

    model: str
    kind: str
    unit: str
    usd: float | None
    since: date
    until: date | None
    source: str
    confidence: str
    review: date | None


@dataclass(frozen=True)
class Availability:
    """One row of data/availability.csv: `who` can start a job from `since` until the day before `until`."""

    model: str
    who: str
    since: date
    until: date | None
    base_off: date | None
    fine_tuned_off: date | None
    source: str
    confidence: str
    review: date | None


@dataclass(frozen=True)
class FileTokens:
    """A training file in tokens: of the whole file (one epoch), and of the average example."""

    examples: int
    tokens: int
    prompt: float
    completion: float


def today() -> date:
    """The day whose prices count where none is given."""
    return date.today()


def day(on: Day = None) -> date:
    """`on` as a date. Raises `PriceError` for text that is no date."""
    try:
        return on if isinstance(on, date) else date.fromisoformat(on) if on else today()
    except ValueError:
        raise PriceError(f"{on!r} is no date; write YYYY-MM-DD, such as 2023-03-01.") from None


@lru_cache(maxsize=1)
def prices() -> tuple[Price, ...]:
    """All rows of data/prices.csv."""
    return tuple(
        Price(row["model"], row["kind"], row["unit"], float(row["usd"]) if row["usd"] else None,
              date.fromisoformat(row["since"]), _date(row["until"]), row["source"], row["confidence"],
              _date(row["review"]))
        for row in _read("prices.csv"))


@lru_cache(maxsize=1)
def availabilities() -> tuple[Availability, ...]:
    """All rows of data/availability.csv."""
    return tuple(
        Availability(row["model"], row["who"], date.fromisoformat(row["since"]), _date(row["until"]),
                     _date(row["base_off"]), _date(row["fine_tuned_off"]), row["source"], row["confidence"],
                     _date(row["review"]))
        for row in _read("availability.csv"))


def price(model: str, kind: str, on: Day = None) -> Price:
    """The price of a model on a day (default: today), whose `usd` is known.

    `kind` is "training", "base input", "base cached", "base output", the same with "fine-tuned",
    or with "batch" ("fine-tuned batch input"). `model` may leave out the snapshot's date
    ("gpt-4o-mini") where all snapshots cost the same. Raises `PriceError`, saying what is known.
    """
    when = day(on)
    rows = [row for row in prices() if is_model(row.model, model) and row.kind == kind]
    found = [row for row in rows if row.since <= when and (row.until is None or when < row.until)]
    if not found:
        raise PriceError(_why_not(model, kind, when, rows))
    if unknown := [row for row in found if row.usd is None]:
        raise PriceError(f"The {kind} price of {unknown[0].model} is not known ({unknown[0].source}).")
    if len({(row.usd, row.unit) for row in found}) > 1:
        names = ", ".join(f"{row.model} ({row.usd:g})" for row in found)
        raise PriceError(f"The {kind} price differs between the models called {model}; name one of {names}.")
    return found[0]


def availability(model: str, on: Day = None) -> Availability | None:
    """Who can start a fine-tuning job on a day, and when the base ends; None if nobody can, or it is not known."""
    when = day(on)
    return next((row for row in availabilities()
                 if is_model(row.model, model) and row.since <= when and (row.until is None or when < row.until)), None)


def training_cost(model: str, tokens: int, epochs: int = 1, on: Day = None, hours: float | None = None) -> float:
    """USD of a training run: price x tokens of the file x epochs; validation tokens are free (OpenAI guide, 2023).

    For models that bill by the hour (o4-mini), `hours` of the training loop. Raises `PriceError`.
    """
    rate = price(model, "training", on)
    assert rate.usd is not None
    if rate.unit == "hour":
        if hours is None:
            raise PriceError(f"{rate.model} is billed by the hour ({rate.usd:g} USD), and how long the training takes "
                             "is not known before. Give hours=… to see what a number of hours costs.")
        return rate.usd * hours
    return rate.usd * tokens * epochs / 1e6


def request_cost(model: str, prompt: float, output: float, *, cached: float = 0, fine_tuned: bool = False,
                 batch: bool = False, on: Day = None) -> float:
    """USD of one request of `prompt` tokens, `cached` of them read from the cache, and `output` tokens.

    Models without a cached price bill cached tokens in full. Within a batch no cached price is
    assumed, as sources disagree on it. Raises `PriceError`, `ValueError` if more is cached than asked.
    """
    if not 0 <= cached <= prompt:
        raise ValueError(f"cached={cached} must be between 0 and prompt={prompt}")
    what = f"{'fine-tuned' if fine_tuned else 'base'}{' batch' if batch else ''}"
    into, out = price(model, f"{what} input", on).usd, price(model, f"{what} output", on).usd
    assert into is not None and out is not None
    saved = 0.0
    if cached and not batch and any(is_model(row.model, model) and row.kind == f"{what} cached" for row in prices()):
        rate = price(model, f"{what} cached", on).usd
        assert rate is not None
        saved = cached * (into - rate)
    return (prompt * into + output * out - saved) / 1e6


def break_even(training: float, before: float, after: float) -> int | None:
    """The number of requests from which training pays for itself; None if a request gets no cheaper.

    `training` in USD; `before` and `after` are USD a request without and with the fine-tuned model.
    """
    needed = training / (before - after) if before > after else math.inf
    return None if math.isinf(needed) else math.ceil(needed)


def local_cost(seconds: float, watts: float = WATTS, usd_per_kwh: float = USD_PER_KWH) -> float:
    """USD of electricity; both defaults are assumptions about a laptop in a US household. Put in your own."""
    return seconds * watts / 3.6e6 * usd_per_kwh


def local_seconds(file: FileTokens, epochs: int, flops: float) -> float:
    """A rough estimate of training on the local service, at `flops` floating-point operations a second."""
    return (2 * PARAMETERS * file.tokens + STEP_FLOP * file.examples * epochs) / flops


def measure(file: Path | str | bytes, model: str | None = None) -> FileTokens:
    """Count a training file as `model` does. Raises `DataError` when the file cannot be trained on."""
    report = examples.check(Path(file) if isinstance(file, str) else file)
    if report.problems:
        raise DataError(f"The file cannot be trained on, so it has no price. {report}")
    counted = [tokens.count_example(example, model) for example in report.examples]
    number = len(counted)
    prompt, completion = (sum(pair[i] for pair in counted) for i in (0, 1))
    return FileTokens(number, prompt + completion, prompt / number, completion / number)


def tunable(on: Day = None) -> list[str]:
    """The models of OpenAI that have a known training price on a day, cheapest first."""
    when = day(on)
    rows = [row for row in prices() if row.kind == "training" and row.usd is not None and row.unit == "1M tokens"
            and "/" not in row.model and row.since <= when and (row.until is None or when < row.until)]
    return [row.model for row in sorted(rows, key=lambda row: row.usd or 0)]


def compare(file: Path | str | bytes, models: Sequence[str] | None = None, on: Day = None,
            epochs: int | None = None, requests: int = 10_000) -> "pd.DataFrame":
    """What a task costs on several models: zero-shot, few-shot and fine-tuned. Unknown is missing, with the reason.

    The file's prompts are the requests. A few-shot prompt has 4 whole examples of the file before
    each; they are the same each time, so they are cached where the model caches. Columns:
    `model`, `approach`, `prompt_tokens`, `output_tokens`, `training_usd`, `usd_per_1000` requests,
    `usd_per_1000_batch`, `total_usd` for `requests`, `break_even` (requests until the fine-tuned
    model is cheaper than few-shot with its own base; missing if never), `who` can start a job,
    `base_off`, `note`. `models` default to all that can be trained on that day, and gpt-6-luna;
    `epochs` to the `auto` rule. Raises `DataError`, `LabkitError`.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    by_encoding: dict[str, FileTokens] = {}
    for model in models or [*tunable(on), *(["gpt-6-luna"] if day(on) >= date(2026, 9, 22) else [])]:
        encoding = tokens.encoding_of(model)
        counted = by_encoding.setdefault(encoding, by_encoding.get(encoding) or measure(file, model))
        rows += _approaches(model, counted, on, epochs or examples.auto_epochs(counted.examples), requests)
    table = pd.DataFrame(rows)
    table["break_even"] = table["break_even"].astype("Int64")
    table.attrs |= {"on": day(on).isoformat(), "requests": requests}
    return table


def overdue(on: Day = None) -> list[str]:
    """The dated facts whose review date has passed, one line each."""
    rows: list[Price | Availability] = [*prices(), *availabilities()]
    found = {(row.review, row.model): row for row in rows if row.review and row.review < day(on)}
    return [f"{model}: to be checked again since {review}" for review, model in sorted(found, key=str)]


def is_model(listed: str, asked: str) -> bool:
    """Whether a listed model is the one asked for: itself, or a dated snapshot of it if that name has no rows."""
    asked = tokens.base_name(asked)
    if listed == asked or asked in _listed():
        return listed == asked
    return listed.startswith(f"{asked}-") and listed[len(asked) + 1 :].replace("-", "").isdigit()


def tunes(model: str) -> bool:
    """Whether the model could ever be fine-tuned, at a known price or not."""
    return any(is_model(row.model, model) and row.kind == "training" for row in prices())


# --- details ---------------------------------------------------------------------------------------


def _approaches(model: str, file: FileTokens, on: Day, epochs: int, requests: int) -> list[dict[str, Any]]:
    shots = SHOTS * (file.prompt + file.completion)
    cached = shots if shots + file.prompt >= CACHE_MINIMUM else 0.0
    shared: dict[str, Any] = {"model": model, "output_tokens": file.completion, "training_usd": 0.0,
                              "break_even": None, "note": ""}
    plans = {"zero-shot": (file.prompt, 0.0), "few-shot": (file.prompt + shots, cached),
             "fine-tuned": (file.prompt, 0.0)}
    open_to = availability(model, on)
    rows: list[dict[str, Any]] = []
    for approach, (prompt, saved) in plans.items():
        row = shared | {"approach": approach, "prompt_tokens": prompt, "base_off": open_to and open_to.base_off}
        each = {"fine_tuned": approach == "fine-tuned", "on": on}
        row["usd_per_1000"] = _known(row, lambda p=prompt, s=saved, e=each: 1000 * request_cost(
            model, p, file.completion, cached=s, **e))
        row["usd_per_1000_batch"] = _known({}, lambda p=prompt, e=each: 1000 * request_cost(
            model, p, file.completion, batch=True, **e))
        if approach == "fine-tuned":
            row["training_usd"] = _known(row, lambda: training_cost(model, file.tokens, epochs, on))
            row["who"] = open_to.who if open_to else "nobody"
            costs = (row["training_usd"], rows[-1]["usd_per_1000"] / 1000, row["usd_per_1000"] / 1000)
            row["break_even"] = None if any(map(math.isnan, costs)) else break_even(*costs)
        row["total_usd"] = row["training_usd"] + row["usd_per_1000"] * requests / 1000
        rows.append(row)
    return rows if tunes(model) else rows[:-1]


def _known(row: dict[str, Any], cost: Any) -> float:
    """A cost, or not-a-number with the reason in the row's note."""
    try:
        return cost()
    except PriceError as error:
        row["note"] = f"{row.get('note', '')} {error}".strip()
        return math.nan


def _why_not(model: str, kind: str, when: date, rows: Sequence[Price]) -> str:
    if rows:
        known = "; ".join(f"{'not known' if row.usd is None else f'{row.usd:g} USD'} from {row.since} until "
                          f"{row.until or 'now'}" for row in rows)
        return f"The {kind} price of {model} on {when} is not known, only: {known}."
    kinds = sorted({row.kind for row in prices() if is_model(row.model, model)})
    if kinds:
        return f"{model} has no known {kind} price; known are {', '.join(kinds)}."
    return (f"The prices of {model!r} are not known. data/prices.csv lists "
            f"{', '.join(sorted({row.model for row in prices() if '/' not in row.model}))}, and other providers'.")


@lru_cache(maxsize=1)
def _listed() -> frozenset[str]:
    return frozenset(row.model for row in prices())


def _date(text: str) -> date | None:
    return date.fromisoformat(text) if text else None


def _read(name: str) -> list[dict[str, str]]:
    with open(paths.COURSE / "data" / name, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))
