"""Several keys on one service, started and managed by the real command: owners, limits, revoking, other machines."""

import http.client
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from labkit import paths
from labkit.client.jobs import _progress
from labkit.service import keys, objects, queue
from labkit.service.errors import ApiError
from labkit.service.store import STEPS, Store
from tests.conftest import RunningService, finished, jsonl, posts, supervised, upload, wait_until
from tests.service.test_wire import send

BASE = "llama"  # the name of the tiny model's folder
LONG = supervised(n_epochs=50, batch_size=4)
ABSENT = "absent"


class Served(RunningService):
    """`labkit serve` with some options."""

    def __init__(self, home: Path, base: Path, *options: str) -> None:
        self.options = options
        super().__init__(home, base)

    def command(self) -> list[str]:
        """The command as a user types it."""
        return [sys.executable, "-m", "labkit", "serve", "--port", "0", "--base-model", str(self.base), *self.options]

    def keys(self, *arguments: str) -> str:
        """What `labkit keys` prints."""
        done = labkit(self.home, "keys", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def person(self, name: str, *options: str) -> openai.OpenAI:
        """A client with a new key."""
        key = self.keys("add", name, *options).splitlines()[-1]
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30)


def labkit(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command of labkit, run to its end."""
    environment = os.environ | {"PYTHONPATH": str(paths.COURSE), "LABKIT_HOME": str(home)}
    return subprocess.run([sys.executable, "-m", "labkit", *arguments], env=environment, capture_output=True, text=True,
                          timeout=60)


@pytest.fixture(scope="module")
def room(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service for a whole room."""
    running = Served(tmp_path_factory.mktemp("room") / "home", tiny_model, "--host", "0.0.0.0", "--insecure",
                     "--allow-origin", "http://localhost:3000", "--allow-host", "Room.example")
    yield running
    logged = running.log_file.read_text()
    running.stop()
    assert "about the" not in logged and "sk-local-" not in logged  # neither a training text nor a key


# --- owners --------------------------------------------------------------------------------------

Ask = Callable[[openai.OpenAI, str], Any]
FILE: list[Ask] = [
    lambda c, id: c.files.retrieve(id), lambda c, id: c.files.content(id), lambda c, id: c.files.delete(id),
    lambda c, id: c.files.list(after=id),
    lambda c, id: c.fine_tuning.jobs.create(model=BASE, training_file=id),
    lambda c, id: c.fine_tuning.jobs.create(model=BASE, training_file=upload(c, posts(9)), validation_file=id),
    lambda c, id: c.batches.create(input_file_id=id, endpoint="/v1/completions", completion_window="24h"),
]
BATCH: list[Ask] = [
    lambda c, id: c.batches.retrieve(id), lambda c, id: c.batches.cancel(id), lambda c, id: c.batches.list(after=id),
]
UPLOAD: list[Ask] = [
    lambda c, id: c.uploads.parts.create(id, data=b"x"), lambda c, id: c.uploads.complete(id, part_ids=[]),
    lambda c, id: c.uploads.cancel(id),
]
JOB: list[Ask] = [
    lambda c, id: c.fine_tuning.jobs.retrieve(id), lambda c, id: c.fine_tuning.jobs.cancel(id),
    lambda c, id: c.fine_tuning.jobs.pause(id), lambda c, id: c.fine_tuning.jobs.resume(id),
    lambda c, id: c.fine_tuning.jobs.list_events(id), lambda c, id: c.fine_tuning.jobs.checkpoints.list(id),
    lambda c, id: c.fine_tuning.jobs.list(after=id),
]
MODEL: list[Ask] = [
    lambda c, id: c.models.retrieve(id), lambda c, id: c.models.delete(id),
    lambda c, id: c.completions.create(model=id, prompt="x"),
    lambda c, id: c.chat.completions.create(model=id, messages=[{"role": "user", "content": "x"}]),
    lambda c, id: c.fine_tuning.jobs.create(model=id, training_file=upload(c, posts(9))),
]


def refusal(ask: Ask, client: openai.OpenAI, id: str) -> tuple[int, str]:
    """How a request about an object fails, without the object's id."""
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, id)
    return error.value.status_code, str(error.value.body).replace(id, "ID")


