"""SQLite and blobs under one home folder.

    service.db        every file, job, event, checkpoint and model, as rows; the keys
    files/ID          the content of a file
    models/NAME/      an adapter
    jobs/ID/          a job's own copy of its data, its training state, its worker's log
    parts/ID/         the parts of an upload
    batches/ID/       a batch's own copy of its input, and its answers so far
    incoming/         what is not whole yet

A row holds the object as the API shows it (`body`) and what only the service knows (`inner`).
Every row has an owner, the name of the key that made it. `Store(home)` sees all rows and adds
none; `of(owner)` is the same store as that owner sees it.
The service and its workers write to the same database: WAL lets everybody read meanwhile, and
a write is acknowledged only when it is on the disk.
"""

import copy
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from labkit import paths
from labkit.errors import ServiceError
from labkit.service import objects
from labkit.service.objects import Body

STEPS = ("""
CREATE TABLE objects (
    n INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of creation, which lists are paged by
    kind TEXT NOT NULL,                   -- file, upload, part, batch, job, event, checkpoint, model
    id TEXT NOT NULL,
    parent TEXT NOT NULL,                 -- the job of an event or a checkpoint, a part's upload, else ''
    mark TEXT,                            -- what may happen to a parent only once
    body TEXT NOT NULL,
    inner TEXT NOT NULL
);
CREATE UNIQUE INDEX by_id ON objects (kind, id);
CREATE INDEX by_parent ON objects (kind, parent, n);
CREATE UNIQUE INDEX once ON objects (kind, parent, mark) WHERE mark IS NOT NULL;
""", """
ALTER TABLE objects ADD COLUMN owner TEXT NOT NULL DEFAULT 'default';
CREATE INDEX by_owner ON objects (kind, parent, owner, n);
CREATE TABLE keys (
    name TEXT PRIMARY KEY,
    digest BLOB NOT NULL,         -- SHA-256 of the key
    created_at INTEGER NOT NULL,
    jobs INTEGER,                 -- limits of the owner; NULL for none
    bytes INTEGER,
    requests_per_minute INTEGER
);
""")  # what to do, in this order, to a database of an older format; the format is the number of steps done
COLUMNS = "n, id, parent, owner, body, inner"
OWN = "owner = ifnull(?, owner)"


@dataclass(frozen=True)
class Row:
    """A stored object: `n` is its place in the order of creation."""

    n: int
    id: str
    parent: str
    owner: str
    body: Body
    inner: Body


