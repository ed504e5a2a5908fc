"""A budget refuses jobs before they are sent: at a paid provider, and simulated on the local service."""

import json
import threading
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import openai
import pytest

import labkit
from labkit import examples, pricing
from labkit.errors import BudgetError
from tests.conftest import BASE_NAME, RunningService, chats, posts, supervised, upload

MODEL = "gpt-4o-mini-2024-07-18"


class Provider(HTTPServer):
    """Stands where a paid provider would: keeps what arrives, hands out one file, and takes or refuses jobs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Recorder)
        self.jobs: list[dict[str, Any]] = []
        self.file, self.answer = chats(50), 200


class Recorder(BaseHTTPRequestHandler):
    """One request to the provider."""

    server: Provider

    def do_GET(self) -> None:
        self._send(200 if self.path == "/v1/files/file-1/content" else 404, self.server.file)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.jobs.append(body)
        job = {"id": f"ftjob-{len(self.server.jobs)}", "object": "fine_tuning.job", "model": body["model"]}
        self._send(self.server.answer, json.dumps(job).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(autouse=True)
def a_day_on_which_prices_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing, "today", lambda: date(2026, 11, 22))


@pytest.fixture
def provider() -> Iterator[Provider]:
    server = Provider()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def paid(provider: Provider, budget: float, name: str = "openai") -> openai.OpenAI:
    url = f"http://127.0.0.1:{provider.server_port}/v1"
    return labkit.connect(name, base_url=url, api_key="sk-test", budget_usd=budget, max_retries=0)


def estimate(provider: Provider, epochs: int = 0) -> float:
    file = pricing.measure(provider.file, MODEL)
    return pricing.training_cost(MODEL, file.tokens, epochs or examples.auto_epochs(file.examples))


def test_a_job_over_the_budget_is_never_sent(provider: Provider) -> None:
    cost = estimate(provider)
    client = paid(provider, cost * 0.99)
    assert isinstance(client, openai.OpenAI)
    with pytest.raises(BudgetError, match=f"{cost:.4f} USD.*3 epochs at 3 USD per 1M") as refused:
        client.fine_tuning.jobs.create(model=MODEL, training_file="file-1")
    assert "Simulated" not in str(refused.value) and provider.jobs == []


def test_a_budget_counts_all_jobs_of_a_client_and_its_copies(provider: Provider) -> None:
    client = paid(provider, 2.5 * estimate(provider))
    assert client.fine_tuning.jobs.create(model=MODEL, training_file="file-1").id == "ftjob-1"
    assert client.with_options(timeout=5).fine_tuning.jobs.create(model=MODEL, training_file="file-1").id == "ftjob-2"
    for each in (client, client.with_options(timeout=5)):
        with pytest.raises(BudgetError, match="larger budget_usd"):
            each.fine_tuning.jobs.create(model=MODEL, training_file="file-1")
        with pytest.raises(BudgetError):
            each.fine_tuning.jobs.with_raw_response.create(model=MODEL, training_file="file-1")
    assert len(provider.jobs) == 2


def test_the_epochs_of_the_request_count_wherever_they_stand(provider: Provider) -> None:
    client = paid(provider, 4.5 * estimate(provider, epochs=1))
    for more in ({"method": supervised(n_epochs=5)}, {"hyperparameters": {"n_epochs": 5}},
                 {"extra_body": {"hyperparameters": {"n_epochs": 5}}}):
        with pytest.raises(BudgetError, match="5 epochs"):
            client.fine_tuning.jobs.create(model=MODEL, training_file="file-1", **more)
    client.fine_tuning.jobs.create(model=MODEL, training_file="file-1", method=supervised(n_epochs=4))
    assert len(provider.jobs) == 1


def test_a_job_that_the_provider_refuses_costs_nothing(provider: Provider) -> None:
    client = paid(provider, 1.5 * estimate(provider))
    provider.answer = 403
    for _ in range(3):
        with pytest.raises(openai.PermissionDeniedError):
            client.fine_tuning.jobs.create(model=MODEL, training_file="file-1")
    assert len(provider.jobs) == 3


@pytest.mark.parametrize(("wanted", "why"), [
    ({"model": "gpt-9"}, "prices of 'gpt-9' are not known"),
    ({"model": "ada"}, "until 2024-01-04"),
    ({"model": "gpt-4-0613"}, "not known"),
    ({"model": MODEL, "method": {"type": "dpo", "dpo": {}}}, "method 'dpo'"),
    ({"model": MODEL, "method": supervised(n_epochs=0)}, "n_epochs"),
    ({"model": MODEL, "training_file": "file-2"}, "404"),
])
def test_what_cannot_be_known_is_refused_with_the_reason(provider: Provider, wanted: dict[str, Any], why: str) -> None:
    with pytest.raises(BudgetError, match=why) as refused:
        paid(provider, 1e9).fine_tuning.jobs.create(**{"training_file": "file-1"} | wanted)
    assert "unknown is not zero" in str(refused.value) and provider.jobs == []


def test_a_provider_without_known_prices_is_refused(provider: Provider) -> None:
    client = paid(provider, 1e9, "https://api.example.com/v1")
    with pytest.raises(BudgetError, match="prices of https://api.example.com/v1 are not known"):
        client.fine_tuning.jobs.create(model=MODEL, training_file="file-1")
    with pytest.raises(ValueError, match="budget_usd"):
        paid(provider, -1)


def test_the_local_service_simulates_prices_and_says_so(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(service.home))
    poor = labkit.connect(budget_usd=0.0001)
    file = upload(poor, posts(60))
    for model in ("gpt-4.1-mini", "ada"):  # ada at its last price
        with pytest.raises(BudgetError, match="Simulated, nothing is billed.*USD per 1M"):
            poor.fine_tuning.jobs.create(model=model, training_file=file)
    with pytest.raises(BudgetError, match="Simulated.*gpt-5-mini has no known training price"):
        poor.fine_tuning.jobs.create(model="gpt-5-mini", training_file=file)
    assert not [job for job in service.client.fine_tuning.jobs.list() if job.training_file == file]
    rich = labkit.connect(service.url, budget_usd=1)
    job = rich.fine_tuning.jobs.create(model="gpt-4.1-mini", training_file=file)
    own = poor.fine_tuning.jobs.create(model=BASE_NAME, training_file=file)  # the local model is free under its name
    for each in (job, own):
        poor.fine_tuning.jobs.cancel(each.id)
