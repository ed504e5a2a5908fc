"""Change one thing and measure: sweeps and learning curves as ordinary fine-tuning jobs.

A plan is a table with one row a job. The sweep runs it; a job carries its row's digest in its
metadata, so that after a kernel restart it is found again instead of being made twice.
"""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import openai
import pandas as pd
from openai.types.fine_tuning import FineTuningJob
from scipy import stats

from labkit import examples, pricing, tokens
from labkit.client.classify import classify
from labkit.client.evaluate import paired, share
from labkit.client.jobs import ENDED, metrics, refuse_paused
from labkit.client.progress import Progress
from labkit.client.runs import digest, host, record, recorded, runs
from labkit.errors import DataError

SETTINGS = ("n_epochs", "learning_rate_multiplier", "batch_size", "rank")
REACHED = ("status", "error", "job", "model", "tokens", "seconds", "train_loss", "valid_loss", "accuracy", "low",
           "high", "off_label")  # NaN where a job failed or no labels were given
TAG = "labkit_run"  # the key in a job's metadata
IN_FLIGHT = 2  # the next job waits in the queue while one trains, and a finished one is measured meanwhile
POLL_SECONDS = 0.5
# A first guess for two cores; later plans are corrected by what the recorded runs really took.
START_SECONDS, READ_TOKENS, EXAMPLE_SECONDS = 6.0, 2000.0, 0.008
Tables: TypeAlias = "pd.DataFrame | Mapping[str, pd.DataFrame]"


def plan(
    train: Tables, valid: pd.DataFrame, *, sizes: Sequence[int] | None = None, seeds: Sequence[int] = (1,),
    n_epochs: Sequence[int | str] = ("auto",), learning_rate_multiplier: Sequence[float | str] = ("auto",),
    batch_size: Sequence[int | str] = ("auto",), rank: Sequence[int | None] = (None,), price_model: str | None = None,
) -> pd.DataFrame:
    """Every combination as a row, with the `tokens` it trains on and the `seconds` it may take on this machine.

    `train` and `valid` have the columns `prompt` and `completion`; several training tables by
    name compare data instead of settings (labels mended, classes balanced, examples added).
    `sizes` are numbers of training examples, drawn by seed and each contained in the next larger
    one; None takes all. `seconds` counts a prompt's first reading once, since repeated jobs reuse
    the prompt cache, and is scaled by what earlier runs took. With a `price_model` the column
    `usd` tells what the job would cost at its provider today, with the local model's tokens. A
    notebook shows the plan and `plan.seconds.sum()` before it runs anything. Raises `DataError`, `PriceError`.
    """
    tables = _named(train)
    _check({**tables, "validation": valid})
    rows, unread = [], {name: _tokens(table) for name, table in tables.items()}
    lengths = {name: float(counts.mean()) for name, counts in unread.items()}
    read = {name: 0 for name in tables}
    waiting = float(_tokens(valid).sum())
    for name, table in tables.items():
        most = [min(size, len(table)) for size in sizes] if sizes is not None else [len(table)]
        if min(most) < examples.MINIMUM:
            raise DataError(f"A job needs at least {examples.MINIMUM} examples, a size here is {min(most)}.")
        for size, *values, seed in itertools.product(
                dict.fromkeys(most), n_epochs, learning_rate_multiplier, batch_size, rank, seeds):
            epochs = examples.auto_epochs(size) if values[0] == "auto" else int(values[0])
            fresh = max(0, size - read[name]) * lengths[name] + waiting
            read[name], waiting = max(read[name], size), 0.0
            rows.append({"data": name, "examples": size, **dict(zip(SETTINGS, values, strict=True)), "seed": seed,
                         "tokens": round(size * lengths[name] * epochs),
                         "seconds": START_SECONDS + fresh / READ_TOKENS + EXAMPLE_SECONDS * size * epochs})
    table = pd.DataFrame(rows)
    if price_model is not None:
        table["usd"] = [pricing.training_cost(price_model, count) for count in table["tokens"]]
    table.attrs["pace"] = _pace()
    table["seconds"] = (table["seconds"] * table.attrs["pace"]).round(1)
    return table


