"""A full disk, a real one: it fails the one request, pauses the job, and hurts nothing that is stored."""

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from labkit.service.worker import DISK_FULL
from tests.conftest import RunningService, posts, upload, wait_until
from tests.service.test_jobs import at_step
from tests.service.test_recovery import Outcome, outcome, own, start, undisturbed  # noqa: F401 (two are fixtures)

SIZE = "8m"


@pytest.fixture
def small(
    tiny_model: Path, tmp_path: Path, own: RunningService, undisturbed: Outcome  # noqa: F811
) -> Iterator[RunningService]:
    """A service whose home is a disk of `SIZE` bytes; it computes in the way that was the quickest for `own`."""
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(home)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted on Linux by root only")
    try:
        shutil.copy(own.home / "machine.json", home)
        running = RunningService(home, tiny_model, warm=False)
        yield running
        running.stop()
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)


def fill(home: Path) -> Path:
    """A file that leaves no byte of the disk free."""
    path = home / "filler"
    with open(path, "wb", buffering=0) as handle:
        try:
            while True:
                handle.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path


def assert_full(ask: object) -> None:
    """Asking fails as it should, at once."""
    with pytest.raises(openai.InternalServerError) as full:
        ask()  # type: ignore[operator]
    assert full.value.status_code == 507 and full.value.code == "insufficient_storage"
    assert full.value.response.headers["x-should-retry"] == "false"


def test_a_full_disk_pauses_the_job_and_nothing_is_lost(small: RunningService, undisturbed: Outcome) -> None:  # noqa: F811
    client, jobs = small.client, small.client.fine_tuning.jobs
    other = upload(client, posts(30))
    job_id = start(small)
    wait_until(lambda: at_step(client, job_id, 22))
    filler = fill(small.home)
    wait_until(lambda: any(line["code"] == DISK_FULL for line in small.log("worker_ended")))
    assert_full(lambda: client.files.create(file=("x", bytes(1 << 20)), purpose="user_data"))
    assert not list((small.home / "incoming").iterdir())
    assert client.files.content(other).content == posts(30)
    filler.unlink()
    wait_until(lambda: jobs.retrieve(job_id).status == "paused")
    [told] = [event for event in jobs.list_events(job_id) if event.level == "error"]
    assert "disk" in told.message and f"resume('{job_id}')" in told.message
    assert jobs.resume(job_id).status == "queued"
    assert outcome(small, job_id) == undisturbed
