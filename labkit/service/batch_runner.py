"""Sends the requests of batches through the service's own routes, and writes the answers.

A request of a batch enters the application where a client's does, so there is one path to an
answer; it only needs no key, and gives way to clients who wait (`calls.BACKGROUND`). A batch's
status in the database is all the control there is. After a crash a batch goes on with the
requests that are not answered in its files.
"""

import asyncio
import json
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message

from labkit.service import batch_files, objects, queue
from labkit.service.batch_files import Line, Results
from labkit.service.calls import BACKGROUND
from labkit.service.gate import WITHIN, log
from labkit.service.objects import Body
from labkit.service.store import Row, Store

AT_ONCE = 32  # requests of all batches under way: what the engine batches, and as many ready to follow
BATCHES_AT_ONCE = 8
PERIOD = 0.5  # seconds between looks at a batch's status, and between savings of its counts
PAUSE = 5.0  # seconds before a batch is taken up again that failed here, by a full disk, say
EXPIRED = {"code": "batch_expired",
           "message": "This request could not be executed before the completion window expired."}


class BatchRunner:
    """Lives in the event loop: `start()` it there, `wake()` it from anywhere, `close()` it at the end."""

    def __init__(self, store: Store, app: ASGIApp) -> None:
        self.store, self.app = store, app
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Take up the batches that are not finished."""
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._room = asyncio.Semaphore(AT_ONCE)  # first come, first served: batches take turns
        self._main = asyncio.create_task(self._run())

    def wake(self) -> None:
        """There may be something to do."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def close(self) -> None:
        """Stop; what is not answered yet is asked again after the next start."""
        tasks = [self._main, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                rows = await asyncio.to_thread(self.store.rows, "batch", matching={"status": objects.UNFINISHED})
                for row in queue.in_turn(rows, {})[:BATCHES_AT_ONCE]:
                    if row.id not in self._tasks:
                        self._tasks[row.id] = asyncio.create_task(self._look_after(row.id))
                await self._changed.wait()
            except Exception as error:  # such as a busy database
                _report(error)
                await asyncio.sleep(PAUSE)

    async def _look_after(self, id: str) -> None:
        """Work on a batch to its end, or until something fails here; then it is taken up again later."""
        try:
            await self._work(id)
        except Exception as error:
            _report(error, id)
            await asyncio.sleep(PAUSE)
        finally:
            del self._tasks[id]
            self._changed.set()

    async def _work(self, id: str) -> None:
        row = await asyncio.to_thread(self.store.get, "batch", id)
        assert row is not None
        source = self.store.batches / id / "input.jsonl"
        found = await asyncio.to_thread(batch_files.check, source, row.body["endpoint"])
        if row.body["status"] == "validating":
            await asyncio.to_thread(self._validated, id, found)
        results = await asyncio.to_thread(Results, source.parent)
        try:
            left = [line for line in found.lines if line.custom_id not in results.answered]
            if not await asyncio.to_thread(self._over, id, results):
                await self._answer(row, source, left, results)
            await asyncio.to_thread(self._finish, id, left, results)
        finally:
            results.close()

    # --- stages ------------------------------------------------------------------------------

    def _validated(self, id: str, found: batch_files.Input) -> None:
        """Validation has ended; a batch that was cancelled meanwhile stays so."""
        if found.errors:
            end: Body = {"status": "failed", "failed_at": objects.now(),
                         "errors": {"object": "list", "data": found.errors}}
        else:
            end = {"status": "in_progress", "in_progress_at": objects.now(), "model": found.model,
                   "request_counts": {"total": len(found.lines), "completed": 0, "failed": 0}}
        self.store.change("batch", id, end, expect=("validating",))

    async def _answer(self, row: Row, source: Path, left: Sequence[Line], results: Results) -> None:
        """Answer what is left, until all is answered or the batch is cancelled or has expired."""
        work = asyncio.create_task(self._send_all(row, source, left, results))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=PERIOD)
                if await asyncio.to_thread(self._over, row.id, results):
                    break
        finally:
            work.cancel()
            await asyncio.wait({work})
        if not work.cancelled():
            work.result()

    def _over(self, id: str, results: Results) -> bool:
        """Save how far a batch is; whether to stop."""
        results.sync()
        with self.store.transaction():
            row = self.store.get("batch", id)
            assert row is not None
            progress = _progress(row, results)
            if any(row.body[name] != value for name, value in progress.items()):
                self.store.change("batch", id, progress)
        return row.body["status"] != "in_progress" or objects.now() >= row.body["expires_at"]

    def _finish(self, id: str, left: Sequence[Line], results: Results) -> None:
        """Make files of the answers, and the batch completed, cancelled or expired."""
        unanswered = [line for line in left if line.custom_id not in results.answered]
        self.store.change("batch", id, {"status": "finalizing", "finalizing_at": objects.now()},
                          {"outcome": "expired" if unanswered else "completed"}, expect=("in_progress",))
        row = self.store.get("batch", id)
        if row is not None and row.body["status"] in objects.UNFINISHED:
            outcome = "cancelled" if row.body["status"] == "cancelling" else row.inner["outcome"]
            for line in unanswered if outcome == "expired" else ():
                results.add(line.custom_id, None, EXPIRED)
            results.sync()
            end = {"status": outcome, f"{outcome}_at": objects.now(), **_progress(row, results)}
            with self.store.transaction():
                for name, path in (("output_file_id", results.output), ("error_file_id", results.errors)):
                    if path.stat().st_size:
                        end[name] = self._publish(row, path)
                self.store.change("batch", id, end)
        shutil.rmtree(results.output.parent, ignore_errors=True)

    def _publish(self, row: Row, path: Path) -> str:
        """Store answers as a file; the batch's own stay until all is done, should this end half-way."""
        lifetime = row.inner["output_lifetime"]
        expires_at = None if lifetime is None else objects.now() + lifetime
        file = objects.file(objects.new_id("file-"), f"{row.id}_{path.name}", "batch_output", path.stat().st_size,
                            expires_at)
        copy = self.store.incoming / file["id"]
        self.store.keep_copy(path, copy)
        self.store.of(row.owner).adopt(copy, file)
        return file["id"]

    # --- requests ------------------------------------------------------------------------------

    async def _send_all(self, row: Row, source: Path, lines: Sequence[Line], results: Results) -> None:
        asked: set[asyncio.Task[None]] = set()
        try:
            for line in lines:
                await self._room.acquire()
                task = asyncio.create_task(self._send(row, source, line, results))
                task.add_done_callback(lambda _: self._room.release())
                asked.add(task)
                for done in [task for task in asked if task.done()]:
                    asked.remove(done)
                    done.result()  # raises if the answer could not be written
            await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _send(self, row: Row, source: Path, line: Line, results: Results) -> None:
        """Ask for one answer and write it; again a little later while the service has too much to do."""
        BACKGROUND.set(True)
        body = await asyncio.to_thread(batch_files.body_of, source, line)
        while True:
            note = {"owner": row.owner, "batch": row.id}
            status, headers, answer = await _post(self.app, row.body["endpoint"], body, note)
            if status not in (429, 503) or headers.get("x-should-retry") == "false":
                break
            await asyncio.sleep(float(headers.get("retry-after", 1)))
        results.add(line.custom_id, {"status_code": status, "request_id": headers["x-request-id"],
                                     "body": json.loads(answer)})


async def _post(app: ASGIApp, path: str, body: bytes, note: Body) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the reply to a request that goes to `app` without a socket.

    `note` stands in the request's log line; its `owner` is whose request it is. Cancelling it is
    what a client's going away is.
    """
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "client": None, "server": None,
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        WITHIN: note,
    }
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not unread:
            await asyncio.Event().wait()  # never disconnects
        return unread.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


def _progress(row: Row, results: Results) -> Body:
    counts = {"total": row.body["request_counts"]["total"], "completed": results.completed, "failed": results.failed}
    return {"request_counts": counts, "usage": results.usage() if results.completed else row.body["usage"]}


def _report(error: Exception, batch: str | None = None) -> None:
    # Frames only: an exception's message may quote a text.
    fields: dict[str, Any] = {"type": type(error).__name__, "frames": traceback.format_tb(error.__traceback__)}
    log("error", **fields, **({"batch": batch} if batch else {}))
