"""/v1/uploads through the SDK."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from labkit.service.store import Store
from tests.conftest import RunningService, posts, wait_until


@pytest.fixture(scope="module")
def own(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that may be killed."""
    running = RunningService(tmp_path_factory.mktemp("own") / "home", tiny_model, warm=False)
    yield running
    running.stop()


def begin(client: openai.OpenAI, size: int, **more: object) -> str:
    fields = {"filename": "a.bin", "mime_type": "application/octet-stream", "purpose": "user_data"} | more
    return client.uploads.create(bytes=size, **fields).id  # type: ignore[arg-type]


def send(client: openai.OpenAI, upload: str, *parts: bytes) -> list[str]:
    return [client.uploads.parts.create(upload, data=part).id for part in parts]


def kept(service: RunningService) -> list[Path]:
    """What lies about of uploads that are not whole."""
    return [*(service.home / "parts").iterdir(), *(service.home / "incoming").iterdir()]


def test_a_file_in_chunks_is_a_file_like_any_other(own: RunningService, tmp_path: Path) -> None:
    content = posts(40)
    path = tmp_path / "posts.jsonl"
    path.write_bytes(content)
    done = own.client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=1000, md5=hashlib.md5(content).hexdigest())
    assert (done.status, done.bytes, done.filename) == ("completed", len(content), "posts.jsonl")
    assert done.file and done.file == own.client.files.retrieve(done.file.id)
    assert own.client.files.content(done.file.id).content == content
    assert kept(own) == []


def test_parts_are_joined_in_the_order_of_the_completion(own: RunningService) -> None:
    client = own.client
    upload = begin(client, 6, filename="../b.bin", expires_after={"anchor": "created_at", "seconds": 3600})
    last, unused, first = send(client, upload, b"def", b"xxxx", b"abc")
    done = client.uploads.complete(upload, part_ids=[first, last])
    assert done.file and client.files.content(done.file.id).content == b"abcdef"
    assert done.filename == "b.bin" and done.file.expires_at
    assert abs(done.file.expires_at - time.time() - 3600) < 60
    assert unused and kept(own) == []


@pytest.mark.parametrize("size, parts, md5, code", [
    (7, [0, 1], None, "size_mismatch"), (3, [0, 0], None, "invalid_value"), (6, [0, 2], None, "part_not_found"),
    (6, [0, 1], "0" * 32, "checksum_mismatch"), (6, [0, 1], "no", "invalid_value"),
])
def test_a_wrong_completion_is_refused_and_can_be_mended(
    own: RunningService, size: int, parts: list[int], md5: str | None, code: str
) -> None:
    client = own.client
    upload = begin(client, size)
    ids = [*send(client, upload, b"abc", b"def"), "part_of_another"]
    with pytest.raises(openai.BadRequestError) as error:
        client.uploads.complete(upload, part_ids=[ids[i] for i in parts], md5=md5 or openai.omit)
    assert error.value.code == code
    more = send(client, upload, b"g") if size == 7 else []
    good = [*ids[:2], *more] if size > 3 else ids[:1]
    assert client.uploads.complete(upload, part_ids=good).status == "completed"


def test_a_training_file_in_parts_is_checked_too(own: RunningService) -> None:
    content = posts(3) + b"\n{no json}"
    upload = begin(own.client, len(content), purpose="fine-tune")
    ids = send(own.client, upload, content[:50], content[50:])
    before = len(own.client.files.list().data)
    with pytest.raises(openai.BadRequestError, match="line 4"):
        own.client.uploads.complete(upload, part_ids=ids)
    assert len(own.client.files.list().data) == before
    own.client.uploads.cancel(upload)
    assert kept(own) == [] and len(list((own.home / "files").iterdir())) == before


