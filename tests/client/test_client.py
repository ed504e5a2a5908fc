"""connect, watch, metrics and classify, against the real service."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from matplotlib.figure import Figure

import labkit
from labkit.client import connect as connecting
from labkit.client import jobs
from labkit.errors import DataError, LabkitError, ServiceError
from tests.conftest import BASE_NAME, RunningService, posts, supervised, upload

LABELS = ["baseball", "hockey"]


@pytest.fixture
def local(service: RunningService, monkeypatch: pytest.MonkeyPatch) -> openai.OpenAI:
    """A client of the running service, found as a learner's notebook finds it."""
    monkeypatch.setenv("LABKIT_HOME", str(service.home))
    return labkit.connect()


@pytest.fixture(scope="session")
def trained(service: RunningService) -> str:
    """The id of a job that has taught the tiny model to answer with the labels."""
    own = service.client
    job = own.fine_tuning.jobs.create(
        model=BASE_NAME, training_file=upload(own, posts(80)), validation_file=upload(own, posts(20)), seed=1,
        method=supervised(n_epochs=4, batch_size=8, learning_rate_multiplier=4.0))
    return labkit.watch(job, own).id


def test_connect_finds_the_running_service_and_its_key(service: RunningService, local: openai.OpenAI) -> None:
    assert str(local.base_url).rstrip("/") == service.url and local.api_key == service.key
    assert type(local) is openai.OpenAI
    assert BASE_NAME in [model.id for model in labkit.connect(service.url).models.list()]


def test_connect_starts_a_service_when_none_answers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    monkeypatch.setenv("LABKIT_BASE_MODEL", str(tiny_model))
    assert connecting.running_service() is None and not connecting.stop_service()
    try:
        started = labkit.connect()
        assert list(started.models.list())
        assert str(labkit.connect().base_url) == str(started.base_url)  # the same one, not a second
    finally:
        assert connecting.stop_service()
    assert connecting.running_service() is None


def test_a_service_that_cannot_start_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LABKIT_BASE_MODEL", str(tmp_path / "model"))
    (tmp_path / "home" / "service.db").mkdir(parents=True)  # where the database has to be
    with pytest.raises(ServiceError, match="python -m labkit serve"):
        labkit.connect()


def test_providers_need_a_key_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ServiceError, match="OPENAI_API_KEY"):
        labkit.connect("openai")
    with pytest.raises(ServiceError, match="no provider"):
        labkit.connect("azure")
    given = labkit.connect("https://api.example.com/v1", api_key="sk-x")
    assert given.api_key == "sk-x" and "example.com" in str(given.base_url)


def test_a_watched_job_ends_in_a_model_and_a_table(local: openai.OpenAI, trained: str) -> None:
    job = local.fine_tuning.jobs.retrieve(trained)
    assert job.status == "succeeded" and job.fine_tuned_model
    table = labkit.metrics(trained)
    assert list(table.columns) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert len(table) == 40 and table.valid_loss.notna().sum() >= 4
    assert table.train_loss.tail(5).mean() < table.train_loss.head(5).mean()


def test_watching_a_failed_job_raises_its_reason(local: openai.OpenAI) -> None:
    job = local.fine_tuning.jobs.create(model=BASE_NAME, training_file=upload(local, posts(4)))
    with pytest.raises(LabkitError, match="minimum is 10"):
        labkit.watch(job)
    with pytest.raises(LabkitError, match="is failed and has no result file"):
        labkit.metrics(job)