def one_line_batch(client: openai.OpenAI, model: str) -> Any:
    """A finished batch of one completion."""
    line = jsonl([{"custom_id": "1", "method": "POST", "url": "/v1/completions",
                   "body": {"model": model, "prompt": "x", "max_tokens": 1}}])
    file = client.files.create(file=("batch.jsonl", line), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    return wait_until(lambda: (latest := client.batches.retrieve(batch.id)).status == "completed" and latest)


def test_what_one_owns_is_absent_for_all_others(room: Served) -> None:
    alice, bob = room.person("alice"), room.person("bob")
    job = alice.fine_tuning.jobs.create(model=BASE, training_file=upload(alice, posts(12)),
                                        method=supervised(n_epochs=2, batch_size=6))
    job = finished(alice, job.id)
    assert job.status == "succeeded", job.error
    model = job.fine_tuned_model or ""
    checkpoint = alice.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    batch = one_line_batch(alice, checkpoint)
    assert b"completion_tokens" in alice.files.content(batch.output_file_id).content
    sent = alice.uploads.create(bytes=1, filename="x", mime_type="text/plain", purpose="user_data").id
    files = [job.training_file, *job.result_files, batch.input_file_id, batch.output_file_id]
    for other in (bob, room.client):
        refused = one_line_batch(other, checkpoint)
        assert b"model_not_found" in other.files.content(refused.error_file_id).content
        for asks, ids in ((FILE, files), (JOB, [job.id]), (MODEL, [model, checkpoint]), (BATCH, [batch.id]),
                          (UPLOAD, [sent])):
            for ask in asks:
                absent = refusal(ask, other, ABSENT)
                assert absent[0] in (400, 404)
                assert [refusal(ask, other, id) for id in ids] == [absent] * len(ids)
        assert [entry.id for entry in other.models.list()] == [BASE]
        assert not other.fine_tuning.jobs.list().data and job.training_file not in str(other.files.list().data)
    assert {file.id for file in alice.files.list()} == set(files)
    assert {entry.id for entry in alice.models.list()} >= {BASE, model, checkpoint}
    assert alice.completions.create(model=checkpoint, prompt="x", max_tokens=1).choices
    assert alice.uploads.cancel(sent).status == "cancelled"
    assert alice.fine_tuning.jobs.list_events(job.id).data and alice.files.content(job.result_files[0]).content
    assert {line["owner"] for line in room.log("request") if "owner" in line} == {"alice", "bob", "default"}


def test_a_retry_never_meets_another_owners_job(room: Served) -> None:
    ids = set()
    for name in ("rita", "ron"):
        person = room.person(name)
        file = upload(person, posts(9))
        for retry in ("0", "1"):
            ids.add(person.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="same",
                                                   extra_headers={"x-stainless-retry-count": retry}).id)
    assert len(ids) == 2


def test_revoking_works_at_once_and_the_name_keeps_what_it_owns(room: Served) -> None:
    carol = room.person("carol")
    file = upload(carol, posts())
    job = carol.fine_tuning.jobs.create(model=BASE, training_file=file, method=LONG)
    wait_until(lambda: carol.fine_tuning.jobs.retrieve(job.id).status == "running")
    assert "1 of its jobs paused" in room.keys("revoke", "carol")
    with pytest.raises(openai.AuthenticationError) as error:
        carol.models.list()
    assert error.value.code == "invalid_api_key"
    again = room.person("carol")
    assert again.files.retrieve(file).id == file
    assert again.fine_tuning.jobs.retrieve(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert any("revoked" in message for message in messages(again, job.id))
    assert again.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.AuthenticationError):
        carol.models.list()


