"""`labkit kit DIR`: everything that is needed to teach without network, in one folder to copy from a USB stick.

    DIR/README.md        how to install from it
    DIR/install.py       does so; needs Python alone
    DIR/course/          the repository, as committed
    DIR/wheels/          all packages of requirements.txt, for one platform and one version of Python
    DIR/assets/          model, posts and vocabulary, as in LABKIT_HOME
    DIR/SHA256SUMS       written last: a kit without it is not complete

What is there already and whole is kept, so that a run that was interrupted can be repeated.
"""

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from labkit import assets, fetch, paths
from labkit.errors import AssetError, LabkitError

ASSETS: dict[str, Callable[[], Path]] = {
    "base-model": assets.base_model,
    "posts": lambda: assets.posts().parent,
    "gpt3-vocabulary": assets.gpt3_vocabulary,
}
SUMS = "SHA256SUMS"


def gather(folder: Path, torch_index: str | None = None) -> int:
    """Fill `folder`, show the steps on stderr, print the kit's size; returns 0.

    `torch_index` is the package index that torch is taken from (default: pip's own). Raises
    `LabkitError` when something cannot be fetched or written.
    """
    begin = time.monotonic()
    folder = folder.resolve()
    if folder.is_relative_to(paths.home()):
        raise LabkitError(f"{folder} lies inside LABKIT_HOME. Name a folder elsewhere.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMS).unlink(missing_ok=True)
        fetch.say("1 of 4: the course")
        _copy_course(folder / "course")
        fetch.say("2 of 4: model and data")
        for name, fetched in ASSETS.items():
            _copy_asset(name, fetched(), folder / "assets")
        fetch.say(f"3 of 4: packages for Python {_python()} on {platform.system()} {platform.machine()}")
        _fill_wheels(folder / "wheels", folder / "course", torch_index)
        fetch.say("4 of 4: checksums")
        _write_instructions(folder)
        size = _write_sums(folder)
    except OSError as error:
        raise LabkitError(f"The kit cannot be written ({error}). Free some space, or name a folder on another disk; "
                          "what is there already is kept.") from error
    print(f"{folder}: {size / 1e6:,.0f} MB, gathered in {time.monotonic() - begin:.0f} s. Copy the whole folder; "
          "its README.md tells how to install from it.")
    return 0


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _copy_course(target: Path) -> None:
    """The repository as committed, so that nobody's answers and trials go along."""
    git = ["git", "-C", str(paths.COURSE)]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".course-", ignore_cleanup_errors=True) as scratch:
        archive = Path(scratch) / "course.tar"
        try:
            done = subprocess.run([*git, "archive", "--format=tar", f"--output={archive}", "HEAD"],
                                  capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise LabkitError("The kit takes the course's files from git, which is not installed here.") from error
        if done.returncode:
            raise LabkitError(f"The kit takes the course's files from git, and {paths.COURSE} is no clone of the "
                              f"repository ({done.stderr.strip()}). Run it from one: git clone …")
        with tarfile.open(archive) as packed:
            if hasattr(tarfile, "data_filter"):  # not in the first releases of 3.10 and 3.11
                packed.extraction_filter = tarfile.data_filter
            packed.extractall(Path(scratch) / "course")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(Path(scratch) / "course", target)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    if changed.strip():
        fetch.say(f"the kit holds what is committed; changes to {len(changed.splitlines())} files are left out")


def _copy_asset(name: str, source: Path, assets_folder: Path) -> None:
    """Copy one asset's folder under `assets_folder`, unless it is there and whole."""
    if not source.is_relative_to(paths.home()):
        raise LabkitError(f"LABKIT_BASE_MODEL names {source}. Unset it: the kit is made of the course's own model.")
    target, pin = assets_folder / name / source.name, fetch.pins(name)
    if target.is_dir() and fetch.fault_of(target, pin, progress=True) is None:
        return
    shutil.rmtree(assets_folder / name, ignore_errors=True)
    target.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copy-", ignore_cleanup_errors=True) as scratch:
        shutil.copytree(source, Path(scratch) / source.name)
        os.replace(Path(scratch) / source.name, target)


# --- packages ---


def _fill_wheels(wheels: Path, course: Path, torch_index: str | None) -> None:
    """Fetch or build every wheel that is missing; remove those that are not needed (any more)."""
    wheels.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels.parent, prefix=".wheels-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        wanted = _requirements(course)
        listed = scratch / "requirements.txt"
        listed.write_text("\n".join(wanted) + "\n", "utf-8")
        needed, said = _needed(wheels, listed)
        if needed is None:
            torch = [line for line in wanted if torch_index and line.startswith("torch==")]
            for line in torch:
                _build(wheels, scratch, ["--index-url", str(torch_index), line])
            _build(wheels, scratch, ["-r", str(listed)])
            needed, said = _needed(wheels, listed)
        if needed is None:
            raise AssetError(f"The packages are fetched, but pip cannot install from them alone:\n{said}")
    for wheel in wheels.glob("*.whl"):
        if wheel.name not in needed:
            wheel.unlink()


def _requirements(course: Path) -> list[str]:
    """The lines of requirements.txt without the course itself, and what pip needs to install that."""
    lines = [line.split("#")[0].strip() for line in (course / "requirements.txt").read_text("utf-8").splitlines()]
    build = re.search(r"^requires = (\[.*?\])", (course / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert build, "pyproject.toml names no build requirements"
    return [line for line in lines if line and line != "-e ."] + ast.literal_eval(build[1])


def _needed(wheels: Path, listed: Path) -> tuple[set[str] | None, str]:
    """The names of the wheels that pip would install with no network; None, and its words, if some are missing."""
    done = _pip("install", "--dry-run", "--ignore-installed", "--no-index", "--only-binary", ":all:", "--quiet",
                "--report", "-", "--find-links", str(wheels), "-r", str(listed), alone=True)
    if done.returncode:
        return None, done.stderr.strip()
    urls = [item["download_info"]["url"] for item in json.loads(done.stdout)["install"]]
    return {urllib.parse.unquote(url).rsplit("/", 1)[1] for url in urls}, ""


def _build(wheels: Path, scratch: Path, what: list[str]) -> None:
    """Let pip fetch wheels, or build them where there are only sources, and move them to their place when whole."""
    made = scratch / "made"
    done = _pip("wheel", "--find-links", str(wheels), "--wheel-dir", str(made), *what)
    if done.returncode:
        raise AssetError(f"pip could not fetch all packages; its last words stand above. Connect this machine to "
                         f"the internet and run `labkit kit {wheels.parent}` again: pip's cache keeps what has come.")
    for wheel in made.glob("*.whl"):
        os.replace(wheel, wheels / wheel.name)


def _pip(*arguments: str, alone: bool = False) -> subprocess.CompletedProcess[str]:
    """Run pip; `alone` without regard to settings that name other places for wheels, and with its words caught."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    environment = dict(os.environ)
    if alone:
        environment = {name: value for name, value in environment.items() if not name.startswith("PIP_")}
        environment["PIP_CONFIG_FILE"] = os.devnull
    pipe = subprocess.PIPE if alone else None
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe or sys.stderr, stderr=pipe,
                          text=True, encoding="utf-8", errors="replace", check=False)


# --- what goes with it ---


def _write_instructions(folder: Path) -> None:
    """README.md and install.py, with what they must know of this machine."""
    made_for = f"Python {_python()} on {platform.system()} {platform.machine()}"
    template = (Path(__file__).parent / "kit_readme.md").read_text("utf-8")
    paths.write_text(folder / "README.md", template.replace("{made_for}", made_for).replace("{python}", _python()))
    paths.write_text(folder / "made_for.txt", made_for + "\n")
    shutil.copy(Path(__file__).parent / "kit_install.py", folder / "install.py")


def _write_sums(folder: Path) -> int:
    """Write the SHA-256 of every file, in the format of `sha256sum`; returns the bytes of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{paths.sha256(file)}  {file.relative_to(folder).as_posix()}\n"
             for file in tqdm(files, "checksums", delay=1, leave=False)]
    paths.write_text(folder / SUMS, "".join(lines))
    return sum(file.stat().st_size for file in files)
