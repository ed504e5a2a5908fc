"""The ladder, sweeps, figures and the memo, against the real service with a tiny model."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import openai
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import labkit
from labkit.client import baselines, calibration, evaluate, iterate, mistakes, plots, runs, texts
from labkit.errors import DataError, LabkitError
from tests.conftest import BASE_NAME, RunningService, jsonl, supervised, upload, wait_until

matplotlib.use("Agg")
SEPARATOR = "\n\n###\n\n"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and answers of a test are its own; the tokenizer's asset is not fetched again."""
    from labkit import tokens

    tokens.count("warm")
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "measured"))


def table(count: int, start: int = 0) -> pd.DataFrame:
    rows = [{"text": f"post {i} about the {('bat', 'ice')[i % 2]}", "label": ("baseball", "hockey")[i % 2]}
            for i in range(start, start + count)]
    posts = pd.DataFrame(rows)
    return posts.assign(prompt=posts.text + SEPARATOR, completion=" " + posts.label)


TRAIN, VALID = table(40), table(12, start=100)
LABELS = ["baseball", "hockey"]
GRID: dict[str, Any] = {"n_epochs": [1, 2], "batch_size": [8], "learning_rate_multiplier": [4.0]}


@pytest.fixture(scope="module")
def tuned(client: openai.OpenAI) -> str:
    """The id of a job of four epochs with a validation file."""
    rows = TRAIN[["prompt", "completion"]].to_dict("records")
    job = client.fine_tuning.jobs.create(
        model=BASE_NAME, training_file=upload(client, jsonl(rows)), seed=1,
        validation_file=upload(client, jsonl(VALID[["prompt", "completion"]].to_dict("records"))),
        method=supervised(n_epochs=4, batch_size=8, learning_rate_multiplier=4.0))
    return labkit.watch(job, client).id


def model_of(client: openai.OpenAI, job: str) -> str:
    name = client.fine_tuning.jobs.retrieve(job).fine_tuned_model
    assert name
    return name


def requests(service: RunningService) -> int:
    return len(service.log("request"))


def test_the_ladder_measures_every_rung_and_asks_nothing_twice(service: RunningService, tuned: str) -> None:
    client = service.client
    rungs = {
        "majority": baselines.majority(),
        "keywords": baselines.Keywords({"baseball": ["bat"], "hockey": ["ICE"]}),
        "TF-IDF": baselines.tfidf(),
        "zero-shot": labkit.Prompted(client, BASE_NAME, lambda text: f"{text}\n\nThis is about"),
        "fine-tuned": labkit.Prompted(client, model_of(client, tuned), lambda text: text + SEPARATOR),
    }
    ladder, answers = labkit.ladder(rungs, TRAIN, VALID, price_model="gpt-6-luna")
    assert ladder["usd_per_1000"].notna().tolist() == [False, False, False, True, False]  # it cannot be fine-tuned
    assert list(ladder.index) == list(rungs) == list(answers)
    assert ladder.loc["majority", "accuracy"] == 0.5
    assert (ladder.loc[["keywords", "TF-IDF"], "accuracy"] == 1).all() and ladder.loc["keywords", "low"] < 0.8
    assert ladder.loc["zero-shot", "off_label"] > 0  # a random model; nothing maps its answers to a label
    assert (ladder["latency_ms"] > 0).all() and ladder["prompt_tokens"].notna().tolist() == [False] * 3 + [True] * 2
    direct = labkit.classify(client, model_of(client, tuned), VALID.prompt, LABELS, progress=False)
    assert answers["fine-tuned"]["label"].tolist() == direct["label"].tolist()
    assert answers["fine-tuned"]["probability"].tolist() == pytest.approx(direct["probability"].tolist(), abs=1e-4)

    before = requests(service)
    again, _ = labkit.ladder(rungs, TRAIN, VALID)
    assert requests(service) == before and (again["accuracy"] == ladder["accuracy"]).all()
    more = table(14, start=100)  # two posts more: two requests more
    rungs["fine-tuned"].answers(more["text"], LABELS)
    assert requests(service) == before + 2

    pairs = labkit.compare(VALID.label, answers)
    assert len(pairs) == 10 and pairs.p.between(0, 1).all()
    changed = mistakes.robustness(rungs["fine-tuned"], VALID, {"upper case": str.upper})
    assert list(changed.index) == ["as they are", "upper case"] and changed.low.notna().all()
    recorded = labkit.runs("ladder")
    assert set(recorded["name"]) == set(rungs) and len(recorded) == 5 and recorded["data"].nunique() == 1


