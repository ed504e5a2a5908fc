"""What every request passes: a request id, host and key checks, a size limit, a log line."""

import hashlib
import hmac
import json
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labkit.service.errors import ApiError, from_exception, internal_error
from labkit.service.objects import new_id

logger = logging.getLogger("labkit.service")
BODY_LIMIT = 32 << 20  # bytes of a JSON body
# Bytes of a multipart body: OpenAI's 512 MB for a file, 64 MB for a part of an upload, and the fields around it.
UPLOAD_LIMIT, PART_LIMIT = 513 << 20, 65 << 20
WITHIN = "labkit.within"  # in the scope of a request that the service makes of itself, which no client can set
DRAIN_LIMIT = 4 << 30  # bytes read and dropped so that a client that sends too much hears why


def log(event: str, **fields: Any) -> None:
    """One structured line. Callers give ids, names and numbers, never a key or a text."""
    logger.info(json.dumps({"time": round(time.time(), 3), "event": event, **fields}))


class Gate:
    """ASGI middleware around the whole application.

    `key_digest` is the SHA-256 of the key, `hosts` the names this service answers to: a web page
    that points its own name at 127.0.0.1 (DNS rebinding) is turned away by the Host header.
    `touched` hears of every request's beginning (+1) and end (-1).
    """

    def __init__(self, app: ASGIApp, key_digest: bytes, hosts: frozenset[str],
                 touched: Callable[[int], None]) -> None:
        self.app, self.key_digest, self.hosts, self.touched = app, key_digest, hosts, touched

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, request_id = time.perf_counter(), new_id("req_", 32)
        note: dict[str, Any] = dict(scope.get(WITHIN, {}))
        scope.setdefault("state", {})["note"] = note  # routes add to the log line, such as the model
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self.touched(+1)
        try:
            if WITHIN not in scope:
                self._check(Headers(scope=scope))
            await self.app(scope, _limited(scope, receive), send_with_id)
        except Exception as error:
            known = from_exception(error) or internal_error()
            if known.code == "internal_error":
                # Frames only: an exception's message may quote a training text.
                frames = traceback.format_tb(error.__traceback__)
                log("error", id=request_id, type=type(error).__name__, frames=frames)
            if not status:
                await known.response()(scope, receive, send_with_id)
        finally:
            self.touched(-1)
            milliseconds = round(1000 * (time.perf_counter() - begin), 1)
            log("request", id=request_id, method=scope["method"], path=scope["path"], status=status,
                ms=milliseconds, **note)

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name.lower() not in self.hosts:
            raise ApiError(403, f"This service answers to {', '.join(sorted(self.hosts))} only, not to the Host header "
                                "of this request. Use the base URL that it printed when it started.", "host_refused")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "No API key was sent. Send the header 'Authorization: Bearer KEY' with the key that "
                                "this service printed when it started; it stands in api_key in its home folder too.",
                           "invalid_api_key")
        if not hmac.compare_digest(hashlib.sha256(key.strip().encode()).digest(), self.key_digest):
            raise ApiError(401, "Incorrect API key provided. Use the key that this service printed when it started; "
                                "it stands in api_key in its home folder too.", "invalid_api_key")


def _limited(scope: Scope, receive: Receive) -> Receive:
    """`receive` that stops a body which is too large, without keeping any of the excess."""
    path = scope["path"].rstrip("/")
    part = path.startswith("/v1/uploads/") and path.endswith("/parts")
    limit = UPLOAD_LIMIT if path == "/v1/files" else PART_LIMIT if part else BODY_LIMIT
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total <= limit:
            return message
        while message.get("more_body") and total < DRAIN_LIMIT:
            message = await receive()
            total += len(message.get("body", b""))
        raise ApiError(413, f"The body of the request is larger than {limit >> 20} MB. Send less at a time.",
                       "request_too_large")

    return limited