def test_an_ended_upload_refuses_all_and_is_not_asked_again(own: RunningService) -> None:
    client = own.client.with_options(max_retries=3)
    upload = begin(client, 3)
    part, = send(client, upload, b"abc")
    assert client.uploads.cancel(upload).status == "cancelled"
    assert kept(own) == []
    def refused() -> int:
        return sum(entry["status"] == 400 for entry in own.log("request"))

    before = refused()
    for count, act in enumerate((lambda: client.uploads.complete(upload, part_ids=[part]),
                                 lambda: client.uploads.cancel(upload),
                                 lambda: client.uploads.parts.create(upload, data=b"more")), before + 1):
        with pytest.raises(openai.BadRequestError, match="cancelled") as error:
            act()
        assert error.value.code == "invalid_upload_state"
        wait_until(lambda count=count: refused() >= count)  # a line is logged just after its answer
        assert refused() == count
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_unknown")


def test_a_repeated_completion_answers_as_the_first(own: RunningService) -> None:
    upload = begin(own.client, 3)
    ids = send(own.client, upload, b"abc")
    done = own.client.uploads.complete(upload, part_ids=ids)
    again = own.client.uploads.complete(upload, part_ids=ids, extra_headers={"x-stainless-retry-count": "1"})
    assert again == done


def test_what_is_too_large_is_refused(own: RunningService) -> None:
    upload = begin(own.client, 1)
    with pytest.raises(openai.APIStatusError, match="64 MB") as error:
        own.client.uploads.parts.create(upload, data=bytes((64 << 20) + 1))
    assert error.value.status_code == 413 and list((own.home / "incoming").iterdir()) == []
    for size, purpose, said in ((9 << 30, "user_data", "bytes"), (513 << 20, "fine-tune", "512 MB"),
                                (201 << 20, "batch", "200 MB")):
        with pytest.raises(openai.APIStatusError, match=said):
            begin(own.client, size, purpose=purpose)
    own.client.uploads.cancel(upload)


def test_parts_outlive_a_kill(own: RunningService) -> None:
    upload = begin(own.client, 6)
    first, = send(own.client, upload, b"abc")
    cancelled = begin(own.client, 6)
    send(own.client, cancelled, b"abc")
    own.kill()
    Store(own.home).change("upload", cancelled, {"status": "cancelled"})  # killed before its parts were removed
    (own.home / "incoming" / "upload-half").write_bytes(b"ab")
    own.start()
    assert [path.name for path in kept(own)] == [upload]
    second, = send(own.client, upload, b"def")
    done = own.client.uploads.complete(upload, part_ids=[first, second])
    assert done.file and own.client.files.content(done.file.id).content == b"abcdef"


def test_uploads_and_files_expire(own: RunningService) -> None:
    client, store = own.client, Store(own.home)
    upload = begin(client, 3)
    part, = send(client, upload, b"abc")
    file = client.files.create(file=b"x", purpose="user_data",
                               expires_after={"anchor": "created_at", "seconds": 3600}).id
    training = client.files.create(file=("a.jsonl", posts()), purpose="fine-tune",
                                   expires_after={"anchor": "created_at", "seconds": 3600}).id
    for kind, id in (("upload", upload), ("file", file)):
        store.change(kind, id, {"expires_at": int(time.time())})
    with pytest.raises(openai.BadRequestError, match="expired"):
        client.uploads.complete(upload, part_ids=[part])
    with pytest.raises(openai.NotFoundError):
        client.files.content(file)
    assert kept(own) == [] and not (own.home / "files" / file).exists()
    store.change("file", training, {"expires_at": int(time.time())})
    with pytest.raises(openai.BadRequestError, match="no file"):
        client.fine_tuning.jobs.create(model="tiny-llama", training_file=training)


def test_a_batch_file_stays_30_days_unless_told_otherwise(own: RunningService) -> None:
    client = own.client
    made = client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    assert made.expires_at == made.created_at + 30 * 86400
    assert client.files.create(file=b"x", purpose="vision").expires_at is None
