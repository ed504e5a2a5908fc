"""A process that does jobs: `python -m labkit.service.worker HOME BASE_FOLDER`.

Its standard input names the jobs, a line each, and it answers each one that it has done with a
line on its standard output. A job whose files are not validated yet is validated; the next time
it is named it is trained. All that is found goes straight into the database. After a job that
came to its end the process waits a while for another: torch and the model need not be loaded
again. After any other it ends, so that nothing of it is left.

It takes orders in two ways: it trains only while the job's status is "running", and its standard
input says "stop" when the service shuts down. When that closes, the service has died, and the
process ends at once: nothing trains orphaned. Whatever happens, a restart goes on from the last
whole training state to the same result. A full disk is told by the exit code `DISK_FULL`: what to
write then is the supervisor's to find out.
"""

import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from labkit import examples
from labkit.errors import ContextError, DataError, LabkitError
from labkit.examples import Report
from labkit.service import objects
from labkit.service.errors import JobError, disk_full, from_exception
from labkit.service.objects import Body
from labkit.service.store import Row, Store

if TYPE_CHECKING:
    from labkit.engine.cache import PromptCache

# "auto": the smaller one for fewer than so many examples, which make too few steps; see engine/EXPERIMENTS.md.
SMALL_BATCH, BATCH_SIZE, FEW = 8, 16, 200
MULTIPLIER = 1.0  # "auto"
IDLE_SECONDS = 60.0  # to wait for another job, with the model in memory
DISK_FULL = 28  # exit code; the number of Linux's ENOSPC, but any would do


def main(home: Path, base: Path) -> None:
    """Do the jobs that standard input names, until none comes for `IDLE_SECONDS` or one is left unfinished.

    Raises the error of a full disk.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal goes to all; the service decides
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    orders, stopping = _listen()
    worker = Worker(Store(home), base, stopping)
    while not stopping.is_set():
        try:
            job_id = orders.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            return
        if not job_id or not worker.do(job_id):
            return
        _log_to(Path(os.devnull))  # the job's folder may be removed now
        os.write(answers, b"done\n")


class Worker:
    """Does one job after the other, keeping the model that the first one loads, and what it knows of cached prompts."""

    def __init__(self, store: Store, base: Path, stopping: threading.Event) -> None:
        self.store, self.base, self.stopping = store, base, stopping
        self._cache: PromptCache | None = None

    def do(self, job_id: str) -> bool:
        """Validate or train one job, and tell whether it came to its end; an exception becomes the job's error."""
        row = self.store.get("job", job_id)
        if row is None:
            return False
        _log_to(self.store.jobs / job_id / "worker.log")
        store = self.store.of(row.owner)  # who gets all that comes of the job
        try:
            if row.body["status"] == "validating_files":
                validate(store, row)
                return True
            return self._train(store, row)
        except JobError as error:
            fail(store, job_id, error)
        except (DataError, ContextError) as error:
            fail(store, job_id, JobError("invalid_training_file", str(error), "training_file"))
        except LabkitError as error:
            fail(store, job_id, JobError("model_unavailable", str(error)))
        except Exception as error:
            if disk_full(error):
                raise
            traceback.print_exc()
            known = from_exception(error)
            fail(store, job_id, JobError(known.code or "", known.message) if known else JobError(
                "internal_error", f"Training stopped on an internal error ({type(error).__name__}). "
                f"jobs/{job_id}/worker.log in the service's home folder tells more."))
        return False

    def _train(self, store: Store, row: Row) -> bool:
        from labkit.engine import model as models  # torch takes seconds to load, and validation needs none
        from labkit.engine.cache import PromptCache
        from labkit.service.training import Run

        if self._cache is None:
            if hasattr(os, "nice"):
                os.nice(15)  # answering goes before training
            self._cache = PromptCache(models.load(self.base), store.home / "cache" / "prompts")
        self._cache.full = False  # there may be room on the disk again
        return Run(store, row, self._cache, self.stopping).run()


def fail(store: Store, job_id: str, error: JobError) -> None:
    """End a job as failed, unless it has ended already."""
    ended = {"status": "failed", "error": error.body, "finished_at": objects.now(), "estimated_finish": None}
    with store.transaction():
        if store.change("job", job_id, ended, expect=objects.PENDING):
            store.add("event", objects.event(error.body["message"], "error"), job_id)


def validate(store: Store, row: Row) -> None:
    """Check the files, resolve "auto", and queue the job. Raises `JobError`."""
    body, folder = row.body, store.jobs / row.id
    files = f"training file: {body['training_file']}"
    if body["validation_file"]:
        files += f" and validation file: {body['validation_file']}"
    store.add("event", objects.event(f"Validating {files}"), row.id, mark="validating")
    training = _checked(folder / "training.jsonl", "training_file", examples.MINIMUM)
    if body["validation_file"]:
        validation = _checked(folder / "validation.jsonl", "validation_file", 1)
        if validation.kind != training.kind:
            raise JobError("invalid_validation_file", f"The training file holds {training.kind} examples, but the "
                           f"validation file {validation.kind} examples. Bring both into one form.", "validation_file")
    settings = resolve(body["hyperparameters"], len(training.examples))
    queued = {"status": "queued", "hyperparameters": settings,
              "method": {"type": "supervised", "supervised": {"hyperparameters": settings}}}
    with store.transaction():
        if store.change("job", row.id, queued, {"validated": True, "form": training.kind}, ("validating_files",)):
            store.add("event", objects.event("Files validated, moving job to queued state"), row.id, mark="validated")


def resolve(wanted: Body, count: int) -> Body:
    """Hyperparameters with every "auto" replaced, for `count` training examples."""
    batch_size = min(count, SMALL_BATCH if count < FEW else BATCH_SIZE)
    auto = {"n_epochs": examples.auto_epochs(count), "batch_size": batch_size, "learning_rate_multiplier": MULTIPLIER}
    return {name: auto[name] if value == "auto" else value for name, value in wanted.items()}


def _checked(path: Path, param: str, minimum: int) -> Report:
    report = examples.check(path, minimum)
    if report.problems:
        code = report.problems[0].code
        if param == "validation_file" and code == "invalid_training_file":
            code = "invalid_validation_file"
        raise JobError(code, f"The job failed due to an invalid {param.replace('_', ' ')}. {report}", param)
    return report


def _listen() -> tuple["queue.SimpleQueue[str]", threading.Event]:
    """The jobs that are named, and an event that is set when the service says "stop".

    "stop" is an empty name as well. The process ends when the service is gone.
    """
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    stopping = threading.Event()

    def read() -> None:
        # os.read, not sys.stdin: a thread waiting in there would hold a lock that Python's own exit needs.
        rest = b""
        while piece := os.read(0, 4096):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line == b"stop":
                    stopping.set()
                orders.put("" if line == b"stop" else line.decode())
        os._exit(1)  # not sys.exit: the main thread may be deep in a matrix product

    threading.Thread(target=read, daemon=True).start()
    return orders, stopping


def _log_to(path: Path) -> None:
    """Let this file take what is printed from now on."""
    with open(path, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


if __name__ == "__main__":
    code = 1
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
        code = 0
    except Exception as error:
        code = DISK_FULL if disk_full(error) else 1
        with suppress(OSError):  # the log may be on the full disk
            traceback.print_exc()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)  # the interpreter's own exit takes seconds with torch loaded, and the next job waits for it