def test_keys_are_listed_and_refused_by_name(room: Served) -> None:
    key = room.person("frank", "--jobs", "2", "--bytes", "1KB").api_key
    listed = room.keys("list")
    assert re.search(r"frank +\d{4}-\d\d-\d\d +0 of 2 +0 of 1,024 +any", listed) and "default" in listed
    assert key not in listed and key.encode() not in b"".join(
        path.read_bytes() for path in room.home.glob("service.db*"))
    for arguments, said in ((("add", "frank"), "revoke"), (("add", "default"), "'default'"),
                            (("add", "a/b"), "letters"), (("revoke", "nobody"), "labkit keys list"),
                            (("revoke", "default"), "api_key")):
        done = labkit(room.home, "keys", *arguments)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    for arguments in (("add", "x", "--bytes", "lots"), ("add", "x", "--jobs", "0"), ()):
        assert labkit(room.home, "keys", *arguments).returncode == 2


# --- limits --------------------------------------------------------------------------------------


def test_a_key_holds_its_owner_to_its_limits(room: Served) -> None:
    dave = room.person("dave", "--jobs", "1", "--bytes", "3000")
    file = upload(dave, posts(12))
    first = dave.fine_tuning.jobs.create(model=BASE, training_file=file)
    dave.fine_tuning.jobs.pause(first.id)
    with pytest.raises(openai.RateLimitError, match=first.id) as limited:
        dave.fine_tuning.jobs.create(model=BASE, training_file=file)
    headers = limited.value.response.headers
    assert limited.value.code == "rate_limit_exceeded" and int(headers["Retry-After"]) > 0
    assert headers["x-should-retry"] == "false"  # a minute's wait within a call would look like a hang
    dave.fine_tuning.jobs.cancel(first.id)
    second = dave.fine_tuning.jobs.create(model=BASE, training_file=file)
    dave.fine_tuning.jobs.cancel(second.id)
    with pytest.raises(openai.PermissionDeniedError, match="3,000 bytes") as full:
        upload(dave, posts(30))
    with pytest.raises(openai.PermissionDeniedError):  # and not a broken connection, though most of it is still unsent
        dave.files.create(file=bytes(48 << 20), purpose="user_data")
    with pytest.raises(openai.PermissionDeniedError):
        dave.uploads.create(bytes=3000, filename="x", mime_type="text/plain", purpose="user_data")
    assert full.value.code == "storage_limit_exceeded" and [kept.id for kept in dave.files.list()] == [file]
    assert not list((room.home / "incoming").iterdir())
    dave.files.delete(file)
    assert upload(dave, posts(30))


def test_what_jobs_keep_of_a_deleted_file_counts_among_the_stored_bytes(room: Served) -> None:
    ines = room.person("ines", "--bytes", "6000")
    file = upload(ines, posts(12))
    size = ines.files.retrieve(file).bytes
    jobs = [ines.fine_tuning.jobs.create(model=BASE, training_file=file, seed=seed).id for seed in range(2)]
    for job in jobs:
        ines.fine_tuning.jobs.pause(job)
    used = f"{size:,} of 6,000"
    assert used in room.keys("list")
    ines.files.delete(file)
    assert used in room.keys("list")  # once, though two jobs keep it
    ines.fine_tuning.jobs.cancel(jobs[0])
    assert used in room.keys("list")
    ines.fine_tuning.jobs.cancel(jobs[1])
    assert "0 of 6,000" in room.keys("list")


def test_models_count_among_the_stored_bytes(room: Served) -> None:
    greta = room.person("greta", "--bytes", "30000")
    file = upload(greta, posts(12))
    job = greta.fine_tuning.jobs.create(model=BASE, training_file=file, method=supervised(n_epochs=1, batch_size=12))
    model = finished(greta, job.id).fine_tuned_model
    folders = [room.home / "models" / name for name in os.listdir(room.home / "models") if str(model)[-8:] in name]
    sizes = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    sizes += sum(kept.bytes for kept in greta.files.list())
    listed = next(line for line in room.keys("list").splitlines() if line.startswith("greta"))
    assert len(folders) == 2 and f"{sizes:,} of 30,000" in listed  # the model and its checkpoint
    for ask in (lambda: upload(greta, posts(12)),
                lambda: greta.fine_tuning.jobs.create(model=BASE, training_file=file)):
        with pytest.raises(openai.PermissionDeniedError, match="models.delete") as full:
            ask()
        assert full.value.code == "storage_limit_exceeded"
    for name in (str(model), f"{model}:ckpt-step-1"):
        greta.models.delete(name)
    assert upload(greta, posts(12))


