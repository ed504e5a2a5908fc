"""Keys, the owners they stand for, and what each owner may use.

A key is made here, shown once, and kept as its SHA-256 only. A plain hash is enough: slow hashes
protect passwords that can be guessed, and nobody guesses one of 2^192 random keys. An owner is a
key's name; all that is made with the key belongs to it, and stays when the key is revoked.

Routes take the store as the owner of the request sees it, by a parameter of the type `Mine`.
"""

import hashlib
import hmac
import math
import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from labkit.errors import LabkitError
from labkit.service import objects
from labkit.service.errors import ApiError
from labkit.service.store import Store

DEFAULT = "default"  # the name of the key in the home folder, and the owner of all that is older than owners are
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
COLUMNS = "name, created_at, jobs, bytes, requests_per_minute"
FIND_ALL = f"SELECT {COLUMNS}, digest FROM keys ORDER BY created_at, name"
JOB_RETRY_SECONDS = 60  # when nothing is known of the time that an owner's jobs will take


@dataclass(frozen=True)
class Key:
    """A key's name, when it was made (seconds since 1970), and its owner's limits; None for no limit."""

    name: str
    created_at: int
    jobs: int | None
    bytes: int | None
    requests_per_minute: int | None


def new_key() -> str:
    """A fresh key of 192 random bits."""
    return f"sk-local-{secrets.token_urlsafe(24)}"


def add(store: Store, name: str, jobs: int | None = None, bytes: int | None = None,
        requests_per_minute: int | None = None) -> str:
    """Make a key and return it. Raises `LabkitError` for a bad name, or one that has a key already."""
    if not NAME.fullmatch(name) or name == DEFAULT:
        raise LabkitError(f"{name!r} cannot be a key's name. Use up to 64 letters, digits and . _ @ -, beginning with "
                          f"a letter or digit, and not {DEFAULT!r}, which is the key of this machine.")
    key = new_key()
    with store.transaction() as db:
        done = db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                          (name, _digest(key), objects.now(), jobs, bytes, requests_per_minute))
        if done.rowcount == 0:
            raise LabkitError(f"{name!r} has a key already. Revoke it first to make a new one: "
                              f"labkit keys revoke {name}")
    return key


def set_default(store: Store, key: str) -> None:
    """Let `key` be the one of this machine, without limits."""
    with store.transaction() as db:
        db.execute("INSERT INTO keys VALUES (?, ?, ?, NULL, NULL, NULL) "
                   "ON CONFLICT (name) DO UPDATE SET digest = excluded.digest",
                   (DEFAULT, _digest(key), objects.now()))


def revoke(store: Store, name: str) -> int:
    """Make a key worthless at once, pause its owner's jobs and cancel the batches; returns how many jobs.

    Raises `LabkitError` for the default key and for a name without a key.
    """
    if name == DEFAULT:
        raise LabkitError(f"The key {DEFAULT!r} is this machine's own. To replace it, stop the service, delete the "
                          f"file {store.home / 'api_key'} and start again.")
    with store.transaction() as db:
        if db.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount == 0:
            raise LabkitError(f"There is no key {name!r}. labkit keys list shows all.")
        own, active = store.of(name), ("validating_files", "queued", "running")
        jobs = own.rows("job", matching={"status": active})
        for job in jobs:
            own.change("job", job.id, {"status": "paused", "estimated_finish": None}, {"place": None})
            own.add("event", objects.event("Fine-tuning job paused: the key that made it was revoked"), job.id)
        for batch in own.rows("batch", matching={"status": ("validating", "in_progress")}):
            own.change("batch", batch.id, {"status": "cancelling", "cancelling_at": objects.now()})
    return len(jobs)


def every(store: Store) -> list[Key]:
    """All keys, oldest first."""
    return [Key(*columns[:-1]) for columns in store.db.execute(FIND_ALL)]


def table(store: Store) -> str:
    """All keys with what their owners use and may use, for reading."""
    rows = [("NAME", "SINCE", "UNFINISHED JOBS", "STORED BYTES", "REQUESTS A MINUTE")]
    for key in every(store):
        own = store.of(key.name)
        jobs = len(own.rows("job", matching={"status": objects.PENDING}))
        rows.append((key.name, time.strftime("%Y-%m-%d", time.localtime(key.created_at)), _used(jobs, key.jobs),
                     _used(own.stored_bytes(), key.bytes), _used(None, key.requests_per_minute)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def find(store: Store, key: str) -> Key | None:
    """What is known of a key, or None for a wrong one. Takes the same time wherever two keys differ."""
    digest, found = _digest(key), None
    for columns in store.db.execute(FIND_ALL):
        if hmac.compare_digest(columns[-1], digest):
            found = Key(*columns[:-1])
    return found


def check_jobs(store: Store) -> None:
    """Raises 429 when the owner has as many unfinished jobs as the key allows."""
    limit, jobs = _limits(store).jobs, store.rows("job", matching={"status": objects.PENDING})
    if limit is None or len(jobs) < limit:
        return
    ends = [job.body["estimated_finish"] - objects.now() for job in jobs if job.body["estimated_finish"]]
    wait = max(1, min(ends, default=JOB_RETRY_SECONDS))
    raise ApiError(429, f"Your key allows {limit} unfinished fine-tuning job{'s' * (limit != 1)} at a time, and you "
                        "have as many. Wait until one has ended, or cancel one: " + ", ".join(job.id for job in jobs),
                   "rate_limit_exceeded", retry=False, headers={"Retry-After": str(wait)})


def check_bytes(store: Store, size: int, param: str = "file") -> None:
    """Raises 403 when the owner may not store `size` bytes more than now."""
    limit = _limits(store).bytes
    if limit is not None and (stored := store.stored_bytes()) + size > limit:
        raise ApiError(403, f"Your key allows {limit:,} bytes of files and models. {stored:,} are stored, so this does "
                            "not fit in. Delete what you no longer need with files.delete and models.delete.",
                       "storage_limit_exceeded", param)


class Pace:
    """Holds owners to their requests a minute. An owner that was silent for a minute may send all at once."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}  # requests left, and when that was so

    def check(self, key: Key) -> None:
        """Count a request. Raises 429 when there are too many."""
        limit, now = key.requests_per_minute, time.monotonic()
        if limit is None:
            return
        left, then = self._left.get(key.name, (float(limit), now))
        left = min(float(limit), left + (now - then) * limit / 60)
        self._left[key.name] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / limit)
            raise ApiError(429, f"Your key allows {limit} requests a minute. Send the next one in {wait} s.",
                           "rate_limit_exceeded", headers={"Retry-After": str(wait)})


async def _mine(request: Request) -> Store:
    return request.state.store


Mine = Annotated[Store, Depends(_mine)]


def _limits(store: Store) -> Key:
    found = store.db.execute(f"SELECT {COLUMNS} FROM keys WHERE name = ?", (store.owner,)).fetchone()
    if found is None:  # revoked at this moment
        raise ApiError(401, "Incorrect API key provided. It was revoked.", "invalid_api_key")
    return Key(*found)


def _used(amount: int | None, limit: int | None) -> str:
    shown = [f"{number:,}" for number in (amount, limit) if number is not None]
    return " of ".join(shown) if shown else "any"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
