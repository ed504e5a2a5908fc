"""Posts, jobs, and a service in a home folder of its own that borrows the fetched assets."""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pandas as pd
import psutil
from openai.types.fine_tuning import FineTuningJob

import labkit
from labkit import assets, paths, tokens
from labkit.client.connect import stop_service

SEPARATOR, LABELS, BASE = "\n\n###\n\n", ["baseball", "hockey"], "smollm2-135m-instruct"
ENDED = ("succeeded", "failed", "cancelled")
Row = dict[str, Any]


@contextmanager
def home() -> Iterator[openai.OpenAI]:
    """A running service in a temporary `LABKIT_HOME`, with a client for it."""
    fetched = assets.base_model().parent.parent
    assets.posts()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.environ["LABKIT_HOME"] = scratch
        shutil.copytree(fetched, Path(scratch) / "assets")
        try:
            client = labkit.connect(max_retries=0, timeout=600)
            client.completions.create(model=BASE, prompt="warm up", max_tokens=1)
            finish(client, start_job(client, examples(older(16), 64), n_epochs=1))  # both load the model
            yield client
        finally:
            stop_service()


def forget_prompts() -> None:
    """Empty the prompt cache on disk, so that the next job or request finds nothing in it."""
    for group in (paths.home() / "cache" / "prompts").glob("*"):
        shutil.rmtree(group, ignore_errors=True)


def older(count: int | None = None) -> pd.DataFrame:
    """Training posts in a fixed random order."""
    posts = labkit.posts()
    return posts[posts.split == "train"].sample(frac=1, random_state=42).head(count or len(posts))


def younger(count: int | None = None) -> pd.DataFrame:
    """Test posts, by date, in a fixed random order."""
    posts = labkit.posts()
    return posts[posts.split == "test"].sample(frac=1, random_state=42).head(count or len(posts))


def prompts(posts: pd.DataFrame, limit: int, before: str = "") -> list[str]:
    """The posts as prompts of at most `limit` tokens between what stands `before` each and the separator."""
    return [before + tokens.truncate(text.strip(), limit) + SEPARATOR for text in posts.text]


def examples(posts: pd.DataFrame, limit: int, before: str = "") -> list[Row]:
    """Training rows, prompt and completion."""
    return [{"prompt": prompt, "completion": f" {label}"}
            for prompt, label in zip(prompts(posts, limit, before), posts.label, strict=True)]


def chats(count: int, length: int) -> list[Row]:
    """Chat rows: write a post on a sport; the answer is the beginning of a real one, `length` tokens."""
    posts = older()
    posts = posts[[tokens.count(text) > length + 100 for text in posts.text]].head(count)
    return [{"messages": [{"role": "user", "content": f"Write a post about {label}."},
                          {"role": "assistant", "content": tokens.truncate(text.partition("\n\n")[2].strip(), length)}]}
            for text, label in zip(posts.text, posts.label, strict=True)]


def start_job(client: openai.OpenAI, rows: list[Row], adapter: str = "activated", seed: int = 42,
              **hyperparameters: Any) -> FineTuningJob:
    """Upload rows and create a job."""
    file = client.files.create(file=("train.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=BASE, training_file=file.id, seed=seed, extra_body={"labkit": {"adapter": adapter}},
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}})


def finish(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    """Wait for the job's end. Raises `RuntimeError` if it did not succeed."""
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in ENDED:
        time.sleep(0.1)
    if job.status != "succeeded":
        raise RuntimeError(f"job {job.id} {job.status}: {job.error}")
    return job


def timed_job(client: openai.OpenAI, rows: list[Row], **options: Any) -> tuple[float, FineTuningJob]:
    """Seconds from the upload to the job's end, and the finished job; `options` as for `start_job`."""
    begin = time.perf_counter()
    done = finish(client, start_job(client, rows, **options))
    return time.perf_counter() - begin, done


def right(client: openai.OpenAI, model: str, posts: pd.DataFrame, limit: int, before: str = "") -> np.ndarray:
    """Whether the model labels each of the posts right."""
    table = labkit.classify(client, model, prompts(posts, limit, before), LABELS, progress=False)
    return table.label.to_numpy() == posts.label.to_numpy()


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Memory:
    """The largest resident memory in bytes while the block runs, sampled.

    `serving` is that of the service, which answers requests, `training` that of any one process that it has started.
    """

    def __enter__(self) -> "Memory":
        self.serving = self.training = 0
        self._done = threading.Event()
        self._service = psutil.Process(json.loads((paths.home() / "service.json").read_text())["pid"])
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.serving = max(self.serving, self._service.memory_info().rss)
            for child in self._service.children(recursive=True):
                try:
                    self.training = max(self.training, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