def test_the_ladder_says_what_is_wrong_with_its_tables() -> None:
    rungs = {"majority": baselines.majority()}
    with pytest.raises(DataError, match="test table has no column label"):
        labkit.ladder(rungs, TRAIN, VALID.drop(columns="label"))
    with pytest.raises(DataError, match="at least two labels"):
        labkit.ladder(rungs, TRAIN[TRAIN.label == "hockey"], VALID)
    with pytest.raises(DataError, match="no posts"):
        labkit.ladder(rungs, TRAIN, VALID.head(0))


def test_a_tie_or_no_keyword_is_the_larger_class() -> None:
    rule = baselines.Keywords({"a": ["puck"], "b": ["bat"]}).fit(["", "", ""], ["b", "b", "a"])
    assert rule.predict(["the PUCK!", "puck bat", "none"]).tolist() == ["a", "b", "b"]


def test_jobs_that_took_no_whole_second_leave_a_plan_its_time() -> None:
    for number in range(3):
        runs.record("sweep", str(number), planned=4.0, seconds=0.0)
    plan = labkit.plan(TRAIN, VALID, **GRID)
    assert plan.attrs["pace"] == 0.125 and (plan.seconds > 0).all()


def test_a_sweep_runs_its_plan_records_it_and_is_not_repeated(service: RunningService) -> None:
    client = service.client
    plan = labkit.plan(TRAIN, VALID, sizes=[20, 99], seeds=[1, 2], **GRID)
    assert len(plan) == 8 and set(plan.examples) == {20, 40} and (plan.seconds > 0).all()
    assert plan.tokens.iloc[0] * 2 == plan.tokens.iloc[2]  # twice the epochs
    priced = labkit.plan(TRAIN, VALID, n_epochs=[1, 2], price_model="nebius/below-20b")
    assert priced.usd[1] == pytest.approx(2 * priced.usd[0]) and priced.usd[0] > 0
    plan = plan[plan.n_epochs == 2]
    results = labkit.sweep(client, plan, TRAIN, VALID, LABELS, base=BASE_NAME)
    assert results[["examples", "seed"]].equals(plan[["examples", "seed"]].reset_index(drop=True))
    assert (results.status == "succeeded").all() and results.accuracy.between(0, 1).all()
    assert results[["train_loss", "valid_loss", "low", "high", "off_label"]].notna().all(axis=None)
    answers = labkit.classify(client, results.model[0], VALID.prompt, LABELS, progress=False)
    assert results.accuracy[0] == (answers.label == VALID.label).mean()

    jobs = len(list(client.fine_tuning.jobs.list()))
    again = labkit.sweep(client, plan, TRAIN, VALID, LABELS, base=BASE_NAME)
    assert again.equals(results) and len(list(client.fine_tuning.jobs.list())) == jobs
    (labkit.paths.home() / runs.FILE).unlink()  # as on another machine: the jobs are found by their metadata
    found = labkit.sweep(client, plan, TRAIN, VALID, LABELS, base=BASE_NAME)
    assert found.job.tolist() == results.job.tolist() and len(list(client.fine_tuning.jobs.list())) == jobs
    assert found.accuracy.tolist() == results.accuracy.tolist()
    assert results.seconds.notna().all() and found.seconds.isna().all()  # a found job's time may hold a pause
    assert len(labkit.runs("sweep")) == 4 and labkit.runs().data_digest.nunique() == 3  # 20 posts differ by seed

    mean = iterate.spread(results, "examples")
    assert mean.runs.tolist() == [2, 2]
    drawn = [plots.runs(results, "examples"), plots.runs(results, "seed", "valid_loss", by="examples"),
             plots.losses(results, "examples")]
    assert all(is_described(axes) for axes in drawn)


