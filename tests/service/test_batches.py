"""/v1/batches through the SDK: answers, errors by line, cancelling, crashes, and clients who come first."""

import asyncio
import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai.types import Batch

from labkit.service import batch_files, batch_runner
from labkit.service.app import create_app
from labkit.service.batch_files import Results
from labkit.service.calls import BACKGROUND, Call, Sampling
from labkit.service.models import Weights
from labkit.service.scheduler import Scheduler
from labkit.service.store import Store
from tests.conftest import RunningService, jsonl, wait_until

ENDED = ("completed", "failed", "expired", "cancelled")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def own(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that may be killed."""
    running = RunningService(tmp_path_factory.mktemp("own") / "home", tiny_model)
    yield running
    running.stop()


def line(id: object, url: str = COMPLETIONS, method: str = "POST", **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny-llama", "max_tokens": 4, "seed": 1} | body
    if url == COMPLETIONS:
        asked.setdefault("prompt", f"prompt {id}")
    return {"custom_id": str(id), "method": method, "url": url, "body": asked}


def start(client: openai.OpenAI, content: bytes, endpoint: str = COMPLETIONS, **more: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch").id
    return client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h", **more)  # type: ignore[arg-type]


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    return wait_until(lambda: (now := client.batches.retrieve(batch.id)).status in ENDED and now)


def entries(client: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    assert file
    return [json.loads(text) for text in client.files.content(file).text.splitlines()]


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def test_answers_are_those_of_the_route(own: RunningService) -> None:
    client = own.client
    messages = [[{"role": "user", "content": f"question {i}"}] for i in range(20)]
    rows = [line(f"q-{i}", CHAT, messages=m) for i, m in enumerate(messages)]
    rows.insert(3, line("bad", CHAT, messages=messages[0], temperature=9))
    made = start(client, jsonl(rows) + b"\n\n", CHAT, metadata={"course": "lab"})
    assert made.id.startswith("batch_") and made.object == "batch" and made.metadata == {"course": "lab"}
    assert made.expires_at == made.created_at + 86_400
    batch = ended(client, made)
    assert batch.status == "completed" and counts(batch) == (21, 20, 1) and batch.model == "tiny-llama"
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at and not batch.errors
    output = {entry["custom_id"]: entry for entry in entries(client, batch.output_file_id)}
    assert sorted(output) == sorted(f"q-{i}" for i in range(20))
    for number in (0, 19):
        body = output[f"q-{number}"]["response"]["body"]
        direct = client.chat.completions.create(model="tiny-llama", max_tokens=4, seed=1, messages=messages[number])  # type: ignore[arg-type]
        assert body["choices"][0]["message"]["content"] == direct.choices[0].message.content
        assert output[f"q-{number}"]["response"]["status_code"] == 200 and output[f"q-{number}"]["error"] is None
    logged = {entry["id"]: entry for entry in own.log("request")}
    assert logged[output["q-0"]["response"]["request_id"]]["batch"] == batch.id
    spent = [entry["response"]["body"]["usage"] for entry in output.values()]
    assert batch.usage and batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in spent)
    assert batch.usage.total_tokens == sum(usage["total_tokens"] for usage in spent)
    error, = entries(client, batch.error_file_id)
    assert error["custom_id"] == "bad" and error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"]["param"] == "temperature"
    assert client.files.retrieve(batch.output_file_id or "").purpose == "batch_output"
    assert not list((own.home / "batches").iterdir())


def test_responses_and_embeddings_come_in_batches_too(own: RunningService) -> None:
    client, text = own.client, "the game tonight"
    asked: dict[str, Any] = {"model": "tiny-llama", "input": text}
    spoken: dict[str, Any] = asked | {"max_output_tokens": 4, "temperature": 0}
    for endpoint, body in (("/v1/embeddings", asked), ("/v1/responses", spoken)):
        row = {"custom_id": "one", "method": "POST", "url": endpoint, "body": body}
        batch = ended(client, start(client, jsonl([row]), endpoint))
        assert counts(batch) == (1, 1, 0)
        answer = entries(client, batch.output_file_id)[0]["response"]["body"]
        if endpoint == "/v1/embeddings":
            direct = client.embeddings.create(**asked).data[0].embedding
            assert answer["data"][0]["embedding"] == pytest.approx(direct, abs=1e-5)
        else:
            assert answer["output"][0]["content"][0]["text"] == client.responses.create(**spoken).output_text


def test_every_wrong_line_is_listed(own: RunningService) -> None:
    good = line("a")
    rows = [good, line("a"), line("b", method="GET"), line("c", url="/v1/models"), line("d", model="other"),
            line("e", stream=True), {**good, "custom_id": 5}, {"custom_id": "f"}, {**good, "custom_id": "g", "x": 1},
            {**good, "custom_id": "h", "body": []}]
    made = start(own.client, jsonl(rows) + b"\n\n{broken\n[1]\n\xff\n" + b"[" * 100_000, output_expires_after={
        "anchor": "created_at", "seconds": 3600})
    batch = ended(own.client, made)
    assert batch.status == "failed" and batch.failed_at and batch.errors and batch.errors.data
    found = [(error.line, error.code) for error in batch.errors.data]
    assert found == [
        (2, "duplicate_custom_id"), (3, "invalid_method"), (4, "invalid_url"), (5, "mismatched_model"),
        (6, "unsupported_parameter"), (7, "invalid_custom_id"), (8, "missing_required_parameter"),
        (9, "unknown_parameter"), (10, "invalid_type"), (12, "invalid_json_line"), (13, "invalid_json_line"),
        (14, "invalid_json_line"), (15, "invalid_json_line")]
    assert batch.output_file_id is None and batch.error_file_id is None
    empty = ended(own.client, start(own.client, b"\n \n"))
    assert empty.errors and empty.errors.data and empty.errors.data[0].code == "empty_file"


@pytest.mark.parametrize("half", [{**line("a"), "\ud800": 1}, line("a", model="\ud800"), line("\ud800")])
def test_half_a_character_in_a_line_fails_the_batch_and_no_reply(own: RunningService, half: dict[str, Any]) -> None:
    batch = ended(own.client, start(own.client, jsonl([half])))
    assert batch.errors and batch.errors.data and batch.errors.data[0].code == "invalid_json_line"
    assert batch.id in {listed.id for listed in own.client.batches.list(limit=5).data}


def test_limits_of_an_input_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_files, "MAX_REQUESTS", 3)
    monkeypatch.setattr(batch_files, "BODY_LIMIT", 400)
    monkeypatch.setattr(batch_files, "MAX_ERRORS", 5)
    path = tmp_path / "in.jsonl"

    def codes(content: bytes) -> list[str]:
        path.write_bytes(content)
        return [error["code"] for error in batch_files.check(path, COMPLETIONS).errors]

    assert codes(jsonl([line(i) for i in range(3)])) == []
    assert codes(jsonl([line(i) for i in range(4)])) == ["too_many_requests"]
    assert codes(jsonl([line(1, prompt="x" * 400)])) == ["line_too_large"]
    assert codes(b"x\n" * 50) == ["invalid_json_line"] * 5


def test_what_is_told_of_a_wrong_line_is_short(tmp_path: Path) -> None:
    path, endless = tmp_path / "in.jsonl", "x" * 100_000
    path.write_bytes(jsonl([line(1, model=endless), {**line(2), endless: 1}]))
    found = batch_files.check(path, COMPLETIONS)
    assert [error["code"] for error in found.errors] == ["invalid_value", "unknown_parameter"]
    assert found.model is None and len(str(found.errors)) < 3000


def test_what_cannot_become_a_batch_is_refused(own: RunningService) -> None:
    client = own.client
    wrong = client.files.create(file=("a.jsonl", jsonl([line(1)])), purpose="user_data").id
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
        client.batches.create(input_file_id=wrong, endpoint=COMPLETIONS, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="no file"):
        client.batches.create(input_file_id="file-x", endpoint=COMPLETIONS, completion_window="24h")
    for field, value in (("endpoint", "/v1/files"), ("completion_window", "1h"), ("priority", "high")):
        asked = {"input_file_id": wrong, "endpoint": COMPLETIONS, "completion_window": "24h", field: value}
        with pytest.raises(openai.BadRequestError) as error:
            client.post("/batches", body=asked, cast_to=object)
        assert error.value.param == field
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_x")


def test_lists_and_retries(own: RunningService) -> None:
    made = [start(own.client, jsonl([line(i)])) for i in range(3)]
    assert [batch.id for batch in own.client.batches.list(limit=2)][:3] == [batch.id for batch in made[::-1]]
    again = own.client.batches.create(input_file_id=made[0].input_file_id, endpoint=COMPLETIONS,
                                      completion_window="24h", extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == made[0].id
    for batch in made:
        own.client.files.delete(batch.input_file_id)  # a batch has its own copy
        assert counts(ended(own.client, batch)) == (1, 1, 0)


def test_cancelling_keeps_what_is_answered(own: RunningService) -> None:
    client = own.client.with_options(max_retries=3)
    made = start(client, jsonl([line(i, max_tokens=200) for i in range(2000)]))
    wait_until(lambda: counts(client.batches.retrieve(made.id))[1] > 0)
    assert client.batches.cancel(made.id).status == "cancelling"
    batch = ended(client, made)
    assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
    total, completed, failed = counts(batch)
    assert total == 2000 and 0 < completed < 2000 and failed == 0
    assert len(entries(client, batch.output_file_id)) == completed and batch.error_file_id is None
    assert client.batches.cancel(made.id) == batch
    done = ended(client, start(client, jsonl([line(1)])))
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.batches.cancel(done.id)
    path = f"/v1/batches/{done.id}/cancel"  # its log line is written after the reply
    tries = wait_until(lambda: [entry for entry in own.log("request") if entry["path"] == path])
    assert len(tries) == 1


def test_a_batch_goes_on_after_kills_with_no_line_lost_or_asked_twice(own: RunningService) -> None:
    rows = [line(i, max_tokens=40) for i in range(300)] + [line("bad", prompt="x" * 5000)]
    made = start(own.client, jsonl(rows[::-1]))
    output = own.home / "batches" / made.id / "output.jsonl"
    for least in (10, 60):
        wait_until(lambda least=least: output.exists() and output.read_bytes().count(b"\n") > least)
        told = counts(own.client.batches.retrieve(made.id))[1]
        own.kill()
        before = output.read_bytes()
        assert told <= before.count(b"\n") < 300
        with open(output, "ab") as handle:
            handle.write(b'{"id": "batch_req_torn", "custom_id": "39')
        own.start()
        wait_until(lambda whole=before: output.read_bytes()[len(whole):].count(b"\n") > 1)
        assert output.read_bytes().startswith(before)
    assert own.stop() == 0  # a clean end loses nothing either
    own.start()
    batch = ended(own.client, made)
    assert batch.status == "completed" and counts(batch) == (301, 300, 1)
    answers = entries(own.client, batch.output_file_id)
    assert sorted((entry["custom_id"] for entry in answers), key=int) == [str(i) for i in range(300)]
    spent = [entry["response"]["body"]["usage"]["completion_tokens"] for entry in answers]
    assert batch.usage and batch.usage.output_tokens == sum(spent)


def test_a_full_disk_holds_a_batch_up_and_loses_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [OSError(errno.ENOSPC, "No space left on device")] * 2
    written = Results.add

    def full_at_first(self: Results, custom_id: str, *answer: Any) -> None:
        if custom_id == "3" and refusals:
            raise refusals.pop()
        written(self, custom_id, *answer)

    monkeypatch.setattr(Results, "add", full_at_first)
    monkeypatch.setattr(batch_runner, "PAUSE", 0.05)
    app = create_app(tmp_path, tiny_model, "key", base_name="tiny-llama", hosts=frozenset({"testserver"}))
    with TestClient(app, headers={"Authorization": "Bearer key"}) as client:
        content = jsonl([line(i) for i in range(6)])
        file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", content)}).json()["id"]
        asked = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}
        id = client.post("/v1/batches", json=asked).json()["id"]
        batch = wait_until(lambda: (now := client.get(f"/v1/batches/{id}").json())["status"] == "completed" and now)
        assert not refusals and batch["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
        output = client.get(f"/v1/files/{batch['output_file_id']}/content").text
    assert sorted(json.loads(text)["custom_id"] for text in output.splitlines()) == list("012345")


def test_a_batch_whose_time_is_over_says_what_it_left(own: RunningService) -> None:
    made = start(own.client, jsonl([line(i, max_tokens=200) for i in range(1000)]))
    wait_until(lambda: counts(own.client.batches.retrieve(made.id))[1] > 0)
    Store(own.home).change("batch", made.id, {"expires_at": int(time.time())})
    batch = ended(own.client, made)
    total, completed, failed = counts(batch)
    assert batch.status == "expired" and batch.expired_at and completed + failed == total
    left = entries(own.client, batch.error_file_id)
    assert len(left) == failed > 0 and left[0]["error"]["code"] == "batch_expired" and left[0]["response"] is None


def test_clients_who_wait_come_before_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    finished: list[str] = []

    async def wait(name: str, call: Call) -> None:
        async for _ in call.pieces():
            pass
        finished.append(name)

    def ask(own: Scheduler, name: str, tokens: int) -> "asyncio.Task[None]":
        call = Call("me", Weights("x", None), [name], Sampling(tokens, 1, 1, 1, (), 0, {}))
        own.submit(call)
        return asyncio.create_task(wait(name, call))

    async def both() -> None:
        own = Scheduler(tiny_model, "x", tmp_path)
        BACKGROUND.set(True)
        tasks = [ask(own, "batch", 100) for _ in range(40)]
        BACKGROUND.set(False)
        tasks.append(ask(own, "client", 20))
        own.start()
        most = 0
        while not all(task.done() for task in tasks):
            most = max(most, len(own._readers))
            await asyncio.sleep(0)
        assert most == 16  # half of the generator's rows: a client would have found room at any time
        own.close()

    asyncio.run(both())
    assert finished == ["client"] + ["batch"] * 40
