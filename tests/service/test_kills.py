"""Killed at random moments, many times: all that was acknowledged is there, and the adapter is the same to the bit."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import openai

from tests.conftest import ENDED, RunningService, posts, upload, wait_until
from tests.service.test_jobs import at_step
from tests.service.test_recovery import (  # noqa: F401 (two are fixtures)
    Outcome,
    alive,
    outcome,
    own,
    start,
    steps_done,
    undisturbed,
)

KILLS = 8
STARTING = 4.0  # seconds that a worker needs until it trains, about
PENDING_KILLS = 2  # of workers in a row that had no time to get on; four would end the job, as they should


def test_nothing_is_lost_by_kills_at_random_moments(own: RunningService, undisturbed: Outcome) -> None:  # noqa: F811
    seed = time.time_ns() % 2**32
    try:
        assert_nothing_lost(own, undisturbed, KILLS, seed)
    except BaseException as error:
        raise AssertionError(f"with the seed {seed}: {error}") from error


def assert_nothing_lost(service: RunningService, expected: Outcome, kills: int, seed: int) -> None:
    """Kill the service or its worker `kills` times in the course of one job (or more, if one ends before)."""
    chance = random.Random(seed)
    witness = Witness(service)
    witness.start()
    try:
        while kills > 0:
            job_id = start(service)
            witness.watch(job_id)
            kills = disturb(service, job_id, chance, kills)
            assert outcome(service, job_id) == expected
    finally:
        witness.stop()
    witness.check()


def disturb(service: RunningService, job_id: str, chance: random.Random, kills: int) -> int:
    """Kill until the job has ended or there are no `kills` left; returns how many are left."""
    seen = hasty = 0
    while kills:
        def started(before: int = seen) -> bool:
            return len(workers(service, job_id)) > before or ended(service, job_id)

        wait_until(started)
        found = workers(service, job_id)
        hasty = hasty + 1 if chance.random() < 0.5 and hasty < PENDING_KILLS else 0
        if hasty:
            time.sleep(chance.uniform(0, STARTING))
        else:
            wanted = steps_done(service, job_id) + chance.randrange(1, 12)
            wait_until(lambda step=wanted: at_step(service.client, job_id, step) or ended(service, job_id))
            time.sleep(chance.uniform(0, 0.1))
        if ended(service, job_id):
            return kills
        if chance.random() < 0.5:
            seen = len(found)
            if alive(found[-1]):
                os.kill(found[-1], signal.SIGKILL)
        else:
            service.kill()
            wait_until(lambda pid=found[-1]: not alive(pid), 5)
            if chance.random() < 0.5:
                tear(service.home / "jobs" / job_id / "state", chance)
            seen, hasty = len(workers(service, job_id)), 0
            service.start()
        kills -= 1
    return 0


def workers(service: RunningService, job_id: str) -> list[int]:
    """The process ids of the workers that have trained this job."""
    return [line["pid"] for line in service.log("worker") if line["job"] == job_id and line["task"] == "train"]


def ended(service: RunningService, job_id: str) -> bool:
    return service.client.fine_tuning.jobs.retrieve(job_id).status in ENDED


def tear(states: Path, chance: random.Random) -> None:
    """Damage a file of the newest whole training state, as a crash of the machine might."""
    whole = sorted(marker.parent for marker in states.glob("*/complete.json"))
    if not whole:
        return
    path = chance.choice(sorted(whole[-1].iterdir()))
    content = path.read_bytes()
    cut = chance.randrange(len(content))
    path.unlink()  # what was published shares its content, and must not be damaged along with it
    path.write_bytes(content[:cut] + (bytes(len(content) - cut) if chance.random() < 0.5 else b""))


class Witness(threading.Thread):
    """Uploads, creates, cancels and reads meanwhile, and remembers all that the service acknowledged."""

    def __init__(self, service: RunningService) -> None:
        super().__init__(daemon=True)
        self.service, self.job_id, self.error = service, "", None
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, bool] = {}  # whether cancelled
        self.events: dict[str, set[str]] = {}
        self._ending = threading.Event()

    def watch(self, job_id: str) -> None:
        """Read the events of this job from now on."""
        self.events[job_id] = set()
        self.job_id = job_id

    def run(self) -> None:
        number = 0
        while not self._ending.wait(0.2):
            number += 1
            try:
                self._round(self.service.client, number)
            except openai.APIConnectionError:  # killed: what was under way was not acknowledged
                continue
            except Exception as error:
                self.error = error
                return

    def _round(self, client: openai.OpenAI, number: int) -> None:
        content = posts(10 + number % 30)
        file = upload(client, content)
        self.files[file] = content
        if number % 3 == 0:
            job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file).id
            self.jobs[job] = False
            client.fine_tuning.jobs.cancel(job)
            self.jobs[job] = True
        if job_id := self.job_id:
            page = client.fine_tuning.jobs.list_events(job_id, limit=100).data
            self.events[job_id] |= {event.id for event in page}

    def stop(self) -> None:
        """End, and cancel the jobs whose creation was not acknowledged."""
        self._ending.set()
        self.join(40)
        jobs = self.service.client.fine_tuning.jobs
        for job in jobs.list(limit=100):
            if job.status not in ENDED:
                jobs.cancel(job.id)

    def check(self) -> None:
        """All of it must be there."""
        assert self.error is None, repr(self.error)
        client = self.service.client
        assert self.files and self.jobs
        for file, content in self.files.items():
            assert client.files.content(file).content == content
        for job, cancelled in self.jobs.items():
            assert client.fine_tuning.jobs.retrieve(job).status == "cancelled" or not cancelled
        for job_id, events in self.events.items():
            assert events <= {event.id for event in client.fine_tuning.jobs.list_events(job_id, limit=100)}
