"""A job's training, inside its worker: drives `engine.train` and writes down what happens.

A training state is saved after every epoch and every half minute. It counts only with the
marker `complete.json`, written last, which holds the hash of every file; the two newest are
kept, so a torn one costs little. What a state stands for is in the database before its marker
is on the disk, and what is done again after a restart finds its events and checkpoints there.
"""

import csv
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from labkit import examples, paths
from labkit.engine import adapter as adapters
from labkit.engine import encode, train
from labkit.engine.adapter import Adapter
from labkit.engine.cache import PromptCache
from labkit.engine.encode import Encoded
from labkit.examples import Completion, Example
from labkit.service import objects
from labkit.service.errors import JobError
from labkit.service.objects import Body
from labkit.service.store import Row, Store
from labkit.service.turns import AnsweringSign

ACTIVE = ("running",)
CHECKPOINTS = 3  # kept of a job, the last ones, as at OpenAI
STATES = 2
SAVE_SECONDS = 30.0  # between training states within an epoch
FLUSH_SECONDS = 0.25  # between writes to the database: each one waits for the disk
EPOCH_SHARE = 0.1  # of reading all prompts: a guess at an epoch's time, until the first steps are measured
MARKER = "complete.json"


class Run:
    """One job from its queued state to its end, or to where it has to stop."""

    def __init__(self, store: Store, row: Row, cache: PromptCache, stopping: threading.Event) -> None:
        self.store, self.row, self.cache, self.stopping = store, row, cache, stopping
        self.model = cache.model
        self.id, self.inner = row.id, row.inner
        self.folder = store.jobs / row.id
        self.states = self.folder / "state"
        self._events: list[tuple[Body, str]] = []  # found, not yet in the database, each with its mark
        self._finish: int | None = None  # estimated, in seconds since 1970
        self._flushed = self._saved = self._told = time.monotonic()

    def run(self) -> bool:
        """Train until the end (True), or until the job is paused, cancelled, or the service shuts down (False)."""
        if not self.store.change("job", self.id, {"status": "running"}, expect=("queued", "running")):
            return False
        self.store.add("event", objects.event("Fine-tuning job started"), self.id, mark="started")
        self.trainer = self._trainer()
        self._restore()
        self._began, self._first = time.monotonic(), self.trainer.step
        last = None
        sign = AnsweringSign(self.store.home / "cache")
        for happening in self.trainer.run():
            sign.give_way()
            if isinstance(happening, train.Prepared):
                self._on_prepared(happening)
            elif isinstance(happening, train.Step):
                self._on_step(happening)
                last = happening
            elif last is not None:
                self._on_epoch(happening, last)
            # Between an epoch's last step and its checkpoint there is no stopping.
            if not (isinstance(happening, train.Step) and self._at_end_of_epoch()) and self._leave():
                return False
        self._succeed()
        adapters.remove(self.model, self.trainer.adapter)
        return True

    # --- before the first step ---------------------------------------------------------------

    def _trainer(self) -> train.Trainer:
        training, validation = self._examples("training"), self._examples("validation")
        start = encode.find_start(self.model, training, self.inner["adapter"] == "activated")
        settings = train.Settings(**self.row.body["hyperparameters"], seed=self.row.body["seed"])
        adapter = adapters.create(self.model, "trained", start, self.inner["rank"], seed=settings.seed)
        if self.inner["parent"]:
            adapters.initialise(self.model, adapter, self.folder / "parent")
        if start.text:
            self._warn_of_other_endings(validation, start.text)
        return train.Trainer(self.model, adapter, self.cache, self._encode("training", training, adapter),
                             self._encode("validation", validation, adapter), settings)

    def _examples(self, which: str) -> list[Example]:
        path = self.folder / f"{which}.jsonl"
        return examples.check(path, 0).examples if path.exists() else []

    def _encode(self, which: str, found: list[Example], adapter: Adapter) -> list[Encoded]:
        encoded, cut = encode.encode_examples(self.model, found, adapter.start, self.inner["limit"])
        if cut:
            limit = min(self.inner["limit"] or self.model.context, self.model.context)
            self._event(f"{cut} of {len(encoded)} {which} prompts were longer than {limit} tokens together with their "
                        "completion, and lost their beginning", f"cut:{which}", "warn")
        return encoded

    def _warn_of_other_endings(self, validation: list[Example], ending: str) -> None:
        other = sum(isinstance(e, Completion) and not e.prompt.endswith(ending) for e in validation)
        if other:
            self._event(f"{other} validation prompts do not end with {json.dumps(ending)} as all training prompts do; "
                        "their losses will be poor", "endings", "warn")

    # --- what the trainer tells ----------------------------------------------------------------

    def _on_prepared(self, prepared: train.Prepared) -> None:
        """Prompts are read once, before the first step: tell how far that is, at most once a second."""
        spent = (time.monotonic() - self._began) / prepared.done
        rest = (prepared.total - prepared.done) + EPOCH_SHARE * self.trainer.settings.n_epochs * prepared.total
        self._finish = objects.now() + math.ceil(spent * rest)
        if time.monotonic() - self._told > 1 and prepared.done < prepared.total:
            self._event(f"Reading prompts: {prepared.done}/{prepared.total}", f"read:{prepared.done}")
            self._told = time.monotonic()
        if prepared.done == prepared.total:
            self._began = time.monotonic()
        self._flush_now_and_then()

    def _on_step(self, step: train.Step) -> None:
        if not math.isfinite(step.train_loss):
            raise JobError("training_diverged", f"The training loss was no number any more at step {step.step}. Use a "
                           "smaller learning_rate_multiplier.", "learning_rate_multiplier")
        message = f"Step {step.step}/{step.total}: training loss={step.train_loss:.2f}"
        if step.valid_loss is not None:
            message += f", validation loss={step.valid_loss:.2f}"
        data = {"step": step.step, "total_steps": step.total, **_metrics(step)}
        self._event(message, f"step:{step.step}", kind="metrics", data=data)
        pace = (time.monotonic() - self._began) / (step.step - self._first)
        self._finish = objects.now() + math.ceil(pace * (step.total - step.step))
        self._flush_now_and_then()

    def _on_epoch(self, epoch: train.Epoch, last: train.Step) -> None:
        """An epoch has ended: its adapter becomes a checkpoint, usable as a model, and the oldest one goes.

        Not if the job was cancelled meanwhile: whoever did that may have one of the checkpoints in use.
        """
        self._flush()
        folder = self._save_state()
        name = f"{self.inner['name']}:ckpt-step-{epoch.step}"
        published = f"{self.inner['model_id']}-ckpt-step-{epoch.step}"
        metrics = {**_metrics(last), "full_valid_loss": epoch.full_valid_loss,
                   "full_valid_mean_token_accuracy": epoch.full_valid_accuracy}
        self._publish(published)
        with self.store.transaction():
            if self.store.status("job", self.id) == "cancelled":
                dropped = [published]
            else:
                checkpoint = objects.checkpoint(self.id, epoch.step, name, metrics)
                if self.store.add("checkpoint", checkpoint, self.id, mark=f"step:{epoch.step}"):
                    self._add_model(name, published)
                    self._add_event(objects.event(f"Checkpoint created at step {epoch.step} with model: {name}"),
                                    f"checkpoint:{epoch.step}")
                dropped = self._prune_checkpoints()
        for adapter in dropped:
            shutil.rmtree(self.store.models / adapter, ignore_errors=True)
        self._mark_whole(folder)

    def _leave(self) -> bool:
        """Whether to stop here. A state is saved first, unless the job was cancelled."""
        status = self.store.status("job", self.id)
        due = time.monotonic() - self._saved > SAVE_SECONDS
        if status == "cancelled" or (status in ACTIVE and not due and not self.stopping.is_set()):
            return status == "cancelled"
        self._flush()
        if self.trainer.step and not (self._state_folder() / MARKER).exists():
            self._mark_whole(self._save_state())
        return status not in ACTIVE or self.stopping.is_set()

    def _succeed(self) -> None:
        self._flush()
        self._publish(self.inner["model_id"])  # of the state saved at the end of the last epoch
        result = self._result_file()
        name = self.inner["name"]
        ended = {"status": "succeeded", "fine_tuned_model": name, "finished_at": objects.now(),
                 "estimated_finish": None, "trained_tokens": self.trainer.trained_tokens,
                 "result_files": [result["id"]]}
        with self.store.transaction():
            if not self.store.change("job", self.id, ended, {"step": self.trainer.step}, ACTIVE):
                return  # cancelled or paused at the last moment; what was published is swept or published again
            self.store.adopt(self.folder / "result.csv", result)
            self._add_model(name, self.inner["model_id"])
            self._add_event(objects.event(f"New fine-tuned model created: {name}"), "model")
            self._add_event(objects.event("The job has successfully completed"), "succeeded")

    def _result_file(self) -> Body:
        """Write the metrics of all steps as CSV; the columns are those of OpenAI's result files."""
        steps = [row.body["data"] for row in self.store.rows("event", self.id, matching={"type": ["metrics"]})]
        steps.sort(key=lambda data: data["step"])
        names = {"step": "step", "train_loss": "train_loss", "train_accuracy": "train_mean_token_accuracy",
                 "valid_loss": "valid_loss", "valid_mean_token_accuracy": "valid_mean_token_accuracy"}
        with open(self.folder / "result.csv", "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(names)
            writer.writerows([step[name] for name in names.values()] for step in steps)
            size = handle.tell()
        return objects.file(objects.new_id("file-"), "step_metrics.csv", "fine-tune-results", size)

    # --- the database --------------------------------------------------------------------------

    def _event(self, message: str, mark: str, level: str = "info", kind: str = "message",
               data: Body | None = None) -> None:
        self._events.append((objects.event(message, level, kind, data), mark))

    def _add_event(self, event: Body, mark: str) -> None:
        self.store.add("event", event, self.id, mark=mark)

    def _add_model(self, name: str, folder: str) -> None:
        root = self.inner["root"]
        size = sum(path.stat().st_size for path in (self.store.models / folder).iterdir())
        inner = {"folder": folder, "form": self.inner["form"], "bytes": size,
                 **{key: self.inner[key] for key in ("base", "adapter", "rank")}}
        self.store.add("model", objects.model(name, root, self.inner["parent"] or root, self.id), inner=inner)

    def _flush_now_and_then(self) -> None:
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Write the events so far, and where the job stands."""
        with self.store.transaction():
            for event, mark in self._events:
                self._add_event(event, mark)
            self.store.change("job", self.id, {"estimated_finish": self._finish}, {"step": self.trainer.step}, ACTIVE)
        self._events.clear()
        self._flushed = time.monotonic()

    # --- adapters and training states on disk --------------------------------------------------

    def _at_end_of_epoch(self) -> bool:
        return self.trainer.step % self.trainer.steps_per_epoch == 0

    def _state_folder(self) -> Path:
        return self.states / f"{self.trainer.step:08d}"

    def _save_state(self) -> Path:
        """Write a training state, still without its marker."""
        folder = self._state_folder()
        shutil.rmtree(folder, ignore_errors=True)
        self.trainer.save(folder)
        return folder

    def _mark_whole(self, folder: Path) -> None:
        hashes = {path.name: paths.sha256(path) for path in folder.iterdir()}
        paths.write_text(folder / MARKER, json.dumps(hashes))
        self._saved = time.monotonic()
        for old in sorted(self.states.iterdir())[:-STATES]:
            shutil.rmtree(old, ignore_errors=True)

    def _restore(self) -> None:
        """Go on from the newest whole training state, if there is one."""
        for folder in sorted(self.states.iterdir(), reverse=True) if self.states.exists() else []:
            if _is_whole(folder):
                self.trainer.restore(folder)
                return
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, name: str) -> None:
        """Copy the adapter's files from this step's training state to the models' folder, whole or not at all."""
        target, scratch = self.store.models / name, self.folder / f"publish-{name}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        for file in (adapters.WEIGHTS, adapters.CONFIG, adapters.NOTE):
            self.store.keep_copy(self._state_folder() / file, scratch / file)
        shutil.rmtree(target, ignore_errors=True)  # from before a crash
        os.replace(scratch, target)

    def _prune_checkpoints(self) -> list[str]:
        """Keep the rows of a job's last checkpoints only; the folders of the models that went."""
        folders = []
        for old in self.store.rows("checkpoint", self.id)[:-CHECKPOINTS]:
            model = self.store.get("model", old.body["fine_tuned_model_checkpoint"])
            if model is not None:  # its owner may have deleted it
                folders.append(model.inner["folder"])
                self.store.remove("model", model.id)
            self.store.remove("checkpoint", old.id)
        return folders


def _metrics(step: train.Step) -> dict[str, Any]:
    return {"train_loss": step.train_loss, "train_mean_token_accuracy": step.train_accuracy,
            "valid_loss": step.valid_loss, "valid_mean_token_accuracy": step.valid_accuracy}


def _is_whole(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / MARKER).read_text())
        return all(paths.sha256(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError):
        return False
