"""/v1/uploads: a large file sent in parts, which may be sent again, in any order, and side by side.

Parts lie in parts/UPLOAD/PART until the upload is completed, cancelled or expired.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field, StringConstraints

from labkit import paths
from labkit.service import files, keys, objects
from labkit.service.errors import ApiError, bad_request
from labkit.service.files import ExpiresAfter
from labkit.service.keys import Mine
from labkit.service.multipart import Upload as Incoming
from labkit.service.multipart import base_name
from labkit.service.objects import Body
from labkit.service.retries import retried
from labkit.service.schemas import Body as RequestBody
from labkit.service.schemas import Text
from labkit.service.store import Row, Store

PART_LIMIT = 64 << 20  # bytes, as at OpenAI
UPLOAD_LIMIT = 8 << 30  # bytes of a whole upload, and of all parts that were sent for one; as at OpenAI
LIFETIME = 3600  # seconds in which an upload has to be completed, as at OpenAI
PIECE = 1 << 20  # bytes copied at a time


class UploadCreate(RequestBody):
    """The body of `uploads.create`."""

    bytes: Annotated[int, Field(ge=0, le=UPLOAD_LIMIT)]
    filename: Annotated[Text, Field(min_length=1)]
    mime_type: Annotated[Text, Field(min_length=1, max_length=255)]
    purpose: Literal["fine-tune", "assistants", "batch", "vision", "user_data", "evals"]
    expires_after: ExpiresAfter | None = None


class UploadComplete(RequestBody):
    """The body of `uploads.complete`: the parts in their order."""

    part_ids: Annotated[list[Text], Field(max_length=10_000)]
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


def routes() -> APIRouter:
    """The routes under /v1/uploads."""
    router = APIRouter(prefix="/uploads")

    @router.post("")
    def create_upload(body: UploadCreate, store: Mine) -> Body:
        files.check_size(body.purpose, body.bytes, "bytes")
        keys.check_bytes(store, body.bytes)
        upload = objects.upload(base_name(body.filename), body.purpose, body.bytes, LIFETIME)
        lifetime = body.expires_after.seconds if body.expires_after else None
        store.add("upload", upload, inner={"mime_type": body.mime_type, "lifetime": lifetime})
        return upload

    @router.post("/{id}/parts")
    async def add_part(id: str, request: Request, store: Mine) -> Body:
        with Incoming(request.headers.get("content-type", ""), store.incoming, PART_LIMIT, "data") as incoming:
            async for piece in request.stream():
                await run_in_threadpool(incoming.write, piece)
            return await run_in_threadpool(_add, store, id, incoming)

    @router.post("/{id}/complete")
    def complete_upload(id: str, body: UploadComplete, request: Request, store: Mine) -> Body:
        row = _find(store, id)
        if retried(request) and row.body["status"] == "completed":
            return row.body  # the reply to the first try was lost
        return _complete(store, _pending(store, id), body)

    @router.post("/{id}/cancel")
    def cancel_upload(id: str, request: Request, store: Mine) -> Body:
        row = _find(store, id)
        if retried(request) and row.body["status"] == "cancelled":
            return row.body
        return _end(store, id, "cancelled")

    return router


def drop_expired(store: Store) -> None:
    """Give up the uploads whose time is over."""
    for row in store.rows("upload", matching={"status": ["pending"]}):
        if row.body["expires_at"] <= objects.now() and store.change("upload", row.id, {"status": "expired"},
                                                                    expect=("pending",)):
            _remove_parts(store, row.id)


# --- one upload ----------------------------------------------------------------------------------


def _find(store: Store, id: str) -> Row:
    drop_expired(store)
    row = store.get("upload", id)
    if row is None:
        raise ApiError(404, f"No such upload: '{id}'. Create one with uploads.create.", "upload_not_found", "upload_id")
    return row


def _pending(store: Store, id: str) -> Row:
    """The upload, if parts may still be added. Raises 404 or a 400 that the SDK does not retry as it would a 409."""
    row = _find(store, id)
    status = row.body["status"]
    if status != "pending":
        raise ApiError(400, f"Upload {id} can no longer be changed: its status is '{status}'. Create a new upload.",
                       "invalid_upload_state", "upload_id", retry=False)
    return row


def _end(store: Store, id: str, status: str, file: Body | None = None, content: Path | None = None) -> Body:
    """Move an upload to its last status; a completed one becomes the file `file` with what is at `content`."""
    with store.transaction():
        _pending(store, id)
        changed = store.change("upload", id, {"status": status, "file": file})
        assert changed is not None
        store.remove_children("part", id)
        if file is not None and content is not None:
            keys.check_bytes(store, file["bytes"])
            store.adopt(content, file)
    _remove_parts(store, id)
    return changed.body


def _remove_parts(store: Store, id: str) -> None:
    store.remove_children("part", id)
    shutil.rmtree(store.parts / id, ignore_errors=True)


def _add(store: Store, id: str, incoming: Incoming) -> Body:
    """Keep a whole part."""
    incoming.finish()
    for name in incoming.fields:
        raise bad_request(f"Unknown parameter: '{name}'. A part is sent as 'data' with a file name.", name,
                          "unknown_parameter")
    if incoming.filename is None:
        raise bad_request("Missing required parameter: 'data'. Send the part as 'data' with a file name.", "data",
                          "missing_required_parameter")
    paths.sync(incoming.path)
    part = objects.part(id)
    with store.transaction():
        _pending(store, id)
        sent = sum(row.inner["bytes"] for row in store.rows("part", id))
        if sent + incoming.size > UPLOAD_LIMIT:
            raise ApiError(413, f"The parts of upload {id} are larger than {UPLOAD_LIMIT >> 30} GB together.",
                           "file_too_large", "data")
        keys.check_bytes(store, incoming.size)
        target = store.parts / id / part["id"]
        target.parent.mkdir(exist_ok=True)
        os.replace(incoming.path, target)
        store.add("part", part, id, {"bytes": incoming.size})
    return part


# --- complete ------------------------------------------------------------------------------------


def _complete(store: Store, row: Row, body: UploadComplete) -> Body:
    parts = _parts(store, row, body.part_ids)
    whole = store.incoming / objects.new_id("upload-")
    try:
        try:
            digest = _join(parts, whole)
        except FileNotFoundError:
            _pending(store, row.id)  # it was completed or cancelled meanwhile
            raise
        if body.md5 is not None and body.md5.lower() != digest:
            raise bad_request(f"The MD5 checksum of the parts is {digest}, not {body.md5.lower()} as you gave. Send "
                              "the damaged part again, and complete with its new id.", "md5", "checksum_mismatch")
        upload = row.body
        file = files.described(whole, upload["filename"], upload["purpose"], upload["bytes"], row.inner["lifetime"])
        try:
            return _end(store, row.id, "completed", file, whole)
        except BaseException:
            (store.files / file["id"]).unlink(missing_ok=True)
            raise
    finally:
        whole.unlink(missing_ok=True)


def _parts(store: Store, row: Row, ids: Sequence[str]) -> list[Path]:
    """The paths of the parts. Raises 400 if one is unknown or doubled, or if their sizes are not what was said."""
    known = {part.id: part.inner["bytes"] for part in store.rows("part", row.id)}
    for number, id in enumerate(ids):
        if id not in known:
            raise bad_request(f"Upload {row.id} has no part '{id}'. Give the ids that uploads.parts.create returned.",
                              f"part_ids[{number}]", "part_not_found")
    if len(set(ids)) < len(ids):
        raise bad_request("A part is given twice. List each part once, in their order.", "part_ids")
    size = sum(known[id] for id in ids)
    if size != row.body["bytes"]:
        raise bad_request(f"The parts have {size} bytes together, but the upload was created for {row.body['bytes']}. "
                          "Add the missing part, or leave out what is too much.", "part_ids", "size_mismatch")
    return [store.parts / row.id / id for id in ids]


def _join(parts: Sequence[Path], target: Path) -> str:
    """Write the parts one after another; the MD5 checksum of it all."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(target, "wb") as output:
        for path in parts:
            with open(path, "rb") as part:
                while piece := part.read(PIECE):
                    digest.update(piece)
                    output.write(piece)
        output.flush()
        os.fsync(output.fileno())  # here, so that the transaction that follows is short
    return digest.hexdigest()