def test_data_is_compared_like_any_setting_and_failures_become_rows(client: openai.OpenAI) -> None:
    data = {"as it is": TRAIN, "balanced": TRAIN.head(30)}
    plan = labkit.plan(data, VALID, n_epochs=[1], learning_rate_multiplier=[4.0], rank=[4])
    results = labkit.sweep(client, plan, data, VALID, LABELS, base=BASE_NAME)
    assert results.data.tolist() == ["as it is", "balanced"] and results.examples.tolist() == [40, 30]
    assert results["rank"].tolist() == [4, 4]
    broken = TRAIN.assign(completion="   ")
    plan = labkit.plan(broken, VALID)
    failed = labkit.sweep(client, plan, broken, VALID, LABELS, base=BASE_NAME)
    assert failed.status.tolist() == ["failed"] and "empty" in failed.error[0] and failed.accuracy.isna().all()
    with pytest.raises(DataError, match="at least 10 examples"):
        labkit.plan(TRAIN, VALID, sizes=[5])
    with pytest.raises(DataError, match="no column completion"):
        labkit.plan(TRAIN.drop(columns="completion"), VALID)
    with pytest.raises(DataError, match="empty"):
        labkit.plan(TRAIN, VALID.head(0))
    with pytest.raises(DataError, match="names the training table 'as it is'"):
        labkit.sweep(client, labkit.plan(data, VALID), TRAIN, VALID, base=BASE_NAME)


