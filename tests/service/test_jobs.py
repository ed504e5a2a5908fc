"""/v1/fine_tuning/jobs through the SDK, on real (tiny) training."""

import csv
import io
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.conftest import RunningService, chats, finished, jsonl, posts, supervised, upload, wait_until

BASE = "tiny-llama"
FAST = supervised(n_epochs=5, batch_size=8, learning_rate_multiplier=4)
LONG = supervised(n_epochs=50, batch_size=4)


def create(client: openai.OpenAI, content: bytes | None = None, **options: Any) -> FineTuningJob:
    """A job on fresh uploads."""
    options = {"model": BASE, "training_file": upload(client, posts() if content is None else content)} | options
    return client.fine_tuning.jobs.create(**options)


def at_step(client: openai.OpenAI, job_id: str, step: int) -> bool:
    """Whether training has come so far."""
    latest = client.fine_tuning.jobs.list_events(job_id, limit=3).data
    return any(event.type == "metrics" and event.data["step"] >= step for event in latest)  # type: ignore[index]


@pytest.fixture(scope="module")
def trained(client: openai.OpenAI) -> FineTuningJob:
    """A finished job on an alias, with everything that can be given."""
    job = create(client, model="gpt-4o-mini-2024-07-18", validation_file=upload(client, posts(12)), method=FAST,
                 suffix="My Lab!", seed=3, metadata={"course": "lab"})
    assert job.status == "validating_files" and job.fine_tuned_model is None and job.finished_at is None
    done = finished(client, job.id)
    assert done.status == "succeeded", done.error
    return done


def test_the_use_of_an_alias_stands_in_the_log(service: RunningService, trained: FineTuningJob) -> None:
    created = [line for line in service.log("request") if line["path"] == "/v1/fine_tuning/jobs" and "alias_of" in line]
    assert created and {line["alias_of"] for line in created} == {BASE}


def test_a_job_tells_what_it_did(client: openai.OpenAI, trained: FineTuningJob) -> None:
    name = trained.fine_tuned_model
    assert name and name.startswith("ft:gpt-4o-mini-2024-07-18:local:my-lab:") and len(name.rsplit(":", 1)[1]) == 8
    assert (trained.organization_id, trained.seed, trained.metadata) == ("local", 3, {"course": "lab"})
    settings = trained.hyperparameters
    assert (settings.n_epochs, settings.batch_size, settings.learning_rate_multiplier) == (5, 8, 4)
    assert trained.method and trained.method.supervised and trained.method.supervised.hyperparameters
    assert trained.method.supervised.hyperparameters.n_epochs == 5
    assert trained.trained_tokens and trained.trained_tokens % 5 == 0 and trained.finished_at and not trained.error
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=7))
    messages = [event.message for event in events][::-1]
    assert messages[0] == f"Created fine-tuning job: {trained.id}" and "alias" in messages[1]
    expected = ["Validating training file", "Files validated, moving job to queued state", "Fine-tuning job started",
                "Step 1/25: training loss=", "Checkpoint created at step 25", f"New fine-tuned model created: {name}",
                "The job has successfully completed"]
    places = [next(i for i, message in enumerate(messages) if message.startswith(start)) for start in expected]
    assert places == sorted(places) and len({event.id for event in events}) == len(events)
    steps = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in steps] == list(range(25, 0, -1))  # type: ignore[index]


def test_the_result_file_has_every_step(client: openai.OpenAI, trained: FineTuningJob) -> None:
    content = client.files.content(trained.result_files[0])
    rows = list(csv.DictReader(io.StringIO(content.text)))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [int(row["step"]) for row in rows] == list(range(1, 26))
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    assert rows[4]["valid_loss"] and not rows[0]["valid_loss"]
    assert client.files.retrieve(trained.result_files[0]).purpose == "fine-tune-results"