def sweep(client: openai.OpenAI, planned: pd.DataFrame, train: Tables, valid: pd.DataFrame,
          labels: Sequence[str] | None = None, base: str = "smollm2-135m-instruct") -> pd.DataFrame:
    """Run a plan as fine-tuning jobs; one row each, in the plan's order, with what it reached on `valid`.

    Beside the settings: `status`, `job`, `model`, `train_loss` (mean of the last epoch),
    `valid_loss` (nats a completion token, whole validation file), `seconds` (NaN for a job that
    an earlier call had begun), and with `labels` `accuracy` with its interval `low` to `high` and
    `off_label`. Each finished row is recorded for `labkit.runs()`. Interrupt it, restart the
    kernel, run the cell again: what is recorded is not repeated, and jobs under way are found
    again. A job that fails, as with too high a learning rate, becomes a row with its `error`.
    Choose on `valid`, then measure the chosen model on test posts once. Raises `DataError`
    for unusable tables, `LabkitError` when a job is paused (by a full disk, say), and the SDK's errors.
    """
    tables = _named(train)
    _check({**tables, "validation": valid})
    todo = [_Run.of(client, row, tables, valid, labels, base) for row in planned.to_dict("records")]
    pace = planned.attrs.get("pace", 1.0)
    files: dict[str, str] = {}
    waiting = [run for run in todo if run.found is None]
    active: list[_Run] = []
    with Progress("Sweep", keep=True) as bar:
        try:
            while waiting or active:
                while waiting and len(active) < IN_FLIGHT:
                    active.append(waiting.pop(0).start(client, valid, base, files))
                _show(bar, todo, active, waiting)
                for run in list(active):
                    job = client.fine_tuning.jobs.retrieve(run.job)
                    refuse_paused(job, client)
                    if job.status in ENDED:
                        active.remove(run)
                        run.finish(client, job, valid, labels, base, pace)
                time.sleep(POLL_SECONDS if active else 0)
        except KeyboardInterrupt:
            print(f"\nStopped at {len(todo) - len(waiting) - len(active)} of {len(todo)} jobs; "
                  f"{len(active)} go on. Run the same sweep again to go on from here.")
            raise
        _show(bar, todo, [], [])
    table = pd.DataFrame([run.found for run in todo])
    return table[["data", "examples", *SETTINGS, "seed"]].join(table.reindex(columns=list(REACHED)))


def spread(results: pd.DataFrame, by: str | list[str], metric: str = "accuracy") -> pd.DataFrame:
    """Mean of a metric over the runs that share a setting, with its 95 % interval (Student's t): `mean`, `low`, `high`.

    `runs` counts them; with one run there is no interval (NaN). The interval covers what seeds
    change, not which posts validate. Two settings whose intervals overlap widely are not known
    to differ.
    """
    rows = {}
    for name, values in results.dropna(subset=[metric]).groupby(by, sort=False)[metric]:
        half = stats.t.ppf(0.975, len(values) - 1) * values.sem() if len(values) > 1 else float("nan")
        rows[name] = [values.mean(), values.mean() - half, values.mean() + half, len(values)]
    if not rows:
        raise DataError(f"No run has a value for {metric!r}.")
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high", "runs"])
    table.index = pd.MultiIndex.from_tuples(rows, names=by) if isinstance(by, list) else table.index.rename(by)
    return table.astype({"runs": int})