def test_requests_are_limited_by_the_minute(room: Served) -> None:
    erin = room.person("erin", "--requests-per-minute", "3")
    for _ in range(3):
        erin.models.list()
    with pytest.raises(openai.RateLimitError, match="3 requests a minute") as error:
        erin.models.list()
    assert error.value.code == "rate_limit_exceeded"
    assert 1 <= int(error.value.response.headers["Retry-After"]) <= 20
    assert room.client.models.list().data
    assert [line["status"] for line in room.log("request") if line.get("owner") == "erin"] == [200] * 3 + [429]


def test_the_pace_allows_one_more_request_when_its_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(keys.time, "monotonic", lambda: now)
    pace, key = keys.Pace(), keys.Key("x", 0, None, None, 30)
    for _ in range(30):
        pace.check(key)
    for wait, seconds in (("2", 1.5), ("1", 1.0)):
        with pytest.raises(ApiError) as error:
            pace.check(key)
        assert (error.value.headers or {})["Retry-After"] == wait
        now += seconds
    pace.check(key)
    with pytest.raises(ApiError):
        pace.check(key)


# --- the queue -----------------------------------------------------------------------------------


def messages(client: openai.OpenAI, job_id: str) -> list[str]:
    """A job's events, newest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]


def test_owners_take_turns_and_jobs_tell_their_place(room: Served) -> None:
    gina, hugo = room.person("gina"), room.person("hugo")

    def create(client: openai.OpenAI, settings: dict[str, Any] = LONG) -> str:
        return client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, posts()), method=settings).id

    running = create(gina)
    wait_until(lambda: gina.fine_tuning.jobs.retrieve(running).status == "running")
    jobs = [(gina, create(gina)), (gina, create(gina)), (hugo, create(hugo))]
    order = [jobs[2], jobs[0], jobs[1]]  # gina had her turn
    for place, (client, job_id) in enumerate(order, 1):
        wait_until(lambda c=client, j=job_id, p=place: messages(c, j)[0] == f"Waiting in the queue: place {p}")
        job = client.fine_tuning.jobs.retrieve(job_id)
        events = client.fine_tuning.jobs.list_events(job_id).data[::-1]
        assert _progress(job, events)[1] == f"Waiting in the queue: place {place}"  # what `watch` shows
    gina.fine_tuning.jobs.cancel(running)
    for client, job_id in order:
        wait_until(lambda c=client, j=job_id: c.fine_tuning.jobs.retrieve(j).status == "running")
        client.fine_tuning.jobs.cancel(job_id)
    started = [line["job"] for line in room.log("worker") if line["task"] == "train"]
    assert [job for job in started if job in {job_id for _, job_id in jobs}] == [job_id for _, job_id in order]
    assert messages(gina, jobs[1][1]).count("Waiting in the queue: place 1") == 1


def test_turns_go_round(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, owner in enumerate("aaabbc"):
        store.of(owner).add("job", {"id": f"{owner}{number}", "status": "queued"})
    taken = []
    while found := queue.waiting(store, "queued", "train"):
        taken.append(found[0].id)
        queue.take(store, found[0], "train")
        store.change("job", found[0].id, {"status": "succeeded"})
    assert taken == ["a0", "b3", "c5", "a1", "b4", "a2"]
    store.of("c").add("job", {"id": "c6", "status": "queued"})
    store.of("a").add("job", {"id": "a7", "status": "queued"})
    assert [row.id for row in queue.waiting(store, "queued", "train")] == ["c6", "a7"]


# --- other machines ------------------------------------------------------------------------------


def own_address() -> str:
    """An address of this machine that other machines would use, or the loopback one if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks for the way there
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def test_a_room_comes_in_by_this_machines_names_and_addresses_only(room: Served) -> None:
    port = room.client.base_url.port
    outside = openai.OpenAI(base_url=f"http://{own_address()}:{port}/v1", api_key=room.client.api_key, max_retries=0)
    assert outside.models.list().data
    for name in ("127.0.0.1", f"LOCALHOST:{port}", f"room.example:{port}", socket.gethostname()):
        assert send(room, "GET", "/v1/models", Host=name)[0] == 200, name
    for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "198.51.100.7", "", "[::1"):
        status, reply, _ = send(room, "GET", "/v1/models", Host=name)
        assert (status, reply["error"]["code"]) == (403, "host_refused"), name
        assert "--allow-host" in reply["error"]["message"]