class Store:
    """The state of one home folder; safe to use from many threads and processes."""

    def __init__(self, home: Path) -> None:
        """Open the home, bringing an older database up to date. Raises `ServiceError` for a newer one."""
        self.home = home
        self.owner: str | None = None  # all of them
        self.files, self.models, self.jobs = home / "files", home / "models", home / "jobs"
        self.parts, self.batches, self.incoming = home / "parts", home / "batches", home / "incoming"
        for folder in (self.files, self.models, self.jobs, self.parts, self.batches, self.incoming):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (home / "service.db").touch(0o600)  # SQLite gives its other files the same rights
        self._local = threading.local()
        with self.transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(STEPS):
                raise ServiceError(f"{home / 'service.db'} was written by a newer version of labkit (format {version}, "
                                   f"this one reads {len(STEPS)}). Use that version, or another LABKIT_HOME.")
            for number, step in enumerate(STEPS[version:], version + 1):
                for statement in step.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    def of(self, owner: str | None) -> "Store":
        """This store as `owner` sees it, who gets all that is added; None for a store that sees everything."""
        view = copy.copy(self)
        view.owner = owner
        return view

    @property
    def db(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "db"):
            db = sqlite3.connect(self.home / "service.db", timeout=10, isolation_level=None)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            self._local.db = db
        return self._local.db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All writes of the block or none; a block inside another is part of it."""
        db = self.db
        if db.in_transaction:
            yield db
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # a full disk may have rolled back already
                db.execute("ROLLBACK")
            raise

    def add(self, kind: str, body: Body, parent: str = "", inner: Body | None = None, mark: str | None = None) -> bool:
        """Store a new object; False if `mark` says that the parent has it already (then nothing changes)."""
        if self.owner is None:
            raise ValueError(f"a {kind} needs an owner: add it to store.of(owner)")
        with self.transaction() as db:
            done = db.execute(
                "INSERT INTO objects (kind, id, parent, owner, mark, body, inner) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (kind, parent, mark) WHERE mark IS NOT NULL DO NOTHING",
                (kind, body["id"], parent, self.owner, mark, _json(body), _json(inner or {})))
            return done.rowcount == 1

    def get(self, kind: str, id: str) -> Row | None:
        """The object of that id."""
        found = self.db.execute(f"SELECT {COLUMNS} FROM objects WHERE kind = ? AND id = ? AND {OWN}",
                                (kind, id, self.owner))
        return next(map(_row, found), None)

    def status(self, kind: str, id: str) -> str | None:
        """Only the status of an object: the cheapest question, asked at every step of a job."""
        found = self.db.execute(
            f"SELECT json_extract(body, '$.status') FROM objects WHERE kind = ? AND id = ? AND {OWN}",
            (kind, id, self.owner)).fetchone()
        return found[0] if found else None

    def rows(
        self,
        kind: str,
        parent: str = "",
        after: int | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        matching: Mapping[str, Collection[str]] | None = None,
    ) -> list[Row]:
        """Objects in the order of creation, beginning after row number `after`.

        `matching` names fields of the body and the values that each may have.
        """
        terms, values = ["kind = ?", "parent = ?"], [kind, parent]
        if self.owner is not None:
            terms.append("owner = ?")
            values.append(self.owner)
        if after is not None:
            terms.append("n < ?" if newest_first else "n > ?")
            values.append(after)  # type: ignore[arg-type]
        for name, wanted in (matching or {}).items():
            terms.append(f"json_extract(body, ?) IN ({', '.join('?' * len(wanted))})")
            values += [f"$.{name}", *wanted]
        order = "DESC" if newest_first else "ASC"
        found = self.db.execute(
            f"SELECT {COLUMNS} FROM objects WHERE {' AND '.join(terms)} ORDER BY n {order} LIMIT ?",
            (*values, -1 if limit is None else limit))
        return [_row(columns) for columns in found]

    def change(
        self, kind: str, id: str, body: Body | None = None, inner: Body | None = None,
        expect: Collection[str] | None = None,
    ) -> Row | None:
        """Set some fields of an object; None, and nothing changed, if its status is none of `expect`."""
        with self.transaction() as db:
            row = self.get(kind, id)
            if row is None or (expect is not None and row.body["status"] not in expect):
                return None
            changed = replace(row, body={**row.body, **(body or {})}, inner={**row.inner, **(inner or {})})
            db.execute("UPDATE objects SET body = ?, inner = ? WHERE n = ?",
                       (_json(changed.body), _json(changed.inner), row.n))
            return changed

    def remove(self, kind: str, id: str) -> bool:
        """Delete an object's row; False if there was none."""
        with self.transaction() as db:
            done = db.execute(f"DELETE FROM objects WHERE kind = ? AND id = ? AND {OWN}", (kind, id, self.owner))
            return done.rowcount == 1

    def remove_children(self, kind: str, parent: str) -> None:
        """Delete the rows of that kind which belong to `parent`."""
        with self.transaction() as db:
            db.execute(f"DELETE FROM objects WHERE kind = ? AND parent = ? AND {OWN}", (kind, parent, self.owner))

    # --- blobs -------------------------------------------------------------------------------

    def adopt(self, temporary: Path, body: Body) -> None:
        """Make an uploaded or computed file, whole at `temporary`, the content of file `body`."""
        target = self.files / body["id"]
        paths.sync(temporary)
        os.replace(temporary, target)
        try:
            self.add("file", body)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def delete_file(self, id: str) -> bool:
        """Delete a file: its row first, so that a crash leaves an orphan that `sweep` removes."""
        if not self.remove("file", id):
            return False
        (self.files / id).unlink(missing_ok=True)
        return True

    def delete_model(self, name: str) -> bool:
        """Delete a fine-tuned model or a checkpoint's, with its adapter."""
        row = self.get("model", name)
        if row is None or not self.remove("model", name):
            return False
        shutil.rmtree(self.models / row.inner["folder"], ignore_errors=True)
        return True

    def stored_bytes(self) -> int:
        """The size of all files, models, checkpoints, and of the parts of uploads, together.

        A deleted file counts as long as an unfinished job or batch still has its copy of it.
        """
        stored = self.db.execute(
            "SELECT ifnull(sum(json_extract(CASE kind WHEN 'file' THEN body ELSE inner END, '$.bytes')), 0) "
            f"FROM objects WHERE kind IN ('file', 'part', 'model') AND {OWN}", (self.owner,)).fetchone()[0]
        copies = [(row.body[f"{name}_file"], self.jobs / row.id / f"{name}.jsonl")
                  for row in self.rows("job", matching={"status": objects.PENDING})
                  for name in ("training", "validation") if row.body[f"{name}_file"]]
        copies += [(row.body["input_file_id"], self.batches / row.id / "input.jsonl")
                   for row in self.rows("batch", matching={"status": objects.UNFINISHED})]
        return stored + sum({id: _size(path) for id, path in copies if not self.get("file", id)}.values())

    def expired(self, time: int) -> list[str]:
        """The ids of everybody's files that expire at or before `time`, in seconds since 1970."""
        found = self.db.execute(
            "SELECT id FROM objects WHERE kind = 'file' AND parent = '' AND json_extract(body, '$.expires_at') <= ?",
            (time,))
        return [id for (id,) in found]

    def keep_copy(self, source: Path, target: Path) -> None:
        """A second name for a file that is never changed in place; it outlives the first."""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)  # costs no space
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)

    def sweep(self) -> None:
        """Remove what a crash left without a row. Only while no request and no worker is running."""
        files = {row.id for row in self.rows("file")}
        jobs = self.rows("job")
        folders = {row.inner["folder"] for row in self.rows("model")}
        coming = {row.inner["model_id"] for row in jobs if row.body["finished_at"] is None}
        _remove(path for path in self.files.iterdir() if path.name not in files)
        _remove(path for path in self.jobs.iterdir() if path.name not in {row.id for row in jobs})
        # The adapter of an unfinished job's next checkpoint is there before its row is.
        _remove(path for path in self.models.iterdir()
                if path.name not in folders and path.name.split("-")[0] not in coming)
        uploads = {row.id for row in self.rows("upload", matching={"status": ["pending"]})}
        batches = {row.id for row in self.rows("batch", matching={"status": objects.UNFINISHED})}
        _remove(path for path in self.parts.iterdir() if path.name not in uploads)
        _remove(path for path in self.batches.iterdir() if path.name not in batches)
        _remove(self.incoming.iterdir())


def _size(path: Path) -> int:
    """In bytes; 0 for what has just been removed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _json(value: Body) -> str:
    return json.dumps(value, allow_nan=False)  # SQLite's JSON functions refuse NaN


def _row(columns: tuple[int, str, str, str, str, str]) -> Row:
    n, id, parent, owner, body, inner = columns
    return Row(n, id, parent, owner, json.loads(body), json.loads(inner))