def test_the_terminal_shows_a_bar_that_reaches_the_end(
    local: openai.OpenAI, trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labkit.watch(trained)
    shown = capsys.readouterr().err
    assert "succeeded" in shown and "100%" in shown


def test_losses_are_drawn_with_names_and_units(local: openai.OpenAI, trained: str) -> None:
    axes = Figure().subplots()
    labkit.plot_losses(labkit.metrics(trained), axes)
    assert axes.get_title() and axes.get_xlabel() == "step" and "nats" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "validation"


def test_classify_returns_labels_in_order_with_probabilities(local: openai.OpenAI, trained: str) -> None:
    model = local.fine_tuning.jobs.retrieve(trained).fine_tuned_model
    assert model
    rows = [json.loads(line) for line in posts(30).splitlines()]
    table = labkit.classify(local, model, [row["prompt"] for row in rows], LABELS, progress=False)
    assert len(table) == 30 and (table.on_label > 0.01).all()  # by chance, two of 320 tokens have 0.006
    share = table[LABELS].sum(axis=1)
    assert share.tolist() == pytest.approx([1] * 30)
    assert (table.probability == table[LABELS].max(axis=1)).all()
    again = labkit.classify(local, model, [row["prompt"] for row in rows[::-1]], LABELS, progress=False)
    assert again.label.tolist()[::-1] == table.label.tolist()
    assert (again.cached_tokens > 0).any()


def test_answers_that_are_no_label_are_not_mapped_to_one(local: openai.OpenAI) -> None:
    table = labkit.classify(local, BASE_NAME, ["the game"], ["zebra-1", "yacht-2"], progress=False)
    assert table.label.isna().all() and table.probability.isna().all() and (table.on_label == 0).all()


def test_logit_bias_lets_a_model_choose_between_labels_only(local: openai.OpenAI, tiny_model: Path) -> None:
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode
    wanted = {label: encode(f" {label}").ids[0] for label in ("game", "baseball")}
    table = labkit.classify(local, BASE_NAME, ["the", "a"], list(wanted), progress=False,
                            logit_bias={str(token): 100 for token in wanted.values()})
    assert (table.on_label > 0.999).all()


def test_labels_that_look_alike_at_first_are_refused(local: openai.OpenAI) -> None:
    with pytest.raises(DataError, match="at least two different labels"):
        labkit.classify(local, BASE_NAME, ["x"], ["one", "one"])


def test_chat_models_are_classified_with_as_well(local: openai.OpenAI) -> None:
    table = labkit.classify(local, BASE_NAME, [[{"role": "user", "content": "hi"}]], LABELS, progress=False)
    assert len(table) == 1 and table.prompt_tokens[0] > 0


def test_an_unknown_model_is_the_sdks_own_error(local: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        labkit.classify(local, "no-such-model", ["x"] * 5, LABELS, progress=False)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "labkit", *arguments], capture_output=True, text=True,
                          env=os.environ | environment, timeout=60)


def test_the_command_explains_itself(tmp_path: Path) -> None:
    for command in ((), ("serve",), ("stop",), ("lab",)):
        told = run(*command, "--help")
        assert told.returncode == 0 and "examples:" in told.stdout
    assert run("serv").returncode == 2
    stopped = run("stop", LABKIT_HOME=str(tmp_path))
    assert stopped.returncode == 0 and "No local service" in stopped.stdout


def test_a_taken_port_and_a_served_home_are_named(service: RunningService, tiny_model: Path, tmp_path: Path) -> None:
    port = service.url.rsplit(":", 1)[1].removesuffix("/v1")
    taken = run("serve", "--port", port, "--base-model", str(tiny_model), LABKIT_HOME=str(tmp_path))
    assert taken.returncode == 1 and "--port 0" in taken.stderr and "Traceback" not in taken.stderr
    second = run("serve", "--port", "0", "--base-model", str(tiny_model), LABKIT_HOME=str(service.home))
    assert second.returncode == 1 and service.url in second.stderr and "Traceback" not in second.stderr


def test_the_progress_reads_what_providers_write() -> None:
    class Event:
        def __init__(self, message: str) -> None:
            self.message = message

    class Job:
        status, estimated_finish = "running", None

    assert jobs._progress(Job(), [Event("Step 5/20: training loss=0.31")])[0] == 0.25  # type: ignore[arg-type]
    assert jobs._progress(Job(), [])[0] == 0  # type: ignore[arg-type]
