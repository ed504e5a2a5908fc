"""What every request passes: a request id, host and key checks, a size limit, a log line."""

import ipaddress
import json
import logging
import re
import time
import traceback
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labkit.service import keys
from labkit.service.errors import ApiError, from_exception, internal_error
from labkit.service.objects import new_id
from labkit.service.store import Store

logger = logging.getLogger("labkit.service")
BODY_LIMIT = 32 << 20  # bytes of a JSON body
# Bytes of a multipart body: OpenAI's 512 MB for a file, 64 MB for a part of an upload, and the fields around it.
UPLOAD_LIMIT, PART_LIMIT = 513 << 20, 65 << 20
WITHIN = "labkit.within"  # in the scope of a request that the service makes of itself, which no client can set
DRAIN_LIMIT = 4 << 30  # bytes read and dropped so that a client hears why it is refused
PATH_LIMIT = 200  # characters of a path in the log


def log(event: str, **fields: Any) -> None:
    """One structured line. Callers give ids, names and numbers, never a key or a text."""
    logger.info(json.dumps({"time": round(time.time(), 3), "event": event, **fields}))


class Gate:
    """ASGI middleware around the whole application.

    `hosts` are the names this service answers to, besides the address that a request came in by:
    a web page that points its own name at this machine (DNS rebinding) is turned away by the Host
    header. Requests go on with `request.state.store`, which is `store` as the key's owner sees it.
    `touched` hears of every request's beginning (+1) and end (-1).
    """

    def __init__(self, app: ASGIApp, store: Store, hosts: frozenset[str], touched: Callable[[int], None]) -> None:
        self.app, self.store, self.hosts, self.touched = app, store, hosts, touched
        self.pace = keys.Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, request_id = time.perf_counter(), new_id("req_", 32)
        note: dict[str, Any] = dict(scope.get(WITHIN, {}))
        body = _Body(scope, receive)
        state = scope.setdefault("state", {})
        state["note"] = note  # routes add to the log line, such as the model
        status, logged = 0, False

        def log_once() -> None:
            nonlocal logged
            if not logged:
                logged = True
                milliseconds = round(1000 * (time.perf_counter() - begin), 1)
                path = re.sub(r"\bsk-[\w-]+", "sk-…", scope["path"][:PATH_LIMIT])  # a key may have been pasted there
                log("request", id=request_id, method=scope["method"], path=path, status=status, ms=milliseconds, **note)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400 and "owner" in note:
                    await body.drain()
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif not message.get("more_body", False):
                log_once()  # before the end leaves: who has an answer finds its line in the log
            await send(message)

        self.touched(+1)
        try:
            if WITHIN not in scope:  # else `note` tells the owner
                key = self._key(scope)
                note["owner"] = key.name
                self.pace.check(key)
            state["store"] = self.store.of(note["owner"])
            await self.app(scope, body.receive, send_with_id)
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
            log_once()  # also of an answer that did not come to its end

    def _key(self, scope: Scope) -> keys.Key:
        """The key of a request. Raises what refuses it before anything else looks at it."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = (host.rsplit(":", 1)[0] if not host.endswith("]") else host).lower()
        if name not in self.hosts and not _is_address(name, scope):
            raise ApiError(403, f"This service answers to {', '.join(sorted(self.hosts))} only, not to the Host header "
                                "of this request. Use the base URL that it printed when it started, or start it with "
                                "--allow-host NAME for another name of this machine.", "host_refused")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "No API key was sent. Send the header 'Authorization: Bearer KEY' with the key that "
                                "this service printed when it started; it stands in api_key in its home folder too.",
                           "invalid_api_key")
        found = keys.find(self.store, key.strip())
        if found is None:
            raise ApiError(401, "Incorrect API key provided. Use the key that this service printed when it started, "
                                "which stands in api_key in its home folder too, or one that was given to you and has "
                                "not been revoked.", "invalid_api_key")
        return found


def _is_address(name: str, scope: Scope) -> bool:
    """Whether a Host is the very address that the connection came in by, which no rebinding can feign."""
    try:
        mine = ipaddress.ip_address(scope["server"][0])
        asked = ipaddress.ip_address(name.strip("[]"))
    except (TypeError, ValueError):  # a name, or a server on no network
        return False
    return asked in (mine, getattr(mine, "ipv4_mapped", None))


class _Body:
    """A request's body on its way in: stopped when it is too large, without keeping any of the excess."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        path = scope["path"].rstrip("/")
        part = path.startswith("/v1/uploads/") and path.endswith("/parts")
        self.limit = UPLOAD_LIMIT if path == "/v1/files" else PART_LIMIT if part else BODY_LIMIT
        self._receive, self._total, self._more = receive, 0, True

    async def receive(self) -> Message:
        """The next piece, as the server gives it. Raises 413."""
        message = await self._receive()
        self._total += len(message.get("body", b""))
        self._more = message.get("more_body", False)
        if self._total > self.limit:
            raise ApiError(413, f"The body of the request is larger than {self.limit >> 20} MB. Send less at a time.",
                           "request_too_large")
        return message

    async def drain(self) -> None:
        """Read and drop the rest: a client that is still sending would not hear why it is refused."""
        while self._more and self._total < DRAIN_LIMIT:
            message = await self._receive()
            self._total += len(message.get("body", b""))
            self._more = message.get("more_body", False)