def test_only_configured_web_pages_may_call(room: Served) -> None:
    def ask(method: str, origin: str, key: str = "") -> tuple[int, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", room.client.base_url.port, timeout=10)
        connection.request(method, "/v1/models", headers={
            "Origin": origin, "Access-Control-Request-Method": "GET", "Authorization": f"Bearer {key}",
            "Access-Control-Request-Headers": "authorization"})
        reply = connection.getresponse()
        return reply.status, reply.getheader("access-control-allow-origin")

    page = "http://localhost:3000"
    assert ask("OPTIONS", page) == (200, page) and ask("GET", page, room.key) == (200, page)
    assert ask("GET", page) == (401, page)  # being allowed to ask is no key
    assert ask("OPTIONS", "http://evil.example")[1] is None
    assert ask("GET", "http://evil.example", room.key) == (200, None)  # the browser keeps it from the page


REFUSED = [
    (("--host", "0.0.0.0"), "--insecure"), (("--host", "192.0.2.7"), "--tls-cert FILE"),
    (("--tls-cert", "cert.pem"), "belong together"), (("--tls-cert", "no.pem", "--tls-key", "no.key"), "PEM"),
    (("--allow-origin", "localhost:3000/app"), "--allow-origin"), (("--allow-origin", "*"), "--allow-origin"),
]


@pytest.mark.parametrize("options, said", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_an_open_door_is_refused_with_the_way_to_close_it(
    tiny_model: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = labkit(tmp_path, "serve", "--port", "0", "--base-model", str(tiny_model), *options)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_tls_keeps_others_from_reading_along(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    try:
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
                        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True,
                       capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl, which makes the certificate of this test, is not installed")
    running = Served(tmp_path / "home", tiny_model, "--tls-cert", str(certificate), "--tls-key", str(key))
    try:
        assert running.url.startswith("https://127.0.0.1:")
        with pytest.raises(openai.APIConnectionError):
            running.client.models.list()  # nobody vouches for this certificate
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert openai.OpenAI(base_url=running.url, api_key=running.key).models.list().data
        assert labkit(running.home, "stop").stdout == "Stopped.\n" and running.process.wait(15) == 0
    finally:
        running.process.kill()


# --- older homes ---------------------------------------------------------------------------------


def test_a_home_from_before_owners_opens_as_the_default_keys(tmp_path: Path) -> None:
    body = objects.file("file-old", "x", "user_data", 7)
    with sqlite3.connect(tmp_path / "service.db") as db:
        for statement in STEPS[0].split(";"):
            db.execute(statement)
        db.execute("INSERT INTO objects (kind, id, parent, body, inner) VALUES ('file', 'file-old', '', ?, '{}')",
                   (json.dumps(body),))
        db.execute("PRAGMA user_version = 1")
    store = Store(tmp_path)
    row = store.of(keys.DEFAULT).get("file", "file-old")
    assert row and row.owner == keys.DEFAULT and store.of("someone").get("file", "file-old") is None
    assert store.of(keys.DEFAULT).stored_bytes() == 7
    key = keys.add(store, "someone")
    found = keys.find(Store(tmp_path), key)
    assert found and found.name == "someone" and keys.find(store, key + "x") is None
    with pytest.raises(ValueError, match="owner"):
        store.add("file", body)
