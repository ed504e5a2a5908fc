"""What has been measured, in one SQLite file under `LABKIT_HOME`: runs, and single answers of models.

SQLite, since two notebooks may write at once and a kernel may die at any moment.
"""

import hashlib
import json
import platform
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import openai
import pandas as pd

import labkit
from labkit import paths

FILE = "measured.db"
TABLES = ("CREATE TABLE IF NOT EXISTS runs (key TEXT PRIMARY KEY, body TEXT NOT NULL)",
          "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body TEXT NOT NULL)")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
AT_ONCE = 500  # SQLite bounds the number of parameters of one statement


def runs(kind: str | None = None) -> pd.DataFrame:
    """Every run recorded on this machine, oldest first: settings, data digest, metrics and versions.

    `kind` is "sweep" or "ladder"; None gives both. A column that a run has no value for holds
    NaN. In a notebook: `labkit.runs().sort_values("accuracy")`, or compare today's run with the
    best one so far.
    """
    with _opened() as store:
        rows = [json.loads(body) for (body,) in store.execute("SELECT body FROM runs ORDER BY rowid")]
    table = pd.DataFrame(rows)
    return table if kind is None or table.empty else table[table["kind"] == kind].reset_index(drop=True)


def record(kind: str, key: str, **fields: Any) -> dict[str, Any]:
    """Write one run, replacing what was recorded under `key`; returns it with time and versions added."""
    row = {"kind": kind, "key": key, "recorded": datetime.now(timezone.utc).isoformat(timespec="seconds"), **fields,
           "labkit": labkit.__version__, "openai": openai.__version__, "python": platform.python_version()}
    with _opened() as store:
        store.execute("REPLACE INTO runs VALUES (?, ?)", (key, json.dumps(row)))
    return row


def recorded(key: str) -> dict[str, Any] | None:
    """The run of that key, or None."""
    with _opened() as store:
        found = store.execute("SELECT body FROM runs WHERE key = ?", (key,)).fetchone()
    return json.loads(found[0]) if found else None


def keep(found: Mapping[str, Any]) -> None:
    """Remember answers (anything JSON can hold) under their keys."""
    with _opened() as store:
        store.executemany("REPLACE INTO answers VALUES (?, ?)",
                          [(key, json.dumps(value)) for key, value in found.items()])


def kept(keys: Iterable[str]) -> dict[str, Any]:
    """Those of the keys that have a remembered answer, with it."""
    wanted, found = list(keys), {}
    with _opened() as store:
        for begin in range(0, len(wanted), AT_ONCE):
            some = wanted[begin : begin + AT_ONCE]
            query = f"SELECT key, body FROM answers WHERE key IN ({','.join('?' * len(some))})"
            found.update({key: json.loads(body) for key, body in store.execute(query, some)})
    return found


def digest(*parts: Any) -> str:
    """A short fingerprint (16 hexadecimal digits) of anything JSON can hold; tables count row by row."""
    plain = [part.to_dict("list") if isinstance(part, pd.DataFrame) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def host(client: openai.OpenAI) -> str:
    """Where a client's models live; all ports of this machine are one place, "local"."""
    name = client.base_url.host
    return "local" if name in LOOPBACK else name


@contextmanager
def _opened() -> Iterator[sqlite3.Connection]:
    """The store, committed when the block ends well."""
    store = sqlite3.connect(paths.home() / FILE, timeout=60)
    try:
        with store:
            for table in TABLES:
                store.execute(table)
            yield store
    finally:
        store.close()
