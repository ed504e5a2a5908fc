"""Rows on training: against one forward pass, against TRL, memory, and a second job on the same data."""

import numpy as np
import openai
import pandas as pd

from labkit import assets
from tests.bench import rivals, workload
from tests.bench.sheet import Sheet
from tests.bench.workload import Memory

RUNS = 3
TRL_EPOCHS = 4
# Before the posts where accuracy is compared with TRL's, whose own gained nothing by it: labkit/engine/EXPERIMENTS.md.
BEFORE = "Baseball or hockey? Teams, players and cities in this post tell which.\n\n"
TRL_STEPS = 5  # timed steps where a whole run would take too long; the first one is left out


def train(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """300 posts of 128 tokens: the job, the same job again, one forward pass over the prompts."""
    posts, held_out = workload.older(300), workload.younger(200)
    rows = workload.examples(posts, 128)
    cold, warm = [], []
    for _ in range(RUNS):
        workload.forget_prompts()
        spent, done = workload.timed_job(client, rows)
        cold.append(spent)
        warm.append(workload.timed_job(client, rows)[0])
    floor = rivals.run("forward", folder=str(assets.base_model()), dtype=dtype, prompts=[r["prompt"] for r in rows],
                       runs=RUNS)
    job = sheet.figure("train", "job, 300 posts x 128 tokens", cold, "s", f"{done.trained_tokens:,} trained tokens")
    again = sheet.figure("train", "the same job again", warm, "s")
    one = sheet.figure("train", "one forward pass over its prompts", floor["seconds"], "s",
                       f"transformers, {dtype}, {floor['tokens']:,} tokens")
    right = workload.right(client, done.fine_tuned_model or "", held_out, 128).mean()
    sheet.figure("train", "accuracy, 200 by-date posts", right, "")
    sheet.ratio("train", "job / forward pass", job / one, ("<=", 1.6))
    sheet.ratio("train", "second job / first", again / job, ("<=", 0.25))


def split(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """The full split, 957 posts of 256 tokens: time against one forward pass, accuracy, memory."""
    posts = workload.older()
    size = int(len(posts) * 0.8)
    rows = workload.examples(posts.head(size), 256)
    workload.forget_prompts()
    with Memory() as memory:
        spent, done = workload.timed_job(client, rows)
    floor = rivals.run("forward", folder=str(assets.base_model()), dtype=dtype, prompts=[r["prompt"] for r in rows],
                       runs=1)
    job = sheet.figure("split", f"job, {size} posts x 256 tokens", spent, "s")
    one = sheet.figure("split", "one forward pass over its prompts", floor["seconds"], "s", f"transformers, {dtype}")
    sheet.ratio("split", "job / forward pass", job / one, ("<=", 1.5))
    sheet.ratio("split", "accuracy, held-out posts",
                workload.right(client, done.fine_tuned_model or "", posts.iloc[size:], 256).mean(), (">=", 0.97))
    sheet.ratio("split", "peak resident memory of training, GB", memory.training / 1e9, ("<=", 3.0))


def trl(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """TRL's SFTTrainer on the same 300 posts: in bfloat16 to the end (some ten minutes), as it comes for some steps.

    Of accuracy one run on one draw of posts says little; labkit/engine/EXPERIMENTS.md has more.
    """
    posts, others, younger = workload.older(300), workload.older().iloc[300:], workload.younger()
    held_out = pd.concat([others, younger])
    rows, tests = workload.examples(posts, 128), workload.examples(held_out, 128)

    def told(right: np.ndarray) -> str:
        return f"{right[: len(others)].mean():.3f} of older, {right[len(others) :].mean():.3f} of by-date posts right"

    def ours(adapter: str, runs: int, before: str = "") -> tuple[float, np.ndarray]:
        """A job's seconds, median of `runs`, and the share of runs that label each held-out post right."""
        spent, models = [], []
        for seed in range(runs):  # of one seed alone, a point more or less right is chance
            workload.forget_prompts()
            seconds, done = workload.timed_job(client, workload.examples(posts, 128, before), adapter=adapter,
                                               seed=seed, n_epochs=TRL_EPOCHS)
            spent.append(seconds)
            models.append(done.fine_tuned_model or "")
        # After all jobs: writing what is kept of so many posts to the disk would slow the next one.
        right = [workload.right(client, model, held_out, 128, before) for model in models]
        job = sheet.figure("trl", f"our job, {adapter} LoRA, {TRL_EPOCHS} epochs", spent, "s",
                           "; ".join(map(told, right)))
        return job, np.mean(right, axis=0)

    job, right = ours("activated", RUNS, BEFORE)
    folder = str(assets.base_model())
    floor = rivals.run("forward", folder=folder, dtype=dtype, prompts=workload.prompts(posts, 128, BEFORE),
                       runs=RUNS)
    one = sheet.figure("trl", "one forward pass over its prompts", floor["seconds"], "s", f"transformers, {dtype}")
    sheet.ratio("trl", "job / forward pass", job / one, ("<=", 1.6))
    plain, _ = ours("lora", 1)
    common = {"package": "trl", "folder": folder, "rows": rows, "held_out": tests, "epochs": TRL_EPOCHS}
    slow = rivals.run("trl", dtype="float32", steps=TRL_STEPS, defaults=True, **common)
    quick = rivals.run("trl", dtype="bfloat16", steps=0, defaults=False, **common)
    sheet.figure("trl", f"TRL, bfloat16, {TRL_EPOCHS} epochs", quick["seconds"], "s",
                 told(np.array(quick["right"])))
    sheet.figure("trl", f"TRL as it comes (float32), {TRL_EPOCHS} epochs", slow["seconds"], "s",
                 f"from {slow['measured_steps']} steps' median")
    sheet.ratio("trl", "TRL bfloat16 / our job", quick["seconds"] / job, (">=", 15))
    sheet.ratio("trl", "TRL as it comes / our job", slow["seconds"] / job, (">=", 40))
    less = pd.Series(right - np.array(quick["right"]))
    for kind, part in ("other older", less.iloc[: len(others)]), ("by-date", less.iloc[len(others) :]):
        sheet.figure("trl", f"our accuracy less TRL's, {len(part)} {kind} posts", part.mean(), "",
                     f"standard error {part.sem():.3f}")
        sheet.ratio("trl", f"the same in standard errors, {kind} posts", part.mean() / part.sem(), (">=", -1))
    sheet.ratio("trl", "TRL bfloat16 / our plain LoRA", quick["seconds"] / plain)


def chat(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """100 chats with answers of 150 tokens, three epochs, against TRL in bfloat16."""
    rows = workload.chats(100, 150)
    workload.forget_prompts()
    ours, done = workload.timed_job(client, rows, n_epochs=3)
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    theirs = rivals.run("trl", "trl", folder=str(assets.base_model()), dtype="bfloat16", rows=pairs, held_out=[],
                        epochs=3, steps=TRL_STEPS, defaults=False)
    sheet.figure("chat", "our job", ours, "s", f"{done.trained_tokens:,} trained tokens")
    sheet.figure("chat", "TRL, bfloat16", theirs["seconds"], "s", f"from {theirs['measured_steps']} steps' median")
    sheet.ratio("chat", "TRL bfloat16 / our job", theirs["seconds"] / ours, (">=", 3))