@dataclass
class _Run:
    """One row of a plan on its way."""

    tag: str  # of the job
    key: str  # of what was measured
    settings: dict[str, Any]
    rows: pd.DataFrame
    planned: float
    found: dict[str, Any] | None = None
    job: str = ""
    made_here: bool = False  # not found again: its time may hold a stop of the service or a sleeping laptop

    @staticmethod
    def of(client: openai.OpenAI, row: dict[str, Any], tables: dict[str, pd.DataFrame], valid: pd.DataFrame,
           labels: Sequence[str] | None, base: str) -> "_Run":
        if row["data"] not in tables:
            raise DataError(f"The plan names the training table {row['data']!r}; given are {', '.join(tables)}.")
        columns = ["prompt", "completion"]
        table = tables[row["data"]][columns]
        if row["examples"] < len(table):
            table = table.sample(frac=1, random_state=int(row["seed"])).head(int(row["examples"]))
        settings = {name: _plain(row[name]) for name in ("data", "examples", *SETTINGS, "seed")}
        data = digest(table, valid[columns])
        tag = digest("sweep", host(client), base, data, {**settings, "data": ""})
        key = digest(tag, list(labels or []))
        found = recorded(key)
        return _Run(tag, key, settings | {"data_digest": data}, table, float(row["seconds"]),
                    found | {"data": row["data"]} if found else None)

    def start(self, client: openai.OpenAI, valid: pd.DataFrame, base: str, files: dict[str, str]) -> "_Run":
        """Find the job of an earlier kernel, or create it."""
        earlier = itertools.islice(client.fine_tuning.jobs.list(metadata={TAG: self.tag}), 200)  # not all filter
        for job in earlier:
            if (job.metadata or {}).get(TAG) == self.tag and job.status not in ("failed", "cancelled"):
                self.job = job.id
                return self
        hyperparameters = {name: self.settings[name] for name in SETTINGS[:3]}
        extra = {"labkit": {"rank": self.settings["rank"]}} if self.settings["rank"] else None
        self.made_here = True
        self.job = client.fine_tuning.jobs.create(
            model=base, training_file=_upload(client, self.rows, files), validation_file=_upload(client, valid, files),
            seed=self.settings["seed"], metadata={TAG: self.tag}, suffix="sweep", extra_body=extra,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore
        ).id
        return self

    def finish(self, client: openai.OpenAI, job: FineTuningJob, valid: pd.DataFrame,
               labels: Sequence[str] | None, base: str, pace: float) -> None:
        """Measure what the job made and record it, unless it may do better another time."""
        result: dict[str, Any] = {**self.settings, "base": base, "status": job.status, "job": job.id,
                                  "model": job.fine_tuned_model}
        if job.status != "succeeded" or not job.fine_tuned_model:
            result["error"] = job.error.message if job.error else None
        else:
            epochs = job.hyperparameters.n_epochs
            epochs = epochs if isinstance(epochs, int) else examples.auto_epochs(len(self.rows))
            table = metrics(job, client)
            result["train_loss"] = float(table["train_loss"].tail(max(1, len(table) // epochs)).mean())
            result["valid_loss"] = float(checkpoints(job, client)["valid_loss"].iloc[-1])
            result |= {"tokens": job.trained_tokens, "planned": self.planned / pace,
                       "seconds": _training_seconds(client, job) if self.made_here else None}
            if labels:
                answers = classify(client, job.fine_tuned_model, valid["prompt"].tolist(), labels, progress=False)
                truth, answers = paired(valid["completion"].str.strip(), answers)
                accuracy, low, high = share(answers["label"].to_numpy() == truth)
                result |= {"accuracy": accuracy, "low": low, "high": high,
                           "off_label": float(answers["label"].isna().mean())}
        diverged = job.status == "failed" and job.error is not None and job.error.code == "training_diverged"
        final = job.status == "succeeded" or diverged
        self.found = record("sweep", self.key, **result) if final else result


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoints(job: FineTuningJob | str, client: openai.OpenAI) -> pd.DataFrame:
    """The checkpoints that are kept of a job (the last three), oldest first; each `model` answers like any other.

    Columns: `step`, `model`, `train_loss`, `valid_loss` and `valid_accuracy` (of the whole
    validation file where the service measures it, of tokens; NaN without one).
    """
    found = client.fine_tuning.jobs.checkpoints.list(job if isinstance(job, str) else job.id)
    rows = []
    for one in found:
        m = one.metrics
        loss, accuracy = m.full_valid_loss, m.full_valid_mean_token_accuracy
        rows.append([one.step_number, one.fine_tuned_model_checkpoint, m.train_loss,
                     m.valid_loss if loss is None else loss,
                     m.valid_mean_token_accuracy if accuracy is None else accuracy])
    table = pd.DataFrame(rows, columns=["step", "model", "train_loss", "valid_loss", "valid_accuracy"])
    return table.astype(dict.fromkeys(table.columns[2:], float)).sort_values("step", ignore_index=True)


def best_checkpoint(job: FineTuningJob | str, client: openai.OpenAI) -> pd.Series:
    """The row of `checkpoints` with the least validation loss. Raises `DataError` when there is none to choose from."""
    table = checkpoints(job, client).dropna(subset=["valid_loss"])
    if table.empty:
        raise DataError("No checkpoint with a validation loss: give the job a validation_file, and let an epoch end.")
    return table.loc[table["valid_loss"].idxmin()]


def stop_early(job: FineTuningJob | str, client: openai.OpenAI, patience: int = 1) -> pd.Series:
    """Watch a job and cancel it once validation loss has not improved for `patience` epochs; the best checkpoint.

    `patience` is 1 or 2, since a service keeps three checkpoints. A notebook starts a job with
    more epochs than it needs and shows where it was stopped. A job that ends by itself is left
    to end. Raises `DataError` when no validation loss was measured, `LabkitError` when the job is paused.
    """
    if patience not in (1, 2):
        raise DataError(f"patience is 1 or 2, not {patience}: only the last three checkpoints are kept.")
    identity = job if isinstance(job, str) else job.id
    losses: dict[int, float] = {}
    with Progress("Early stopping") as bar:
        while True:
            latest = client.fine_tuning.jobs.retrieve(identity)
            refuse_paused(latest, client)
            table = checkpoints(identity, client)
            losses.update(table.set_index("step")["valid_loss"].to_dict())
            steps = sorted(losses)
            best = min(steps, key=lambda step: losses[step]) if steps else 0
            worse = sum(step > best for step in steps)
            lowest = losses.get(best, float("nan"))
            bar.show(0.5, f"{latest.status}; {len(steps)} epochs, best validation loss {lowest:.3f}")
            if latest.status in ENDED:
                break
            if worse >= patience:
                client.fine_tuning.jobs.cancel(identity)
                break
            time.sleep(POLL_SECONDS)
    return best_checkpoint(identity, client)


# --- small things --------------------------------------------------------------------------------


def _named(train: Tables) -> dict[str, pd.DataFrame]:
    return {"train": train} if isinstance(train, pd.DataFrame) else dict(train)


def _check(tables: Mapping[str, pd.DataFrame]) -> None:
    for name, table in tables.items():
        if missing := {"prompt", "completion"} - set(table.columns):
            raise DataError(f"The table {name!r} has no column {' and '.join(sorted(missing))}; add what a training "
                            "file holds, such as completion = \" \" + label.")
        if table.empty or table[["prompt", "completion"]].isna().any(axis=None):
            raise DataError(f"The table {name!r} is empty or has missing prompts or completions.")


def _tokens(table: pd.DataFrame) -> pd.Series:
    return pd.Series(tokens.count_many(table["prompt"] + table["completion"]))


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it; pandas turns None into NaN and whole numbers into floats."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _upload(client: openai.OpenAI, table: pd.DataFrame, files: dict[str, str]) -> str:
    """The id of the file with these examples; the same content is sent once."""
    rows = table[["prompt", "completion"]].to_dict("records")
    content = "\n".join(json.dumps(row) for row in rows).encode()
    key = digest(content.decode())
    if key not in files:
        files[key] = client.files.create(file=("sweep.jsonl", content), purpose="fine-tune").id
    return files[key]


def _training_seconds(client: openai.OpenAI, job: FineTuningJob) -> float:
    """From the job's start, its wait in the queue left out, to its end."""
    begin = job.created_at
    for event in client.fine_tuning.jobs.list_events(job.id, limit=100):
        if "started" in event.message:
            begin = event.created_at
    return float((job.finished_at or begin) - begin)


def _pace() -> float:
    """How much longer recorded runs took than the first guess."""
    past = runs("sweep")
    if past.empty or "planned" not in past:
        return 1.0
    past = past.dropna(subset=["planned", "seconds"]).tail(20)
    spent = past["seconds"].clip(lower=0.5)  # a quick job begins and ends in the same second of the API's
    return float((spent / past["planned"]).median()) if len(past) else 1.0


def _show(bar: Progress, todo: list[_Run], active: list[_Run], waiting: list[_Run]) -> None:
    done = len(todo) - len(active) - len(waiting)
    left = sum(run.planned for run in active + waiting)
    text = f"{done} of {len(todo)} jobs" + (f" · about {left / 60:.0f} min left" if left >= 60 else "")
    bar.show(done / len(todo) if todo else 1, text)
