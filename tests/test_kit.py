"""`labkit kit` on a small course: what is gathered, what a second run keeps, and that it installs with no network.

The whole kit takes a download of several hundred megabytes; here the course has one package, and of the assets the
smallest.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from labkit import assets, kit, paths
from labkit.errors import LabkitError

COURSE = paths.COURSE


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with the few files of labkit that the kit's own course needs, in place of the real one."""
    folder = tmp_path / "clone"
    for name in ("labkit/__init__.py", "labkit/paths.py", "data/assets.json", "pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(COURSE / name, folder / name)
    text = (folder / "pyproject.toml").read_text("utf-8")
    (folder / "pyproject.toml").write_text(text[:text.index("dependencies")] + text[text.index("[project.scripts]"):])
    lines = (COURSE / "requirements.txt").read_text("utf-8").splitlines()
    kept = [line for line in lines if line.startswith("platformdirs==")]
    (folder / "requirements.txt").write_text("\n".join(["# one package", *kept, "-e ."]) + "\n")
    (folder / "notes.txt").write_text("as committed")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    (folder / "notes.txt").write_text("changed since")
    monkeypatch.setattr(paths, "COURSE", folder)
    monkeypatch.setattr(kit, "ASSETS", {"gpt3-vocabulary": assets.gpt3_vocabulary})
    return folder


def run(kit_folder: Path, target: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """install.py as a learner starts it, with no package index and no settings of this machine."""
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "LABKIT_HOME": str(home)}
    return subprocess.run([sys.executable, str(kit_folder / "install.py"), str(target)], env=clean() | offline,
                          text=True, capture_output=True, check=False)


def clean() -> dict[str, str]:
    """The environment without what leads Python or pip elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and name != "PYTHONPATH"}


def test_a_kit_is_gathered_once_and_installs_with_no_network(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, target, home = tmp_path / "kit", tmp_path / "learner", tmp_path / "home"
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "old-1-py3-none-any.whl").write_bytes(b"of an earlier version")
    assert kit.gather(folder) == 0
    said = capfd.readouterr()
    assert "1 files are left out" in said.err and f"{folder}: " in said.out
    wheels = {path.name.split("-")[0]: path.stat().st_mtime_ns for path in (folder / "wheels").iterdir()}
    assert set(wheels) == {"platformdirs", "setuptools"}
    assert (folder / "course" / "notes.txt").read_text() == "as committed"
    assert {path.name for path in folder.iterdir()} == {"README.md", "SHA256SUMS", "assets", "course", "install.py",
                                                        "made_for.txt", "wheels"}

    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # a second run asks no index
    kit.gather(folder)
    assert wheels == {path.name.split("-")[0]: path.stat().st_mtime_ns for path in (folder / "wheels").iterdir()}

    done = run(folder, target, home)
    assert done.returncode == 0, done.stdout + done.stderr
    python = target / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import labkit, platformdirs; print(labkit.__file__)"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, env=clean(), capture_output=True,
                           text=True, check=True)
    assert Path(found.stdout.strip()) == target / "labkit" / "__init__.py"
    monkeypatch.setenv("LABKIT_HOME", str(home))
    assert assets.fault("gpt3-vocabulary") is None
    assert "is there already" in run(folder, target, home).stderr

    (folder / "course" / "notes.txt").write_text("torn")
    refused = run(folder, tmp_path / "other", home)
    assert refused.returncode == 1 and "Damaged or missing: course/notes.txt" in refused.stderr
    (folder / "SHA256SUMS").unlink()
    assert "not complete" in run(folder, tmp_path / "other", home).stderr
    (folder / "made_for.txt").write_text("Python 2.7 on Amiga m68k\n")
    assert "This kit is for Python 2.7 on Amiga" in run(folder, tmp_path / "other", home).stderr
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_fetched_is_told_and_leaves_no_kit_that_looks_whole(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (course / "requirements.txt").write_text("no-such-package-of-this-course==1.0\n-e .\n")
    subprocess.run(["git", "-C", str(course), "-c", "user.name=a", "-c", "user.email=a@example.org", "commit",
                    "--quiet", "-am", "more"], check=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(kit, "ASSETS", {})
    folder = tmp_path / "kit"
    with pytest.raises(LabkitError, match="pip could not fetch all packages.*labkit kit"):
        kit.gather(folder)
    assert {path.name for path in folder.iterdir()} == {"course", "wheels"}


def test_what_is_no_clone_and_a_folder_in_the_home_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "COURSE", tmp_path)
    with pytest.raises(LabkitError, match="no clone of the repository"):
        kit.gather(tmp_path / "kit")
    with pytest.raises(LabkitError, match="inside LABKIT_HOME"):
        kit.gather(paths.home() / "kit")
