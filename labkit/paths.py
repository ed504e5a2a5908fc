"""Where labkit keeps things on disk, and how it writes there without leaving half a file.

Everything lives under one folder, `LABKIT_HOME` (default: the user's data folder for
"labkit", which differs between Linux, macOS and Windows). Deleting that folder resets
labkit completely; nothing else on the machine is touched.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

COURSE = Path(__file__).resolve().parent.parent  # the checkout: notebooks/, data/, slides/


def home() -> Path:
    """The labkit folder: `LABKIT_HOME` when set, else the per-user data folder. Created on use."""
    chosen = os.environ.get("LABKIT_HOME")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("labkit", False))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # the training files in it are nobody else's business
    return folder.resolve()


def within_home(*parts: str) -> Path:
    """A folder below `home()`, created on use: `within_home("cache", "prompts")`."""
    folder = home().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def replacing(target: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well.

    Readers see the old file or the whole new one, never a part. `durable` also syncs it to
    the disk before the swap; caches, which can be rebuilt, may leave that out.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def write_bytes(target: Path, content: bytes, private: bool = False) -> None:
    """Write `content` to `target` atomically; `private` lets only the owner read it (0600).

    Windows has no such bits: a file has the rights of its folder, and the user's data folder is the user's own.
    """
    with replacing(target) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(temporary, flags, 0o600 if private else 0o644), "wb") as handle:
            handle.write(content)


def write_text(target: Path, content: str, private: bool = False) -> None:
    """Write `content` to `target` as UTF-8, atomically."""
    write_bytes(target, content.encode(), private)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as handle:
        digest = hashlib.sha256()
        while piece := handle.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(piece)
    return digest.hexdigest()
