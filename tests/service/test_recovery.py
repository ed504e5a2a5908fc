"""Nothing lost: killed workers and services, torn states, pauses, second services."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from labkit.engine.adapter import WEIGHTS
from tests.conftest import START, RunningService, finished, posts, supervised, upload, wait_until
from tests.service.test_jobs import at_step

METHOD = supervised(n_epochs=24, batch_size=8)  # 120 steps, five an epoch
Outcome = tuple[bytes, bytes, list[str]]


@pytest.fixture(scope="module")
def own(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that may be killed; it only trains, so it need not load the model at every start."""
    running = RunningService(tmp_path_factory.mktemp("own") / "home", tiny_model, warm=False)
    yield running
    running.stop()


def start(service: RunningService) -> str:
    """The same job every time, seed included."""
    client = service.client
    files = {"training_file": upload(client, posts()), "validation_file": upload(client, posts(10))}
    return client.fine_tuning.jobs.create(model="tiny-llama", seed=5, method=METHOD, **files).id


def outcome(service: RunningService, job_id: str) -> Outcome:
    """The adapter's bytes, the result file, and the names of the steps' events."""
    job = finished(service.client, job_id)
    assert job.status == "succeeded", job.error
    folder = (job.fine_tuned_model or "").rsplit(":", 1)[1]
    weights = (service.home / "models" / folder / WEIGHTS).read_bytes()
    events = service.client.fine_tuning.jobs.list_events(job_id, limit=100)
    steps = [event.message for event in events if event.type == "metrics"]
    return weights, service.client.files.content(job.result_files[0]).content, steps


@pytest.fixture(scope="module")
def undisturbed(own: RunningService) -> Outcome:
    return outcome(own, start(own))


def worker(service: RunningService, job_id: str) -> int:
    """The process id of the latest worker that trains this job."""
    return [line["pid"] for line in service.log("worker") if line["job"] == job_id and line["task"] == "train"][-1]


def test_kills_and_a_torn_state_change_nothing(own: RunningService, undisturbed: Outcome) -> None:
    job_id = start(own)
    wait_until(lambda: at_step(own.client, job_id, 22))
    os.kill(worker(own, job_id), signal.SIGKILL)
    wait_until(lambda: at_step(own.client, job_id, 48))
    known = [event.id for event in own.client.fine_tuning.jobs.list_events(job_id, limit=100)]
    training = worker(own, job_id)
    own.kill()
    wait_until(lambda: not alive(training), 5)  # nothing trains orphaned
    states = sorted((own.home / "jobs" / job_id / "state").iterdir())
    newest = [state for state in states if (state / "complete.json").exists()][-1]
    weights = newest / "training_state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] + bytes(100))
    own.start()
    assert own.client.fine_tuning.jobs.retrieve(job_id).status == "running"
    weights_after, result, steps = outcome(own, job_id)
    events = list(own.client.fine_tuning.jobs.list_events(job_id, limit=100))
    assert set(known) <= {event.id for event in events}
    assert any("signal 9" in event.message and event.level == "warn" for event in events)
    assert (weights_after, result) == undisturbed[:2]
    assert steps == undisturbed[2]


def test_one_process_trains_job_after_job_to_the_same_result(own: RunningService, undisturbed: Outcome) -> None:
    first, second = start(own), start(own)
    assert outcome(own, first) == outcome(own, second) == undisturbed
    assert worker(own, first) == worker(own, second)
    assert not (own.home / "jobs" / first).exists()  # its folder goes, although the process lives


def test_a_pause_and_a_clean_stop_change_nothing(own: RunningService, undisturbed: Outcome) -> None:
    job_id = start(own)
    wait_until(lambda: at_step(own.client, job_id, 18))
    assert own.client.fine_tuning.jobs.pause(job_id).status == "paused"  # type: ignore[comparison-overlap]
    wait_until(lambda: not alive(worker(own, job_id)), 10)
    paused_at = steps_done(own, job_id)
    assert own.stop() == 0
    assert not (own.home / "service.json").exists()
    own.start()
    assert own.client.fine_tuning.jobs.retrieve(job_id).status == "paused"  # type: ignore[comparison-overlap]
    assert own.client.fine_tuning.jobs.resume(job_id).status == "queued"
    wait_until(lambda: at_step(own.client, job_id, paused_at + 20))
    assert own.stop() == 0
    stopped = [int(state.name) for state in (own.home / "jobs" / job_id / "state").iterdir()]
    own.start()
    assert max(stopped) >= paused_at + 20  # the state was saved on the way out, not at the last epoch only
    assert outcome(own, job_id) == undisturbed


