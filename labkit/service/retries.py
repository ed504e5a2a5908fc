"""Requests that the SDK sends again, because the reply to the first try was lost: they must not act twice.

The SDK sends no idempotency key. It tells by a header that a request is a retry, and repeats the body.
"""

import hashlib

from fastapi import Request
from pydantic import BaseModel

from labkit.service import objects
from labkit.service.store import Row, Store

WINDOW = 1200  # seconds; the SDK gives up on a request after 600 and tries again


def retried(request: Request) -> bool:
    """Whether the SDK has sent this request before."""
    return request.headers.get("x-stainless-retry-count", "0") not in ("", "0")


def fingerprint(body: BaseModel) -> str:
    """What two tries of one request have in common; kept in the `inner` of what they create."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()


def earlier(store: Store, kind: str, fingerprint: str) -> Row | None:
    """The object of that kind that an earlier try of the same request made.

    It is the owner's latest one with the very same body of the last minutes. This errs in one case
    only: of two objects that are meant to be equal, the second one's first try never arrives.
    """
    latest = store.rows(kind, newest_first=True, limit=50)
    return next((row for row in latest if row.inner["fingerprint"] == fingerprint
                 and row.body["status"] != "cancelled"  # whoever cancelled it has had the answer
                 and row.body["created_at"] > objects.now() - WINDOW), None)
