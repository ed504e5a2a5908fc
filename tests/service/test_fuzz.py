"""Whatever is sent, the service answers in OpenAI's shape: no 5xx, no traceback, no hang.

Three kinds of input: requests that a schema fuzzer (schemathesis) makes from the routes' own
schema, bodies that are JSON or not at all, and training files out of pieces that nearly fit.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit import examples
from labkit.service.app import create_app
from tests.conftest import BASE_NAME, RunningService, chats, finished, posts, upload

SECONDS = 20  # for one answer; a tiny model needs a fraction of it
ROUTES = ("completions", "chat/completions", "responses", "embeddings", "fine_tuning/jobs", "batches", "uploads")
few = settings(max_examples=60, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

Json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=12)


@pytest.fixture(scope="module")
def http(service: RunningService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=SECONDS,
                      headers={"authorization": f"Bearer {service.key}"}) as client:
        yield client


def check_answer(response: httpx.Response) -> None:
    """Not our fault, and an error is one object with OpenAI's four fields."""
    assert response.status_code < 500, response.text
    assert "Traceback" not in response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


# Requests made from the schema

@pytest.fixture(scope="module")
def schema(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The routes' schema, which the running service does not publish."""
    schemathesis = pytest.importorskip("schemathesis", reason="it needs Python 3.11")
    app = create_app(tmp_path_factory.mktemp("schema"), tiny_model, "k" * 40, BASE_NAME, warm=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one function answers several methods
        return schemathesis.openapi.from_dict(app.openapi())


def test_requests_made_from_the_schema(schema: Any, http: httpx.Client, service: RunningService) -> None:
    tried = set()

    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.pop("stream", None)  # streams have tests of their own
            if "model" in case.body:
                case.body["model"] = BASE_NAME
        answer = case.call(base_url=service.url.removesuffix("/v1"), timeout=SECONDS,
                           headers={"authorization": f"Bearer {service.key}"})
        assert answer.status_code < 500, answer.text
        assert "Traceback" not in answer.text
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        tried.add((case.method, case.operation.path))

    for operation in schema.get_all_operations():
        cases = operation.ok().as_strategy()
        settings(few, max_examples=15)(given(case=cases)(ask))()
    assert len(tried) >= 28  # every method of every route


# Bodies

@pytest.mark.parametrize("route", ROUTES)
@given(body=st.binary(max_size=60) | Json.map(lambda value: json.dumps(value).encode()))
@few
def test_any_body(route: str, body: bytes, http: httpx.Client) -> None:
    check_answer(http.post(f"/{route}", content=body, headers={"content-type": "application/json"}))


VALID: dict[str, dict[str, Any]] = {
    "completions": {"model": BASE_NAME, "prompt": "a post", "max_tokens": 2, "temperature": 0},
    "chat/completions": {"model": BASE_NAME, "messages": [{"role": "user", "content": "a post"}], "max_tokens": 2},
    "responses": {"model": BASE_NAME, "input": "a post", "max_output_tokens": 16},
    "embeddings": {"model": BASE_NAME, "input": "a post"},
    "fine_tuning/jobs": {"model": BASE_NAME, "training_file": "file-none"},
    "batches": {"input_file_id": "file-none", "endpoint": "/v1/completions", "completion_window": "24h"},
    "uploads": {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 10, "mime_type": "text/jsonl"},
}
OPTIONS = ("n", "best_of", "echo", "logprobs", "top_logprobs", "logit_bias", "stop", "presence_penalty", "seed", "user",
           "frequency_penalty", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stream_options",
           "response_format", "suffix", "metadata", "method", "hyperparameters", "tools", "dimensions", "instructions")


@pytest.mark.parametrize("route", ROUTES)
@given(data=st.data())
@few
def test_one_wrong_value_in_a_valid_body(route: str, data: st.DataObject, http: httpx.Client) -> None:
    body = dict(VALID[route])
    body[data.draw(st.sampled_from([*body, *OPTIONS]))] = data.draw(Json)
    text = json.dumps(body)  # NaN and Infinity stand in it as such, which is not JSON
    check_answer(http.post(f"/{route}", content=text.encode(), headers={"content-type": "application/json"}))


@given(path=st.text(max_size=30), query=st.dictionaries(st.sampled_from(["after", "limit", "order", "purpose"]),
                                                        st.text(max_size=10)))
@few
def test_any_path_and_query(path: str, query: dict[str, str], http: httpx.Client) -> None:
    for route in ("files", "models", "fine_tuning/jobs", "batches", "uploads"):
        try:
            url = httpx.URL(f"{http.base_url}{route}/").copy_merge_params(query)
            url = url.copy_with(path=url.path + path)
        except (httpx.InvalidURL, UnicodeEncodeError):
            return  # no client can send it
        check_answer(http.get(url))
        check_answer(http.delete(url))


def test_a_temperature_next_to_zero_is_greedy(service: RunningService) -> None:
    def answer(temperature: float) -> str:
        request = {"model": BASE_NAME, "prompt": "a post", "max_tokens": 8, "seed": 1}
        return service.client.completions.create(temperature=temperature, **request).choices[0].text

    assert answer(1e-308) == answer(0)


# Training files

@st.composite
def nearly_training_files(draw: st.DrawFn) -> bytes:
    """Lines of a good file with some replaced by what people send instead."""
    lines = draw(st.sampled_from([posts(12), chats(12)])).split(b"\n")
    wrong = (st.binary(max_size=40) | Json.map(lambda value: json.dumps(value).encode())
             | st.dictionaries(st.sampled_from(["prompt", "completion", "messages"]), Json)
             .map(lambda value: json.dumps(value).encode()))
    for place in draw(st.lists(st.integers(0, len(lines) - 1), max_size=3)):
        lines[place] = draw(wrong)
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + b"\n".join(lines)


@given(content=nearly_training_files() | st.binary(max_size=200))
@few
def test_any_training_file(content: bytes, http: httpx.Client) -> None:
    answer = http.post("/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", content)})
    check_answer(answer)
    report = examples.check(content)
    assert report.problems or len(report.examples) >= examples.MINIMUM
    if answer.status_code == 400 and content:
        assert report.problems, "the upload refuses what the check accepts"


def test_what_the_check_refuses_fails_as_a_job_and_nothing_else_does(service: RunningService) -> None:
    """The same code decides on both sides; one wrong file of each kind through a real job."""
    wrong = chats(12) + b'\n{"messages": [{"role": "wizard", "content": "x"}]}'
    for content, ends in ((posts(10), "succeeded"), (posts(9), "failed"), (wrong, "failed")):
        assert bool(examples.check(content).problems) == (ends == "failed")
        job = service.client.fine_tuning.jobs.create(model=BASE_NAME, training_file=upload(service.client, content))
        assert finished(service.client, job.id).status == ends