def steps_done(service: RunningService, job_id: str) -> int:
    events = service.client.fine_tuning.jobs.list_events(job_id, limit=100)
    return max((event.data["step"] for event in events if event.type == "metrics"), default=0)  # type: ignore[index]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()


def test_a_stop_waits_for_no_stream_and_leaves_the_job_to_be_resumed(own: RunningService) -> None:
    long = own.client.fine_tuning.jobs.create(model="tiny-llama", training_file=upload(own.client, posts()),
                                              method=supervised(n_epochs=50, batch_size=1))
    job_id = long.id
    wait_until(lambda: at_step(own.client, job_id, 3))
    stream = own.client.completions.create(model="tiny-llama", prompt="x", max_tokens=100, n=128, stream=True)
    next(iter(stream))
    assert own.stop() == 0
    own.start()
    assert own.client.fine_tuning.jobs.retrieve(job_id).status == "running"
    own.client.fine_tuning.jobs.cancel(job_id)


def test_a_worker_that_always_dies_fails_the_job(own: RunningService) -> None:
    job_id = start(own)
    for round in range(4):
        pid = wait_until(lambda count=round: len([line for line in own.log("worker") if line["job"] == job_id
                                                  and line["task"] == "train"]) > count and worker(own, job_id))
        os.kill(pid, signal.SIGKILL)
    job = finished(own.client, job_id)
    assert job.status == "failed" and job.error and job.error.code == "worker_died" and "signal 9" in job.error.message


def refused(home: Path, base: Path, port: int = 0) -> str:
    """What a service says that cannot start."""
    code = START.replace("port=0", f"port={port}")
    done = subprocess.run([sys.executable, "-c", code, str(home), str(base), "x", "cold"], timeout=30,
                          capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_a_second_service_is_refused_and_names_the_first(own: RunningService, tmp_path: Path) -> None:
    said = refused(own.home, own.base)
    assert "ServiceError" in said and str(own.process.pid) in said and own.url in said
    said = refused(tmp_path / "other", own.base, own.client.base_url.port or 0)
    assert "ServiceError" in said and "--port 0" in said
    assert own.client.models.list().data


def test_a_service_ends_by_itself_when_idle(tiny_model: Path, tmp_path: Path) -> None:
    code = START.replace("port=0", "port=0, idle_exit=1")
    home = tmp_path / "home"
    done = subprocess.run([sys.executable, "-c", code, str(home), str(tiny_model), "x", "cold"], timeout=30,
                          capture_output=True)
    assert done.returncode == 0 and not (home / "service.json").exists()


def test_a_shutdown_while_the_model_is_being_loaded_is_clean(tiny_model: Path, tmp_path: Path) -> None:
    own = RunningService(tmp_path / "home", tiny_model)
    time.sleep(1.5)  # with the two that a shutdown waits for the thread, this is in the midst of torch's import
    assert own.stop() == 0
    assert "terminate called" not in own.log_file.read_text() and not (own.home / "service.json").exists()


def test_a_shutdown_beside_an_unfinished_stream_is_clean(own: RunningService) -> None:
    stream = own.client.completions.create(model="tiny-llama", prompt="x", n=128, max_tokens=200, stream=True,
                                           logit_bias={"2": -100})
    next(stream)
    begin = own.log_file.stat().st_size
    assert own.stop() == 0
    assert "Traceback" not in own.log_file.read_text()[begin:]
    with pytest.raises(openai.APIConnectionError):  # what came cannot be taken for the whole
        for _ in stream:
            pass
    own.start()
