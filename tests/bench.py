"""What training and classifying cost on this machine: `make bench` prints it; nothing here can fail a test.

Everything runs through the SDK against the service, in a home folder of its own, so that the
first job finds nothing cached. The model is the real one.
"""

import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import pandas as pd

import labkit
from labkit import assets, paths, tokens
from labkit.client.connect import stop_service

SEPARATOR, LABELS = "\n\n###\n\n", ["baseball", "hockey"]


def main() -> None:
    """Run the measurements in a temporary home that borrows the fetched assets."""
    fetched = assets.base_model().parent.parent
    assets.posts()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.environ["LABKIT_HOME"] = scratch
        shutil.copytree(fetched, Path(scratch) / "assets")
        try:
            measure()
        finally:
            stop_service()


def measure() -> None:
    """Print one line a figure."""
    posts = labkit.posts()
    older = posts[posts.split == "train"].sample(frac=1, random_state=42)
    younger = posts[posts.split == "test"].sample(200, random_state=42)
    client = labkit.connect()
    client.completions.create(model="smollm2-135m-instruct", prompt="warm up", max_tokens=1)
    machine = json.loads((paths.home() / "machine.json").read_text())
    print(f"{platform.machine()}, {os.cpu_count()} cores, {machine['dtype']}, data: {posts.attrs['source']}")

    def job(name: str, train: pd.DataFrame, test: pd.DataFrame, limit: int) -> tuple[str, list[str]]:
        rows = [{"prompt": tokens.truncate(text.strip(), limit) + SEPARATOR, "completion": f" {label}"}
                for text, label in zip(train.text, train.label, strict=True)]
        content = "\n".join(map(json.dumps, rows)).encode()
        file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
        begin = time.perf_counter()
        done = labkit.watch(client.fine_tuning.jobs.create(
            model="smollm2-135m-instruct", training_file=file.id, seed=42))
        seconds = time.perf_counter() - begin
        prompts = [tokens.truncate(text.strip(), limit) + SEPARATOR for text in test.text]
        begin = time.perf_counter()
        table = labkit.classify(client, done.fine_tuned_model or "", prompts, LABELS, progress=False)
        spent = time.perf_counter() - begin
        right = (table.label.to_numpy() == test.label.to_numpy()).mean()
        print(f"{name}: {len(train)} posts, {limit} tokens: job {seconds:.1f} s, {done.trained_tokens:,} tokens; "
              f"accuracy {right:.3f} on {len(test)}; classifying them {spent:.1f} s, {len(test) / spent:.1f} a second")
        return done.fine_tuned_model or "", prompts

    model, prompts = job("by date", older.head(300), younger, 128)
    begin = time.perf_counter()
    labkit.classify(client, model, prompts, LABELS, progress=False)
    print(f"classifying the same posts again, prompts cached: {time.perf_counter() - begin:.1f} s")
    job("same job again", older.head(300), younger, 128)
    split = int(len(older) * 0.8)
    job("random split", older.head(split), older.iloc[split:], 256)


if __name__ == "__main__":
    main()