def test_nobody_waits_for_a_paused_job(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    plan = labkit.plan(TRAIN, VALID, n_epochs=[40], batch_size=[4], seeds=[5])
    earlier = {job.id for job in jobs.list()}

    def pause() -> str:
        job = wait_until(lambda: next((job for job in jobs.list() if job.id not in earlier), None))
        return jobs.pause(job.id).id

    with ThreadPoolExecutor() as pool:
        paused = pool.submit(pause)
        with pytest.raises(LabkitError, match=r"ftjob-\S+ is paused.*jobs\.resume\('ftjob-"):
            labkit.sweep(client, plan, TRAIN, VALID, base=BASE_NAME)
    with pytest.raises(LabkitError, match=f"{paused.result()} is paused"):
        iterate.stop_early(paused.result(), client)
    jobs.resume(paused.result())
    results = labkit.sweep(client, plan, TRAIN, VALID, base=BASE_NAME)
    assert results[["job", "status"]].to_numpy().tolist() == [[paused.result(), "succeeded"]]


def test_checkpoints_are_chosen_by_validation_loss(client: openai.OpenAI, tuned: str) -> None:
    table = iterate.checkpoints(tuned, client)
    assert table.step.tolist() == [10, 15, 20] and table.valid_loss.notna().all()
    best = iterate.best_checkpoint(tuned, client)
    assert best.valid_loss == table.valid_loss.min()
    assert len(labkit.classify(client, best.model, VALID.prompt, LABELS, progress=False)) == 12


def test_early_stopping_cancels_a_job_that_gets_no_better(client: openai.OpenAI) -> None:
    rows = TRAIN[["prompt", "completion"]].to_dict("records")
    turned = TRAIN.assign(completion=TRAIN.completion.to_numpy()[::-1])  # validation contradicts training
    job = client.fine_tuning.jobs.create(
        model=BASE_NAME, training_file=upload(client, jsonl(rows)), seed=1,
        validation_file=upload(client, jsonl(turned[["prompt", "completion"]].to_dict("records"))),
        method=supervised(n_epochs=50, batch_size=4, learning_rate_multiplier=10.0))
    best = iterate.stop_early(job, client)
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert ended.status == "cancelled" and best.valid_loss > 0
    assert len(labkit.classify(client, best.model, VALID.prompt, LABELS, progress=False)) == 12
    with pytest.raises(DataError, match="1 or 2"):
        iterate.stop_early(job, client, patience=3)


def test_perplexity_is_that_of_the_completions_alone(client: openai.OpenAI, tuned: str) -> None:
    right = texts.perplexity(client, model_of(client, tuned), VALID.prompt.tolist(), VALID.completion.tolist())
    base = texts.perplexity(client, BASE_NAME, VALID.prompt.tolist(), VALID.completion.tolist())
    assert 1 < right.attrs["perplexity"] < base.attrs["perplexity"] and len(right) == 12
    whole = client.completions.create(model=BASE_NAME, prompt=VALID.prompt[0] + VALID.completion[0], echo=True,
                                      max_tokens=0, logprobs=0).choices[0].logprobs
    assert whole and whole.token_logprobs
    own = whole.token_logprobs[-int(base.tokens[0]):]
    assert base.loss[0] == pytest.approx(-np.mean(own), abs=1e-3)
    with pytest.raises(DataError, match="As many prompts"):
        texts.perplexity(client, BASE_NAME, ["x"], [])


def test_a_judge_answers_with_a_probability(client: openai.OpenAI) -> None:
    graded = texts.judge(client, BASE_NAME, ["2+2?"], ["4"], ["4"])
    assert {"yes", "no", "on_label"} <= set(graded.columns) and len(graded) == 1


def test_two_kernels_record_at_once(tmp_path: Path) -> None:
    code = "from labkit.client import runs; [runs.record('sweep', f'{i}-NAME', accuracy=i) for i in range(40)]"
    kernels = [subprocess.Popen([sys.executable, "-c", code.replace("NAME", name)]) for name in "ab"]
    assert [kernel.wait(60) for kernel in kernels] == [0, 0]
    found = labkit.runs()
    assert len(found) == 80 and {"recorded", "labkit", "openai", "python"} <= set(found.columns)
    runs.record("sweep", "0-a", accuracy=5)
    assert len(labkit.runs()) == 80
    assert labkit.runs("ladder").empty
    runs.keep({str(i): {"x": i} for i in range(1200)})
    assert len(runs.kept(map(str, range(1300)))) == 1200


def is_described(axes: Axes) -> bool:
    """A title, names with units on both axes where they need one, and a description that holds numbers."""
    described = plots.described(axes)
    return bool(axes.get_title() and axes.get_xlabel() and any(sign.isdigit() for sign in described)
                and described.startswith(axes.get_title()))


def test_figures_and_the_memo_speak_for_themselves(tmp_path: Path) -> None:
    truth = ["a", "b"] * 10
    shares = np.linspace(0.05, 0.95, 20)
    answers = pd.DataFrame({"label": np.where(shares > 0.5, "a", "b"), "probability": np.maximum(shares, 1 - shares),
                            "a": shares, "b": 1 - shares, "on_label": 1.0})
    ladder = pd.DataFrame({"accuracy": [0.5, 0.9], "low": [0.4, 0.8], "high": [0.6, 0.95]}, index=["rule", "<model>"])
    drawn = [plots.ladder(ladder), plots.confusion(evaluate.confusion(truth, answers)),
             plots.reliability(calibration.reliability(truth, answers)),
             plots.coverage(calibration.abstention(truth, answers))]
    assert all(is_described(axes) for axes in drawn)
    assert "0.900" in plots.described(drawn[0]) and "(0.800 to 0.950)" in plots.described(drawn[0])
    own = Figure().subplots()
    assert plots.ladder(ladder, own) is own
    with pytest.raises(DataError, match="nothing to draw"):
        plots.ladder(ladder.head(0))

    sections = {"data": ["20 posts", ladder], "splits": "random", "ladder": [ladder, drawn[0]], "curve": "none drawn",
                "cost": "0 USD", "decision": "Keep the rule & wait.", "limits": "Few posts."}
    page = labkit.memo(tmp_path / "memo", "Hockey <or> baseball?", **sections).read_text("utf-8")
    assert "&lt;or&gt;" in page and "<model>" not in page and "rule &amp; wait" in page
    assert "data:image/png;base64" in page and "alt='Accuracy on the same posts" in page
    plain = (tmp_path / "memo" / "memo.md").read_text("utf-8")
    assert "| rule | 0.5 | 0.4 | 0.6 |" in plain and "## Limits" in plain
    picture = plain.split("](")[1].split(")")[0]
    assert (tmp_path / "memo" / picture).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="'decision' of the memo is empty"):
        labkit.memo(tmp_path, "x", **{**sections, "decision": " "})


def test_embeddings_are_a_rung_and_are_asked_for_once(service: RunningService) -> None:
    client = service.client
    rung = baselines.embedded(client, BASE_NAME)
    ladder, _ = labkit.ladder({"embeddings": rung}, TRAIN, VALID)
    assert ladder.loc["embeddings", "accuracy"] >= 0.9  # "bat" and "ice" are other tokens, even to random weights
    before = len(service.log("request"))
    vectors = rung[0].transform(list(TRAIN.text) * 2)
    assert vectors.shape[0] == 80 and len(service.log("request")) == before
    direct = client.embeddings.create(model=BASE_NAME, input=[TRAIN.text[3]]).data[0].embedding
    assert vectors[3].tolist() == pytest.approx(direct, abs=1e-3) and (vectors[3] == vectors[43]).all()