def test_the_last_three_checkpoints_answer_as_models(client: openai.OpenAI, trained: FineTuningJob) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(trained.id, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [25, 20, 15]
    metrics = checkpoints[0].metrics
    assert metrics.step == 25 and metrics.full_valid_loss and metrics.train_mean_token_accuracy is not None
    prompt: Any = {"prompt": "post 3 about the ice\n\n###\n\n", "max_tokens": 1, "temperature": 0, "logprobs": 1}

    def logprob(model: str) -> float:
        return client.completions.create(model=model, **prompt).choices[0].logprobs.token_logprobs[0]  # type: ignore

    final = logprob(trained.fine_tuned_model or "")
    assert logprob(checkpoints[0].fine_tuned_model_checkpoint) == final != logprob(
        checkpoints[2].fine_tuned_model_checkpoint)

    def answers(model: str) -> list[str]:
        prompts = [f"post 77 about the {word}\n\n###\n\n" for word in ("bat", "ice")]
        choices = client.completions.create(model=model, prompt=prompts, max_tokens=1, temperature=0).choices
        return [choice.text for choice in choices]

    assert set(answers(trained.fine_tuned_model or "")) <= {" baseball", " hockey"}
    assert not set(answers(BASE)) & {" baseball", " hockey"}


def test_lineage_and_the_right_endpoint(client: openai.OpenAI, trained: FineTuningJob) -> None:
    name = trained.fine_tuned_model or ""
    model: Any = client.models.retrieve(name)
    assert (model.root, model.parent, model.fine_tuning_job, model.owned_by) == (BASE, BASE, trained.id, "local")
    with pytest.raises(openai.NotFoundError, match="v1/completions"):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])


def test_a_fine_tuned_model_is_trained_on(client: openai.OpenAI, trained: FineTuningJob) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        create(client, model=trained.fine_tuned_model, extra_body={"labkit": {"adapter": "lora"}})
    assert error.value.param == "labkit.adapter"
    first = client.fine_tuning.jobs.list_events(trained.id, limit=100).data
    again = finished(client, create(client, model=trained.fine_tuned_model, method=FAST).id)
    assert again.status == "succeeded", again.error
    assert (again.fine_tuned_model or "").startswith("ft:gpt-4o-mini-2024-07-18:local::")
    assert client.models.retrieve(again.fine_tuned_model or "").parent == trained.fine_tuned_model  # type: ignore[attr-defined]
    second = client.fine_tuning.jobs.list_events(again.id, limit=100).data

    def loss(events: list[Any], step: int) -> float:
        return next(e.data["train_loss"] for e in events if e.type == "metrics" and e.data["step"] == step)

    assert loss(second, 1) < 0.8 * loss(first, 1)  # it did not begin from nothing


def test_chat_files_plain_lora_and_the_older_hyperparameters(client: openai.OpenAI) -> None:
    job = create(client, chats(), hyperparameters={"n_epochs": 1, "batch_size": "auto"},
                 extra_body={"labkit": {"adapter": "lora", "rank": 4, "max_tokens_per_example": 30}})
    copy = job.training_file
    client.files.delete(copy)  # the job has its own
    done = finished(client, job.id)
    assert done.status == "succeeded", done.error
    assert done.hyperparameters.batch_size == 8 and done.hyperparameters.learning_rate_multiplier == 1
    warned = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=50) if event.level == "warn"]
    assert len(warned) == 1 and "lost their beginning" in warned[0]
    name = done.fine_tuned_model or ""
    asked: Any = [{"role": "user", "content": "question 1"}]
    answer = client.chat.completions.create(model=name, messages=asked, max_tokens=3)
    assert answer.choices[0].message.role == "assistant"
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=asked)


