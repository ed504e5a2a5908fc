"""Watch a fine-tuning job: a progress bar with the time left, and live loss curves in a notebook."""

import io
import re
import sys
import time
from typing import Any

import openai
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from openai.types.fine_tuning import FineTuningJob

from labkit.client.connect import latest_client
from labkit.client.progress import Progress, in_notebook
from labkit.errors import LabkitError

ENDED = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 1.0
REDRAW_SECONDS = 8.0  # a figure costs a third of a second that the training could use


def watch(job: FineTuningJob | str, client: openai.OpenAI | None = None) -> FineTuningJob:
    """Wait for a job, showing its progress; return it when it has ended or is paused.

    In a notebook: a bar with the time left and live loss curves. In a terminal: a plain bar.
    Works with any provider, through `jobs.retrieve` and `jobs.list_events` alone. `client`
    defaults to what `connect` made last. Interrupting stops the watching, not the job. Raises
    `LabkitError` when the job failed or was cancelled.
    """
    client = client or latest_client()
    view = _View()
    identity = job if isinstance(job, str) else job.id
    events: dict[str, Any] = {}
    try:
        while True:
            latest = client.fine_tuning.jobs.retrieve(identity)
            fresh = _new_events(client, identity, events)
            if fresh or latest.status in ENDED:
                view.show(latest, list(events.values()))
            if latest.status in ENDED or latest.status == "paused":
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\nStopped watching; the job goes on. Watch it again: labkit.watch({identity!r}); "
              f"end it: client.fine_tuning.jobs.cancel({identity!r})", file=sys.stderr)
        raise
    if latest.status in ("failed", "cancelled"):
        why = latest.error.message if latest.error and latest.error.message else "no reason was given"
        raise LabkitError(f"The job {identity} was {latest.status}: {why}" if latest.status == "failed"
                          else f"The job {identity} was cancelled.")
    return latest


def refuse_paused(job: FineTuningJob, client: openai.OpenAI) -> None:
    """Raise `LabkitError` with the job's last words if it is paused, since someone has to resume it."""
    if job.status == "paused":
        events = client.fine_tuning.jobs.list_events(job.id, limit=1).data  # newest first
        said = f" ({events[0].message})" if events else ""
        raise LabkitError(f"The job {job.id} is paused{said}. "
                          f"When client.fine_tuning.jobs.resume({job.id!r}) has set it going, run this again.")


def metrics(job: FineTuningJob | str, client: openai.OpenAI | None = None) -> pd.DataFrame:
    """The job's result file as a table: step, train_loss, train_accuracy, valid_loss, valid_mean_token_accuracy.

    Raises `LabkitError` while the job has none.
    """
    client = client or latest_client()
    job = client.fine_tuning.jobs.retrieve(job if isinstance(job, str) else job.id)
    if not job.result_files:
        raise LabkitError(f"The job {job.id} is {job.status} and has no result file yet; watch it first.")
    return pd.read_csv(io.BytesIO(client.files.content(job.result_files[0]).content))


def plot_losses(table: pd.DataFrame, axes: Axes) -> None:
    """Draw training loss and, where measured, validation loss against the step; the loss on a logarithmic scale."""
    step, loss = table["step"], table["train_loss"]
    smooth = loss.rolling(max(1, len(table) // 15), min_periods=1).mean()
    axes.plot(step, loss, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(step, smooth, color="tab:blue", label="training, running mean")
    validated = table["valid_loss"].notna().any()
    if validated:
        valid = table.dropna(subset=["valid_loss"])
        axes.plot(valid["step"], valid["valid_loss"], color="tab:orange", marker="o", ls="--", label="validation")
    axes.set(title="Training and validation loss" if validated else "Training loss", xlabel="step",
             ylabel="loss (nats per completion token)", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)


def _new_events(client: openai.OpenAI, identity: str, known: dict[str, Any]) -> int:
    """Add events not seen before to `known`, oldest first; return how many."""
    fresh = []
    for event in client.fine_tuning.jobs.list_events(identity, limit=100):  # newest first, page after page
        if event.id in known:
            break
        fresh.append(event)
    known.update({event.id: event for event in reversed(fresh)})
    return len(fresh)


def _progress(job: FineTuningJob, events: list[Any]) -> tuple[float, str]:
    """How far the job is, from 0 to 1, and its latest message."""
    if job.status == "succeeded":
        return 1.0, f"model {job.fine_tuned_model}"
    if job.status == "queued" and events:
        return 0.0, events[-1].message  # the service of this course tells the place in the queue
    for event in reversed(events):
        if found := re.match(r"Step (\d+)/(\d+)", event.message):
            return int(found[1]) / int(found[2]), event.message
        if re.search(r"\d+/\d+", event.message):
            return 0.0, event.message
    return 0.0, events[-1].message if events else job.status


def _losses(events: list[Any]) -> pd.DataFrame:
    rows = [event.data for event in events if event.type == "metrics" and isinstance(event.data, dict)]
    table = pd.DataFrame(rows, columns=["step", "train_loss", "valid_loss"])
    return table.dropna(subset=["step", "train_loss"]).astype(float).sort_values("step")


class _View:
    """What `watch` shows: a bar, and in a notebook the loss curves below it."""

    def __init__(self) -> None:
        self._bar = Progress("starting", keep=True)
        self._figure, self._drawn = None, 0.0
        if in_notebook():
            from IPython.display import HTML, Image, display

            self._figure, self._image = display(HTML(""), display_id=True), Image

    def show(self, job: FineTuningJob, events: list[Any]) -> None:
        """Draw the job as it stands."""
        done, message = _progress(job, events)
        self._bar.show(done, f"{_time_left(job)}{message}", title=job.status)
        table = _losses(events)
        ended = job.status in ENDED
        if self._figure and len(table) > 1 and (ended or time.monotonic() - self._drawn > REDRAW_SECONDS):
            picture = Figure(figsize=(7, 3.2), layout="constrained")
            plot_losses(table, picture.subplots())
            with io.BytesIO() as file:
                picture.savefig(file, dpi=100)
                self._figure.update(self._image(file.getvalue(), alt=_in_words(table)))
            self._drawn = time.monotonic()
        if ended:
            self._bar.close()


def _in_words(table: pd.DataFrame) -> str:
    """The curves for those who cannot see them."""
    text = (f"Loss against the step, on a logarithmic scale: training from {table['train_loss'].iloc[0]:.3g} "
            f"at step {table['step'].iloc[0]:.0f} to {table['train_loss'].iloc[-1]:.3g} at step "
            f"{table['step'].iloc[-1]:.0f}")
    valid = table["valid_loss"].dropna()
    return text + (f", validation from {valid.iloc[0]:.3g} to {valid.iloc[-1]:.3g}." if len(valid) else ".")


def _time_left(job: FineTuningJob) -> str:
    if job.status in ENDED or not job.estimated_finish:
        return ""
    left = max(0, int(job.estimated_finish - time.time()))
    return f"about {left // 60}:{left % 60:02d} min left · "
