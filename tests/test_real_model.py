"""What is claimed of learning, on the real model: it beats its own zero-shot on held-out posts."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pandas as pd
import pytest

import labkit
from labkit import assets, tokens
from tests.conftest import RunningService, upload

LABELS = ["baseball", "hockey"]
SEPARATOR = "\n\n###\n\n"
QUESTION = "\n\nQuestion: Is this post about baseball or hockey?\nAnswer:"
LIMIT = 64  # tokens of each post


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    service = RunningService(tmp_path_factory.mktemp("real") / "home", assets.base_model(), tiny=False)
    yield service.client.with_options(timeout=600)
    assert service.stop() == 0


def accuracy(client: openai.OpenAI, model: str, posts: pd.DataFrame, ending: str, **options: object) -> float:
    prompts = [tokens.truncate(text.strip(), LIMIT) + ending for text in posts.text]
    table = labkit.classify(client, model, prompts, LABELS, progress=False, **options)
    return (table.label.to_numpy() == posts.label.to_numpy()).mean()


def test_fine_tuning_beats_zero_shot_by_a_margin(real: openai.OpenAI, tmp_path: Path) -> None:
    posts = labkit.posts()
    train = posts[posts.split == "train"].sample(160, random_state=0)
    held_out = posts[posts.split == "test"].sample(80, random_state=0)
    rows = [{"prompt": tokens.truncate(text.strip(), LIMIT) + SEPARATOR, "completion": f" {label}"}
            for text, label in zip(train.text, train.label, strict=True)]
    job = real.fine_tuning.jobs.create(
        model="tiny-llama", training_file=upload(real, "\n".join(map(json.dumps, rows)).encode()), seed=0)
    job = labkit.watch(job, real)
    lengths = [tokens.count(row["prompt"].removesuffix(SEPARATOR)) + tokens.count(SEPARATOR) for row in rows]
    assert job.trained_tokens == 3 * sum(length + 2 for length in lengths)  # the label and the end of text

    only_labels = {str(tokens.encode(f" {label}")[0]): 100 for label in LABELS}
    zero_shot = accuracy(real, "tiny-llama", held_out, QUESTION, logit_bias=only_labels)
    fine_tuned = accuracy(real, job.fine_tuned_model or "", held_out, SEPARATOR)
    print(f"zero-shot {zero_shot:.3f}, fine-tuned {fine_tuned:.3f}")
    assert fine_tuned >= 0.7 and fine_tuned >= zero_shot + 0.05
