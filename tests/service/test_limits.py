"""Files and bodies that are too large in some way are refused early, with the line and the fix."""

import tracemalloc
from pathlib import Path

import openai
import pytest
from pydantic import BaseModel, ValidationError

from labkit import examples
from labkit.service.errors import ApiError
from labkit.service.schemas import JobCreate
from labkit.service.schemas_inference import ChatCreate, CompletionCreate, ResponseCreate
from tests.conftest import RunningService, posts
from tests.service.test_wire import send

DEEP = examples.MAX_DEPTH
TOO_MUCH = [
    (posts(3) + b'\n{"prompt": "' + b"x" * examples.MAX_LINE + b'"}', "line 4: The line is longer than 1,048,576 b"),
    (b"\n" * (examples.MAX_LINES + 1), "more than 100,000 lines"),
    (b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}", f"line 1: The line is nested more than {DEEP} levels deep"),
]


@pytest.mark.parametrize("content, said", TOO_MUCH, ids=["long line", "many lines", "deep line"])
def test_a_training_file_that_is_too_much_is_refused_at_upload_and_by_the_learners_check(
    client: openai.OpenAI, content: bytes, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as error:
        client.files.create(file=("much.jsonl", content), purpose="fine-tune")
    assert error.value.code == "invalid_jsonl"
    assert said in str(examples.check(content))


def test_what_is_just_within_the_limits_passes(tmp_path: Path) -> None:
    path = tmp_path / "much.jsonl"
    row = b'{"prompt": "' + b"x" * (examples.MAX_LINE - 40) + b'", "completion": " y"}\n'
    deep = b'{"prompt": ' + b"[" * (DEEP - 1) + b"]" * (DEEP - 1) + b"}\n"
    path.write_bytes(row + deep + b"\n" * (examples.MAX_LINES - 2))
    assert len(row) <= examples.MAX_LINE and examples.first_unreadable(path) is None


def test_no_line_is_read_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "endless.jsonl"
    path.write_bytes(bytes(32 * examples.MAX_LINE))
    tracemalloc.start()
    try:
        assert "longer" in str(examples.first_unreadable(path))
        assert tracemalloc.get_traced_memory()[1] < 8 * examples.MAX_LINE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/fine_tuning/jobs"])
def test_a_deep_body_is_told_apart_from_a_wrong_one(service: RunningService, path: str) -> None:
    for depth in (DEEP + 1, 800, 100_000):
        status, reply, _ = send(service, "POST", path, b'{"model": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}")
        assert (status, reply["error"]["code"]) == (400, "invalid_json") and "nest" in reply["error"]["message"]
    status, reply, _ = send(service, "POST", path, b'{"model": ' + b"[" * (DEEP - 1) + b"]" * (DEEP - 1) + b"}")
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "invalid_type", "model")


@pytest.mark.parametrize("schema, wrong", [
    (CompletionCreate, {f"unknown{number}": 1 for number in range(3000)}),
    (CompletionCreate, {"logit_bias": {str(number): "x" for number in range(3000)}}),
    (CompletionCreate, {"stop": [1] * 3000}),
    (CompletionCreate, {"prompt": ["\ud800"] * 3000}),
    (ChatCreate, {"messages": [{}] * 3000}),
    (ResponseCreate, {"input": [1] * 3000}),
    (JobCreate, {"metadata": {str(number): 1 for number in range(3000)}}),
])
def test_a_body_of_millions_of_wrong_things_is_told_of_a_few(schema: type[BaseModel], wrong: dict[str, object]) -> None:
    """Each error takes memory, and a body of 32 MB has room for many millions of wrong values."""
    with pytest.raises((ValidationError, ApiError)) as error:
        schema.model_validate({"model": "m", **wrong})
    assert not isinstance(error.value, ValidationError) or error.value.error_count() < 5
