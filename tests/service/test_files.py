"""/v1/files through the SDK."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.conftest import posts


def test_a_file_from_upload_to_deletion(client: openai.OpenAI) -> None:
    content = posts(12)
    made = client.files.create(file=("my posts.jsonl", content), purpose="fine-tune")
    assert made.id.startswith("file-") and made.object == "file" and made.status == "processed"
    assert (made.bytes, made.filename, made.purpose) == (len(content), "my posts.jsonl", "fine-tune")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == content
    assert client.files.delete(made.id).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as error:
            gone(made.id)
        assert error.value.code == "file_not_found"


def test_paging_order_and_purpose(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{i}.txt", b"x"), purpose="vision").id for i in range(5)]
    assert [file.id for file in client.files.list(purpose="vision", limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(purpose="vision", limit=2, order="asc")] == ids
    first = client.files.list(purpose="vision", limit=2)
    assert first.has_more and [file.id for file in first.data] == [ids[4], ids[3]]
    last = client.files.list(purpose="vision", limit=3, after=ids[3])
    assert not last.has_more and [file.id for file in last.data] == [ids[2], ids[1], ids[0]]


@pytest.mark.parametrize("query, param", [
    ({"after": "file-unknown"}, "after"), ({"limit": 0}, "limit"), ({"limit": "many"}, "limit"),
    ({"limit": "000000001" + "9" * 20}, "limit"), ({"limit": "000000001" + "9" * 5000}, "limit"),
    ({"order": "up"}, "order"), ({"before": "x"}, "before"),
])
def test_a_wrong_query_is_refused_by_name(client: openai.OpenAI, query: dict[str, str], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.files.list(extra_query=query)
    assert error.value.param == param


@pytest.mark.parametrize("content, said", [
    (posts(3) + b'\n{"prompt": "no end}', "line 4"),
    (b'["not", "an", "object"]', "line 1"),
    (posts(2) + b"\n\xff\xfe", "line 3"),
    (b"[" * 100_000, "line 1"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "line 1"),
    (b"\n \n", "empty"),
])
def test_a_training_file_that_is_no_jsonl_is_refused_with_its_line(
    client: openai.OpenAI, content: bytes, said: str
) -> None:
    before = len(client.files.list().data)
    with pytest.raises(openai.BadRequestError, match=said) as error:
        client.files.create(file=("bad.jsonl", content), purpose="fine-tune")
    assert error.value.code == "invalid_jsonl" and error.value.param == "file"
    assert len(client.files.list().data) == before


def test_a_wrong_purpose_is_refused_with_the_right_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="fine-tune"):
        client.files.create(file=b"x", purpose="poetry")  # type: ignore[arg-type]


def test_names_never_become_paths(client: openai.OpenAI) -> None:
    made = client.files.create(file=("../../api_key", b"x"), purpose="user_data")
    assert made.filename == "api_key"
    with pytest.raises(openai.NotFoundError):
        client.files.content("..%2fapi_key")


def test_a_range_is_not_offered_and_does_no_harm(client: openai.OpenAI) -> None:
    id = client.files.create(file=("na\u00efve;\r.txt", b"content"), purpose="user_data").id
    for wanted in ("bytes=99-", "bytes=a", "bytes=0-1"):
        assert client.files.content(id, extra_headers={"Range": wanted}).content == b"content"


def test_an_expiring_file_says_when(client: openai.OpenAI) -> None:
    made = client.files.create(file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at is not None and abs(made.expires_at - time.time() - 3600) < 60
    for seconds in (5, "000000003600" + "9" * 20, "000000003600" + "9" * 5000):
        with pytest.raises(openai.BadRequestError, match="3600"):
            client.files.create(file=b"x", purpose="user_data", expires_after={
                "anchor": "created_at", "seconds": seconds})  # type: ignore[typeddict-item]


def test_a_large_upload_arrives_whole(client: openai.OpenAI) -> None:
    content = b"0123456789abcdef" * (1 << 18)  # 4 MB: many pieces
    made = client.files.create(file=("large.bin", content), purpose="user_data")
    assert made.bytes == len(content) and client.files.content(made.id).content == content
    client.files.delete(made.id)


def start_batch(client: openai.OpenAI, id: str) -> None:
    client.batches.create(input_file_id=id, endpoint="/v1/completions", completion_window="24h")


def start_job(client: openai.OpenAI, id: str) -> None:
    client.fine_tuning.jobs.cancel(client.fine_tuning.jobs.create(model="tiny-llama", training_file=id).id)


def read(client: openai.OpenAI, id: str) -> None:
    assert client.files.content(id).content == posts(1)


@pytest.mark.parametrize("use, purpose", [(start_batch, "batch"), (start_job, "fine-tune"), (read, "user_data")])
def test_a_file_that_is_deleted_at_this_moment_is_there_or_not(
    client: openai.OpenAI, use: Callable[[openai.OpenAI, str], Any], purpose: Any
) -> None:
    with ThreadPoolExecutor(4) as pool:
        for _ in range(15):
            id = client.files.create(file=("a.jsonl", posts(1)), purpose=purpose).id
            users = [pool.submit(use, client, id) for _ in range(3)]
            client.files.delete(id)
            for user in users:
                assert isinstance(user.exception(), openai.BadRequestError | openai.NotFoundError | None)