def test_a_cancelled_job_keeps_the_checkpoints_it_had(client: openai.OpenAI) -> None:
    """Whoever cancels chooses among them, while the training process may just be ending an epoch."""
    file = upload(client, posts(10))
    for _ in range(2):
        job = create(client, training_file=file, method=supervised(n_epochs=50, batch_size=10))

        def steps(id: str = job.id) -> list[int]:
            return [checkpoint.step_number for checkpoint in client.fine_tuning.jobs.checkpoints.list(id)]

        wait_until(lambda: len(steps()) == 3)
        client.fine_tuning.jobs.cancel(job.id)
        kept = steps()
        listed = client.fine_tuning.jobs.checkpoints.list(job.id)
        names = {checkpoint.fine_tuned_model_checkpoint for checkpoint in listed}
        time.sleep(0.2)  # an epoch takes about a quarter of this
        assert steps() == kept and names <= {model.id for model in client.models.list()}


def test_cancel_and_pause_have_their_states(client: openai.OpenAI, service: RunningService) -> None:
    first, waiting = create(client, method=LONG), create(client, method=LONG, metadata={"is": "second"})
    wait_until(lambda: at_step(client, first.id, 20))
    running = client.fine_tuning.jobs.retrieve(first.id)
    assert running.status == "running" and running.estimated_finish and running.estimated_finish >= time.time() - 5
    assert client.fine_tuning.jobs.retrieve(waiting.id).status == "queued"
    assert client.fine_tuning.jobs.pause(waiting.id).status == "paused"  # type: ignore[comparison-overlap]
    assert client.fine_tuning.jobs.cancel(first.id).status == "cancelled"
    ended = client.fine_tuning.jobs.retrieve(first.id)
    assert ended.finished_at and ended.fine_tuned_model is None and ended.estimated_finish is None
    wait_until(lambda: any(line["job"] == first.id and line["status"] == "cancelled"
                           for line in service.log("worker_ended")), 10)
    seen = client.fine_tuning.jobs.list_events(first.id, limit=1).data[0].message
    jobs = client.fine_tuning.jobs
    for conflict in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="cancelled") as error:
            conflict(first.id)
        assert error.value.code == "invalid_job_state" and error.value.response.headers["x-should-retry"] == "false"
    assert client.fine_tuning.jobs.list_events(first.id, limit=1).data[0].message == seen
    assert client.fine_tuning.jobs.retrieve(waiting.id).status == "paused"  # type: ignore[comparison-overlap]
    assert client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"
    assert not (service.home / "jobs" / first.id / "state").exists() or wait_until(
        lambda: not (service.home / "jobs" / first.id).exists(), 5)


def test_lists_page_and_filter(client: openai.OpenAI, trained: FineTuningJob) -> None:
    other, _ = (finished(client, create(client, posts(9)).id).id for _ in range(2))  # too few posts: soon at an end
    every = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert len(every) == len(set(every)) > 2 and trained.id in every
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == every
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"course": "lab"})] == [trained.id]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"course": "other"})] == []
    unnamed = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert trained.id not in [job.id for job in unnamed]
    page = client.fine_tuning.jobs.list_events(trained.id, limit=4)
    assert page.has_more and len(page.data) == 4
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list_events(other, after=page.data[0].id)


def failing(client: openai.OpenAI, content: bytes, **options: Any) -> Any:
    """The error of a job whose files are refused."""
    job = finished(client, create(client, content, **options).id)
    assert job.status == "failed" and job.finished_at and job.error
    assert client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].level == "error"
    return job.error


def test_files_that_cannot_be_trained_on_fail_the_job_with_the_line(client: openai.OpenAI) -> None:
    few = failing(client, posts(9))
    assert (few.code, few.param) == ("invalid_n_examples", "training_file") and "9 example" in few.message
    wrong = failing(client, posts(11) + b'\n{"prompt": "x"}')
    assert (wrong.code, wrong.param) == ("invalid_training_file", "training_file")
    assert "line 12" in wrong.message and "completion" in wrong.message
    mixed = failing(client, posts(12), validation_file=upload(client, chats()))
    assert (mixed.code, mixed.param) == ("invalid_validation_file", "validation_file")


