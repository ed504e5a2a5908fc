"""The report of `labkit cost`: what a training file costs at providers, and on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import checkup, examples, pricing
from labkit.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SHOWN = {"model": "model", "approach": "approach", "prompt_tokens": "prompt", "training_usd": "training",
         "usd_per_1000": "per 1,000", "usd_per_1000_batch": "in a batch", "total_usd": "total",
         "break_even": "break-even", "base_off": "base ends"}


def report(file: Path, models: list[str] | None, on: str | None, epochs: int | None, requests: int,
           as_json: bool) -> int:
    """Print the report; the exit code. Raises `LabkitError` when file, model or date cannot be used."""
    if requests < 1 or (epochs is not None and not 1 <= epochs <= 50):
        raise DataError("--requests must be 1 or more, --epochs from 1 to 50.")
    try:
        table = pricing.compare(file, models, on, epochs, requests)
        local = _local(file, epochs)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}). Name a training file in JSONL.") from error
    if as_json:
        print(json.dumps({"date": table.attrs["on"], "currency": "USD", "requests": requests, "local": local,
                          "rows": json.loads(table.to_json(orient="records", date_format="iso"))}, indent=1))
    else:
        _show(table, local, requests)
    return 0


def _local(file: Path, epochs: int | None) -> dict[str, Any]:
    """The local service: time from this machine's measured speed, and electricity, with what is assumed."""
    counted = pricing.measure(file)
    rounds = epochs or examples.auto_epochs(counted.examples)
    found = {"examples": counted.examples, "tokens": counted.tokens, "epochs": rounds, "watts": pricing.WATTS,
             "usd_per_kwh": pricing.USD_PER_KWH, "seconds": None, "usd": None, "note": ""}
    try:
        speed = checkup.machine()
    except RuntimeError as error:
        return found | {"note": f"torch does not run here: {error}"}
    seconds = pricing.local_seconds(counted, rounds, speed["flops"][speed["dtype"]])
    return found | {"seconds": round(seconds, 1), "usd": pricing.local_cost(seconds)}


def _show(table: "pd.DataFrame", local: dict[str, Any], requests: int) -> None:
    shown = table[list(SHOWN)].rename(columns=SHOWN)
    print(f"Prices of {table.attrs['on']} in USD; total: training and {requests:,} requests; "
          "break-even: requests until cheaper than few-shot.\n")
    for name in ("training", "per 1,000", "in a batch", "total"):
        shown[name] = [f"{usd:,.4f}" if usd == usd else "unknown" for usd in shown[name]]
    shown["prompt"] = shown["prompt"].map("{:,.0f}".format)
    shown["break-even"] = ["-" if count is None else f"{count:,}" for count in _or_none(shown["break-even"])]
    shown["base ends"] = [str(day or "-") for day in _or_none(shown["base ends"])]
    print(shown.to_string(index=False))
    for model, who in table.dropna(subset=["who"])[["model", "who"]].itertuples(index=False):
        print(f"{model}: a job can be started by {who}")
    for note in dict.fromkeys(table.note[table.note != ""]):
        print(f"unknown: {note}")
    if local["seconds"] is None:
        print(f"\nlocal: {local['note']}")
        return
    print(f"\nlocal: {local['tokens']:,} tokens, {local['epochs']} epochs: about {local['seconds']:,.0f} s on this "
          f"machine (from its measured speed, within a factor of two), 0 USD, and {local['usd']:.5f} USD of "
          f"electricity if it draws {local['watts']:g} W at {local['usd_per_kwh']:g} USD a kWh (assumed).")


def _or_none(column: "pd.Series[Any]") -> list[Any]:
    return [None if missing else value for value, missing in zip(column, column.isna(), strict=True)]
