"""The process of one job: `python -m labkit.service.worker HOME JOB_ID BASE_FOLDER`.

A job whose files are not validated yet is validated, and the process ends; the next one trains.
All it finds goes straight into the database. It takes orders in two ways: it trains only while
the job's status is "running", and its standard input says "stop" when the service shuts down.
When that closes, the service has died, and the process ends at once: nothing trains orphaned.

Whatever happens, a restart goes on from the last whole training state to the same result.
"""

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from labkit import examples
from labkit.errors import ContextError, DataError, LabkitError
from labkit.examples import Report
from labkit.service import objects
from labkit.service.errors import JobError, from_exception
from labkit.service.objects import Body
from labkit.service.store import Row, Store

BATCH_SIZE = 16  # "auto", or the number of examples if there are fewer
MULTIPLIER = 1.0  # "auto"


def main(home: Path, job_id: str, base: Path) -> None:
    """Validate or train one job; an exception becomes the job's error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal goes to all; the service decides
    stopping = _listen()
    store = Store(home)
    row = store.get("job", job_id)
    if row is None:
        return
    store = store.of(row.owner)  # who gets all that comes of the job
    try:
        if row.body["status"] == "validating_files":
            validate(store, row)
            return
        if hasattr(os, "nice"):
            os.nice(15)  # answering goes before training
        from labkit.service.training import Run  # torch takes seconds to load, and validation needs none

        Run(store, row, base, stopping).run()
    except JobError as error:
        fail(store, job_id, error)
    except (DataError, ContextError) as error:
        fail(store, job_id, JobError("invalid_training_file", str(error), "training_file"))
    except LabkitError as error:
        fail(store, job_id, JobError("model_unavailable", str(error)))
    except Exception as error:
        traceback.print_exc()
        known = from_exception(error)
        fail(store, job_id, JobError(known.code or "", known.message) if known else JobError(
            "internal_error", f"Training stopped on an internal error ({type(error).__name__}). "
            f"jobs/{job_id}/worker.log in the service's home folder tells more."))


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
    auto = {"n_epochs": examples.auto_epochs(count), "batch_size": min(BATCH_SIZE, count),
            "learning_rate_multiplier": MULTIPLIER}
    return {name: auto[name] if value == "auto" else value for name, value in wanted.items()}


def _checked(path: Path, param: str, minimum: int) -> Report:
    report = examples.check(path, minimum)
    if report.problems:
        code = report.problems[0].code
        if param == "validation_file" and code == "invalid_training_file":
            code = "invalid_validation_file"
        raise JobError(code, f"The job failed due to an invalid {param.replace('_', ' ')}. {report}", param)
    return report


def _listen() -> threading.Event:
    """An event that is set when the service says "stop". The process ends when the service is gone."""
    stopping = threading.Event()

    def read() -> None:
        # os.read, not sys.stdin: a thread waiting in there would hold a lock that Python's own exit needs.
        while piece := os.read(0, 64):
            if b"stop" in piece:
                stopping.set()
        os._exit(1)  # not sys.exit: the main thread may be deep in a matrix product

    threading.Thread(target=read, daemon=True).start()
    return stopping


if __name__ == "__main__":
    code = 1
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
        code = 0
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own exit takes seconds with torch loaded, and the next job waits for it