def test_a_completion_that_never_fits_fails_the_job(client: openai.OpenAI) -> None:
    rows = jsonl([{"prompt": "x ->", "completion": " y" * 400}] * 10)
    error = failing(client, rows)
    assert error.code == "invalid_training_file" and "Example 1" in error.message


Change = Callable[[openai.OpenAI], dict[str, Any]]
REFUSED: list[tuple[Change, str, str | None]] = [
    (lambda client: {"training_file": "file-unknown"}, "training_file", "file_not_found"),
    (lambda client: {"validation_file": "../x"}, "validation_file", "file_not_found"),
    (lambda client: {"training_file": client.files.create(file=b"x", purpose="user_data").id}, "training_file",
     "invalid_file_purpose"),
    (lambda client: {"model": "no-such-model"}, "model", "model_not_available"),
    (lambda client: {"suffix": "x" * 65}, "suffix", None),
    (lambda client: {"suffix": "!!!"}, "suffix", None),
    (lambda client: {"method": {"type": "dpo"}}, "method.type", "unsupported_value"),
    (lambda client: {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type",
     "unsupported_value"),
    (lambda client: {"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method.type",
     "unsupported_value"),
    (lambda client: {"method": supervised() | {"dpo": {}}}, "method.dpo", "unknown_parameter"),
    (lambda client: {"method": supervised(n_epochs=0)}, "method.supervised.hyperparameters.n_epochs", None),
    (lambda client: {"hyperparameters": {"n_epochs": 2.5}}, "hyperparameters.n_epochs", "invalid_type"),
    (lambda client: {"hyperparameters": {"n_epochs": 2}, "method": supervised(n_epochs=3)}, "hyperparameters", None),
    (lambda client: {"hyperparameters": {"prompt_loss_weight": 0.1}}, "hyperparameters.prompt_loss_weight",
     "unknown_parameter"),
    (lambda client: {"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations",
     "unsupported_parameter"),
    (lambda client: {"extra_body": {"labkit": {"adapter": "magic"}}}, "labkit.adapter", None),
    (lambda client: {"extra_body": {"labkit": {"layers": 2}}}, "labkit.layers", "unknown_parameter"),
    (lambda client: {"extra_body": {"epochs": 2}}, "epochs", "unknown_parameter"),
    (lambda client: {"seed": -1}, "seed", None),
    (lambda client: {"metadata": {"k": "v" * 513}}, "metadata.k", None),
]


@pytest.mark.parametrize("change, param, code", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_job_is_refused_by_name(client: openai.OpenAI, change: Change, param: str, code: str | None) -> None:
    before = len(client.fine_tuning.jobs.list(limit=100).data)
    with pytest.raises(openai.BadRequestError) as error:
        create(client, **change(client))
    assert error.value.param == param and (code is None or error.value.code == code)
    assert len(client.fine_tuning.jobs.list(limit=100).data) == before


def test_a_retried_create_makes_no_second_job(client: openai.OpenAI) -> None:
    file = upload(client, posts(9))  # refused by validation, so nothing trains

    def send(retry: str) -> str:
        return client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="once",
                                              extra_headers={"x-stainless-retry-count": retry}).id

    first = send("0")
    assert send("1") == first == send("2")
    second = send("0")
    assert second != first  # meant to be a second one
    job = create(client, method=LONG, suffix="twice")
    client.fine_tuning.jobs.cancel(job.id)
    third = client.fine_tuning.jobs.create(model=BASE, training_file=job.training_file, method=LONG, suffix="twice",
                                           extra_headers={"x-stainless-retry-count": "1"})
    client.fine_tuning.jobs.cancel(third.id)
    assert third.id != job.id  # the cancelled one was known to the client, so this is no repeated try of it


def test_an_unknown_job_is_not_found(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as error:
            ask("ftjob-unknown")
        assert error.value.code == "fine_tune_not_found"
