"""/v1/files. A training file's syntax is checked at once, its examples when a job validates it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from openai.types import FileDeleted
from pydantic import Field

from labkit import examples, paths
from labkit.service import keys, objects
from labkit.service.errors import ApiError, bad_request
from labkit.service.keys import Mine
from labkit.service.multipart import Upload
from labkit.service.objects import Body
from labkit.service.paging import listing, page
from labkit.service.schemas import Body as RequestBody
from labkit.service.store import Row, Store

PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
LIMITS = {"fine-tune": examples.MAX_FILE, "batch": 200 << 20}  # bytes; of an upload in parts too, as at OpenAI
PIECE = 1 << 20  # bytes of a file sent at a time
MIN_EXPIRY, MAX_EXPIRY = 3600, 30 * 86400  # seconds, as at OpenAI


class ExpiresAfter(RequestBody):
    """How long a file stays, counted from its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY, le=MAX_EXPIRY)]


def find(store: Store, id: str) -> Row:
    """The file of that id. Raises 404 if there is none, or none any more."""
    drop_expired(store)
    row = store.get("file", id)
    if row is None:
        raise _missing(id)
    return row


def _missing(id: str) -> ApiError:
    return ApiError(404, f"No such file: '{id}'. files.list() shows all files of yours.", "file_not_found", "id")


def check(store: Store, param: str, id: str, purpose: str) -> None:
    """Raises 400 unless the file that the parameter `param` of a request names is there and has that purpose."""
    drop_expired(store)
    row = store.get("file", id)
    if row is None:
        raise bad_request(f"Invalid {param}: there is no file '{id}'. Upload it with files.create and use the id that "
                          "it returns.", param, "file_not_found")
    if row.body["purpose"] != purpose:
        raise bad_request(f"Invalid {param}: '{id}' was uploaded with purpose '{row.body['purpose']}'. Upload it again "
                          f"with purpose '{purpose}'.", param, "invalid_file_purpose")


def drop_expired(store: Store) -> None:
    """Delete everybody's files whose time is over."""
    store = store.of(None)
    for id in store.expired(objects.now()):
        store.delete_file(id)


def routes() -> APIRouter:
    """The routes under /v1/files."""
    router = APIRouter()

    @router.post("/files")
    async def create_file(request: Request, store: Mine) -> Body:
        with Upload(request.headers.get("content-type", ""), store.incoming, examples.MAX_FILE) as upload:
            async for piece in request.stream():
                await run_in_threadpool(_take, store, upload, piece)
            return await run_in_threadpool(_accept, store, upload)

    @router.get("/files")
    def list_files(request: Request, store: Mine) -> Body:
        drop_expired(store)
        wanted = page(request, store, "file", default=10_000, most=10_000, filters=["purpose"], ordered=True)
        purpose = request.query_params.get("purpose")
        matching = {"purpose": [purpose]} if purpose else None
        rows = store.rows("file", after=wanted.after, limit=wanted.limit + 1, newest_first=wanted.newest_first,
                          matching=matching)
        return listing(rows, wanted)

    @router.get("/files/{id}")
    def retrieve_file(id: str, store: Mine) -> Body:
        return find(store, id).body

    @router.get("/files/{id}/content")
    def file_content(id: str, store: Mine) -> StreamingResponse:
        row = find(store, id)
        try:
            content = open(store.files / row.id, "rb")  # noqa: SIM115 - closed by _pieces
        except FileNotFoundError:  # deleted at this moment
            raise _missing(id) from None
        # Not FileResponse: it opens the file only after the status is sent, and answers Range in an error shape of its
        # own.
        return StreamingResponse(_pieces(content), media_type="application/octet-stream", headers={
            "Content-Length": str(row.body["bytes"]),
            "Content-Disposition": f"attachment; filename*=utf-8''{quote(row.body['filename'], safe='')}"})

    @router.delete("/files/{id}")
    def delete_file(id: str, store: Mine) -> Body:
        find(store, id)
        store.delete_file(id)
        return objects.made(FileDeleted, id=id, object="file", deleted=True)

    return router


def _pieces(content: BinaryIO) -> Iterator[bytes]:
    with content:
        while piece := content.read(PIECE):
            yield piece


def _take(store: Store, upload: Upload, piece: bytes) -> None:
    upload.write(piece)
    if upload.size >> 20 != (upload.size - len(piece)) >> 20:  # now and then, so that nothing fills the disk
        keys.check_bytes(store, upload.size)


def _accept(store: Store, upload: Upload) -> Body:
    """Check a whole upload and store it."""
    upload.finish()
    for name in upload.fields:
        if name not in ("purpose", "expires_after[anchor]", "expires_after[seconds]"):
            raise bad_request(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    if upload.filename is None:
        raise bad_request("Missing required parameter: 'file'. Send the file as a part with a file name.",
                          "file", "missing_required_parameter")
    purpose = upload.fields.get("purpose")
    if purpose not in PURPOSES:
        wrong = f"'{purpose}' is not one of" if purpose else "Missing required parameter: 'purpose'. Use one of"
        raise bad_request(f"{wrong} {', '.join(PURPOSES)}.", "purpose")
    body = described(upload.path, upload.filename, purpose, upload.size, _lifetime(upload.fields))
    paths.sync(upload.path)  # so that the transaction need not wait for the disk
    with store.transaction():
        keys.check_bytes(store, upload.size)
        store.adopt(upload.path, body)
    return body


def check_size(purpose: str, size: int, param: str) -> None:
    """Raises 413 when `size` bytes are more than a file of this purpose may have."""
    limit = LIMITS.get(purpose)
    if limit is not None and size > limit:
        raise ApiError(413, f"A file with purpose '{purpose}' has at most {limit >> 20} MB, this one has "
                            f"{size / (1 << 20):.1f} MB. Split it.", "file_too_large", param)


def described(path: Path, filename: str, purpose: str, size: int, lifetime: int | None) -> Body:
    """The file object of the whole content at `path`, which expires after `lifetime` seconds.

    Raises 400 or 413 for a content that a file of this purpose may not have.
    """
    check_size(purpose, size, "file")
    if purpose == "fine-tune" and (problem := examples.first_unreadable(path)):
        raise bad_request(f"Invalid training file: {problem}", "file", "invalid_jsonl")
    if purpose == "batch" and lifetime is None:
        lifetime = MAX_EXPIRY  # as at OpenAI; all other files stay until they are deleted
    return objects.file(objects.new_id("file-"), filename, purpose, size,
                        None if lifetime is None else objects.now() + lifetime)


def _lifetime(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise bad_request("Invalid 'expires_after.anchor': use 'created_at'.", "expires_after.anchor")
    if not (seconds and len(seconds) <= 9 and seconds.isascii() and seconds.isdigit()
            and MIN_EXPIRY <= int(seconds) <= MAX_EXPIRY):
        raise bad_request(f"Invalid 'expires_after.seconds': use a number from {MIN_EXPIRY} to {MAX_EXPIRY}.",
                          "expires_after.seconds")
    return int(seconds)
