"""One error shape everywhere: {"error": {"message", "type", "param", "code"}}.

Messages say what is wrong, where, and the next step. Codes are OpenAI's where OpenAI has one.
"""

import errno
import sqlite3
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect


class ApiError(HTTPException):
    """An answer with an error status. `retry` False tells the SDK not to try again by itself."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        retry: bool | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        if retry is not None:
            self.headers = {**(headers or {}), "x-should-retry": str(retry).lower()}
        self.message, self.code, self.param = message, code, param
        self.kind = kind or _kind(status)

    def body(self) -> dict[str, Any]:
        """The error as it goes over the wire, in a reply or inside a stream."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a whole reply."""
        return JSONResponse(self.body(), self.status_code, self.headers)


class JobError(Exception):
    """What ends a job as failed, in the shape of `job.error`."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.body: dict[str, Any] = {"code": code, "message": message, "param": param}


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """A 400: the request itself has to change."""
    return ApiError(400, message, code, param)


def internal_error() -> ApiError:
    """A 500 that tells nothing of the inside; the log has the place, under the same request id."""
    return ApiError(500, "The service failed on this request. Its log tells where, under the request id "
                         "of this reply's x-request-id header.", "internal_error")


def from_exception(error: BaseException) -> ApiError | None:
    """The reply for an exception that is no programming error, or None."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):  # nobody reads it; the log line shows the status
        return ApiError(499, "The client left before its request was whole.", "client_closed_request")
    if disk_full(error):
        return ApiError(507, "The disk of this service is full, so nothing of this request was kept. Delete files "
                             "or models, or free disk space, and send the request again.",
                        "insufficient_storage", retry=False)
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return ApiError(503, "The service's database is busy. Send the request again.", "database_busy")
    return None


def disk_full(error: BaseException) -> bool:
    """Whether an exception says that there is no room on the disk."""
    if isinstance(error, sqlite3.OperationalError):
        return "full" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def install(app: FastAPI) -> None:
    """Answer all errors of `app` in the one shape."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(StarletteHTTPException, _on_http)
    app.add_exception_handler(OSError, _on_storage)
    app.add_exception_handler(sqlite3.OperationalError, _on_storage)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    if isinstance(error, ApiError):
        return error.response()
    if error.status_code == 404:
        return ApiError(404, f"Unknown request URL: {request.method} {request.url.path}. Either this service does not "
                             "offer it, or the base URL is wrong: it must end in /v1 and nothing more.",
                        "unknown_url").response()
    if error.status_code == 405:
        return ApiError(405, f"{request.url.path} does not answer {request.method}.", "method_not_allowed",
                        headers=dict(error.headers or {})).response()
    if isinstance(error.__cause__, RecursionError):
        return bad_request("The body is nested far too deep. Send less nesting.", code="invalid_json").response()
    message = "The body of the request could not be read." if error.status_code == 400 else str(error.detail)
    return ApiError(error.status_code, message, "invalid_body", headers=dict(error.headers or {})).response()


async def _on_storage(request: Request, error: Exception) -> JSONResponse:
    known = from_exception(error)
    if known is None:
        raise error
    return known.response()


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


def from_validation(problems: Sequence[Any]) -> ApiError:
    """The first of pydantic's findings, in OpenAI's words. The value itself is never repeated."""
    problem = problems[0]
    kind, place = problem["type"], problem["loc"][1:]
    if kind == "json_invalid":
        return bad_request(f"The body is not valid JSON: {problem['ctx']['error']} at character {place[0] + 1}.",
                           code="invalid_json")
    param = _path(place)
    if not param:
        return bad_request("The body must be a JSON object, sent with the header Content-Type: application/json.",
                           code="invalid_json")
    if kind == "extra_forbidden":
        return bad_request(f"Unknown parameter: '{param}'. Remove it; nothing is silently ignored here.",
                           param, "unknown_parameter")
    if kind == "missing":
        return bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    said = problem["msg"].removeprefix("Value error, ")
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return bad_request(f"Invalid '{param}': {said[0].lower()}{said[1:].rstrip('.')}.", param, code)


def _path(place: Sequence[str | int]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`."""
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
