"""labkit doctor: what it finds, that each finding names its fix, and its exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

import labkit
from labkit import assets, checkup, fetch, paths, pricing
from labkit.checkup import Line
from tests.conftest import RunningService


def test_doctor_looks_at_everything_and_exits_by_its_findings(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(service.home))
    done = subprocess.run([sys.executable, "-m", "labkit", "doctor"], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert all(line.startswith(("[OK]", "[WARN]", "[FIX]")) for line in lines)
    assert all(" -> " in line for line in lines if not line.startswith("[OK]"))
    for part in ("Python 3", "LABKIT_HOME", "of disk", "of memory", "base-model", "package index", service.url,
                 "GFLOPS", "thread", "review"):
        assert part in done.stdout, part
    assert done.returncode == int(any(line.startswith("[FIX]") for line in lines)), done.stdout


def test_a_missing_package_is_to_be_fixed_and_another_version_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "COURSE", tmp_path)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# all\nno-such-package==1.0\npytest==0.1\npytest==0.2; python_version < '3'\n-e .\n")
    missing, other = list(checkup._packages())
    assert missing.state == "FIX" and "no-such-package" in missing.what and "pip install" in missing.fix
    assert other.state == "WARN" and "instead of ==0.1" in other.what
    requirements.write_text(f"pytest=={pytest.__version__}\n")
    assert [line.state for line in checkup._packages()] == ["OK"]


def test_a_home_that_cannot_be_written_is_to_be_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "file"))
    (line,) = checkup._home()
    assert line.state == "FIX" and "LABKIT_HOME" in line.fix


def test_a_damaged_asset_and_a_missing_network_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    assert assets.fault("posts") == "is not fetched yet"
    folder = paths.within_home("assets", "posts", "20newsgroups")
    recipe = fetch.pins("posts")["recipe"]
    (folder / "manifest.json").write_text(f'{{"recipe": {recipe}, "files": {{"posts.jsonl": "0"}}}}')
    (folder / "posts.jsonl").write_text("other")
    assert assets.fault("posts") == "has a damaged posts.jsonl"
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setattr(checkup, "HOSTS", ("localhost.invalid",))
    lines = {line.what: line for line in checkup._assets()}
    assert lines["posts has a damaged posts.jsonl, and no source answers"].state == "FIX"
    assert lines["localhost.invalid does not answer"].state == "WARN"


def test_a_torch_that_does_not_run_is_to_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "ASK_TORCH", "raise OSError('shm.dll not found')")
    line = checkup._engine()
    assert line.state == "FIX" and "shm.dll" in line.what


def test_facts_past_their_review_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    late = pricing.overdue("2027-03-01")
    monkeypatch.setattr(pricing, "overdue", lambda: late)
    lines = list(checkup._facts())
    assert len(lines) == len(late) > 10 and all(line.state == "WARN" and "data/" in line.fix for line in lines)


def test_doctor_prints_in_a_notebook_and_loads_no_torch(monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checkup, "examine", lambda: iter([Line("OK", "all well"), Line("FIX", "broken", "mend it")]))
    labkit.doctor()
    labkit.doctor()  # the name stays a function
    assert capsys.readouterr().out == "[OK]   all well\n[FIX]  broken -> mend it\n" * 2
