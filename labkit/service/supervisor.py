"""The thread that starts, watches and restarts workers.

One process validates and one trains at a time, each in the order that `queue.waiting` tells; a
job that was running when the service ended comes first. A worker that dies is started again and
goes on from its last checkpoint, up to three times without progress. A full disk pauses the job.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from labkit import paths
from labkit.service import objects, queue
from labkit.service.errors import JobError
from labkit.service.gate import log
from labkit.service.store import Row, Store
from labkit.service.worker import DISK_FULL, fail

TICK = 0.2  # seconds between looks at the workers
PAUSE = 2.0  # seconds until the next look when one failed, by a full disk, say
RESTARTS = 3  # without progress
CANCEL_SECONDS = 2.0  # a cancelled worker may take to notice it; then it is killed, it has nothing to save
STOP_SECONDS = 4.0  # a worker may take to save its state when the service shuts down
STATUSES = {"validate": ("validating_files",), "train": ("running", "queued")}


@dataclass
class Worker:
    """A running process and its job, None between two; `step` is where the job stood when it was given."""

    process: "subprocess.Popen[bytes]"
    job_id: str | None = None
    step: int = 0
    cancelled_at: float | None = None
    done: threading.Event = field(default_factory=threading.Event)  # the process has told so


class Supervisor(threading.Thread):
    """Give it `wake()` when a job was created or changed, and `close()` at the end."""

    def __init__(self, store: Store, base: Path) -> None:
        super().__init__(name="supervisor", daemon=True)
        self.store, self.base = store, base
        self._workers: dict[str, Worker] = {}
        self._restarts: dict[str, int] = {}
        self._changed = threading.Event()
        self._closing = False

    def wake(self) -> None:
        """There may be something to do."""
        self._changed.set()

    def busy(self) -> bool:
        """Whether any job is waiting or in work (a paused one is not)."""
        return bool(self.store.rows("job", limit=1, matching={"status": ("validating_files", "queued", "running")}))

    def close(self) -> None:
        """Stop all workers, leaving their jobs to be resumed, within `STOP_SECONDS`."""
        self._closing = True
        self.wake()
        self.join(STOP_SECONDS + 2)

    def run(self) -> None:
        """Look after the workers until `close`."""
        self._changed.set()
        pause = TICK
        while not self._closing:
            changed = self._changed.wait(pause)
            self._changed.clear()
            pause = TICK
            try:
                self._tick(changed)
            except Exception as error:  # such as a full disk: the next look may find room again
                pause = PAUSE
                log("error", type=type(error).__name__, frames=traceback.format_tb(error.__traceback__))
        self._stop_workers()

    def _tick(self, changed: bool) -> None:
        for slot in STATUSES:
            worker = self._workers.get(slot)
            if worker and worker.process.poll() is not None:
                self._ended(worker, worker.process.returncode)
                del self._workers[slot]
                changed = True
            elif worker and worker.done.is_set():
                self._ended(worker, 0)
                changed = True
            elif worker and worker.job_id:
                self._kill_if_cancelled(worker)
                continue
            if row := self._next(slot):
                self._give(slot, row)
        if changed:
            self._tidy()
            at_work = {worker.job_id for worker in self._workers.values()}
            queue.tell_places(self.store, [row for row in queue.waiting(self.store, "queued", "train")
                                           if row.id not in at_work])

    def _next(self, slot: str) -> Row | None:
        for status in STATUSES[slot]:
            if rows := queue.waiting(self.store, status, slot):
                return rows[0]
        return None

    def _give(self, slot: str, row: Row) -> None:
        """Name a job to the slot's process, and start that if there is none."""
        folder = self.store.jobs / row.id
        folder.mkdir(exist_ok=True)
        worker = self._workers.get(slot) or self._start(slot, folder / "worker.log")
        worker.job_id, worker.step, worker.cancelled_at = row.id, row.inner["step"], None
        worker.done.clear()
        if _tell(worker, row.id):
            queue.take(self.store, row, slot)
            log("worker", job=row.id, task=slot, pid=worker.process.pid)

    def _start(self, slot: str, output: Path) -> Worker:
        command = [sys.executable, "-m", "labkit.service.worker", str(self.store.home), str(self.base)]
        search = os.pathsep.join([str(paths.COURSE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"LABKIT_HOME": str(self.store.home), "PYTHONPATH": search}
        with open(output, "ab") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
                creationflags=getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0) if slot == "train" else 0)
        worker = self._workers[slot] = Worker(process)

        def listen() -> None:
            assert process.stdout is not None
            for _ in process.stdout:
                worker.done.set()
                self.wake()

        threading.Thread(target=listen, name=f"{slot} worker", daemon=True).start()
        return worker

    def _kill_if_cancelled(self, worker: Worker) -> None:
        if self.store.status("job", worker.job_id or "") != "cancelled":
            return
        worker.cancelled_at = worker.cancelled_at or time.monotonic()
        if time.monotonic() - worker.cancelled_at > CANCEL_SECONDS:
            worker.process.kill()

    def _ended(self, worker: Worker, code: int) -> None:
        """A worker's job has ended, or its process has. If what is to be said cannot be written, ask again."""
        row = self.store.get("job", worker.job_id) if worker.job_id else None
        if worker.job_id:
            log("worker_ended", job=worker.job_id, code=code, status=row.body["status"] if row else None)
        if row is not None and code == DISK_FULL:
            self._pause(row)
        elif row is not None and code != 0 and row.body["status"] in ("validating_files", "queued", "running"):
            self._died(row, worker.step, code)
        worker.job_id = None
        worker.done.clear()

    def _died(self, row: Row, before: int, code: int) -> None:
        """A job's process died, which began when the job stood at step `before`: it begins anew, but not for ever."""
        progress = row.inner["step"] > before
        count = 1 if progress else self._restarts.get(row.id, 0) + 1
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if count > RESTARTS:
            fail(self.store.of(row.owner), row.id, JobError(
                "worker_died", f"The training process ended unexpectedly {count} times without progress (last: {how}). "
                "The machine may be short of memory: use shorter examples (labkit.max_tokens_per_example) or a "
                f"smaller batch_size. jobs/{row.id}/worker.log in the service's home folder may tell more."))
        else:
            message = f"The training process ended unexpectedly ({how}); it goes on from its last checkpoint"
            self.store.of(row.owner).add("event", objects.event(message, "warn"), row.id)
        self._restarts[row.id] = count

    def _pause(self, row: Row) -> None:
        """A full disk is no fault of the job's: it waits until there is room and someone resumes it."""
        own, paused = self.store.of(row.owner), {"status": "paused", "estimated_finish": None}
        with own.transaction():
            if own.change("job", row.id, paused, {"place": None}, ("validating_files", "queued", "running")):
                own.add("event", objects.event(
                    "Fine-tuning job paused: the disk of this service is full. What was trained up to the last saved "
                    f"state is kept. Free disk space, then go on with fine_tuning.jobs.resume('{row.id}')", "error"),
                    row.id)

    def _tidy(self) -> None:
        """Remove the data and states of jobs that have ended; a failed job's log stays."""
        at_work = {worker.job_id for worker in self._workers.values()}
        for folder in self.store.jobs.iterdir():
            row = self.store.get("job", folder.name)
            # A folder without a row belongs to a job that is being created at this moment.
            if row is None or row.body["status"] in objects.PENDING or folder.name in at_work:
                continue
            if row.body["status"] != "failed":
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != "worker.log":
                    path.unlink(missing_ok=True)

    def _stop_workers(self) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers.values():
            _tell(worker, "stop")
        for worker in self._workers.values():
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def _tell(worker: Worker, line: str) -> bool:
    """Write a line to a worker; False if its process has ended."""
    assert worker.process.stdin is not None
    try:
        worker.process.stdin.write(line.encode() + b"\n")
        worker.process.stdin.flush()
    except OSError:
        return False
    return True
