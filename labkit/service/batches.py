"""/v1/batches. Routes only write what is wanted; the runner (batch_runner.py) acts on it."""

import shutil
from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter, Request

from labkit.service import files, objects, retries
from labkit.service.errors import ApiError
from labkit.service.files import ExpiresAfter
from labkit.service.keys import Mine
from labkit.service.objects import Body
from labkit.service.paging import listing, page
from labkit.service.schemas import Body as RequestBody
from labkit.service.schemas import Metadata, Text
from labkit.service.store import Row, Store

WINDOWS = {"24h": 86_400}  # seconds


class BatchCreate(RequestBody):
    """The body of `batches.create`."""

    completion_window: Literal["24h"]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    input_file_id: Text
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


def find(store: Store, id: str) -> Row:
    """The batch of that id. Raises 404."""
    row = store.get("batch", id)
    if row is None:
        raise ApiError(404, f"No such batch: '{id}'. batches.list() shows all batches of yours.",
                       "batch_not_found", "batch_id")
    return row


def routes(wake: Callable[[], None]) -> APIRouter:
    """The routes under /v1/batches; `wake` tells the runner that there is something to do."""
    router = APIRouter(prefix="/batches")

    @router.post("")
    def create_batch(body: BatchCreate, request: Request, store: Mine) -> Body:
        created = _create(store, body, retries.retried(request))
        wake()
        return created

    @router.get("")
    def list_batches(request: Request, store: Mine) -> Body:
        wanted = page(request, store, "batch", default=20, most=100)
        return listing(store.rows("batch", after=wanted.after, limit=wanted.limit + 1, newest_first=True), wanted)

    @router.get("/{id}")
    def retrieve_batch(id: str, store: Mine) -> Body:
        return find(store, id).body

    @router.post("/{id}/cancel")
    def cancel_batch(id: str, store: Mine) -> Body:
        with store.transaction():
            row = find(store, id)
            if row.body["status"] in ("cancelling", "cancelled"):
                return row.body
            changed = store.change("batch", id, {"status": "cancelling", "cancelling_at": objects.now()},
                                   expect=("validating", "in_progress"))
        if changed is None:
            raise ApiError(400, f"Batch {id} cannot be cancelled: its status is '{row.body['status']}'.",
                           "invalid_batch_state", "batch_id", retry=False)
        wake()
        return changed.body

    return router


def _create(store: Store, body: BatchCreate, retried: bool) -> Body:
    created = objects.batch(body.endpoint, body.input_file_id, body.completion_window,
                            WINDOWS[body.completion_window], body.metadata)
    fingerprint = retries.fingerprint(body)
    inner = {"fingerprint": fingerprint,
             "output_lifetime": body.output_expires_after.seconds if body.output_expires_after else None}
    folder = store.batches / created["id"]
    try:
        with store.transaction():  # within it no file is deleted
            files.check(store, "input_file_id", body.input_file_id, "batch")
            if retried and (earlier := retries.earlier(store, "batch", fingerprint)):
                return earlier.body
            # Its own copy: the file may be deleted or expire while the batch is worked on.
            store.keep_copy(store.files / body.input_file_id, folder / "input.jsonl")
            store.add("batch", created, inner=inner)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return created
