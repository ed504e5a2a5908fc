"""Rows on cost as work grows: time and memory against examples, length, jobs and clients, a plot each."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import matplotlib
import openai

from labkit import tokens
from tests.bench import workload
from tests.bench.sheet import Sheet
from tests.bench.workload import BASE, Memory, seconds

matplotlib.use("Agg")
EXAMPLES, LENGTHS, JOBS, CLIENTS = (100, 1_000, 10_000), (64, 256, 1_024, 2_048), (1, 5, 20), (1, 4, 16, 64)
REQUESTS = 8  # of each client


def examples(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """Short examples, 100 to 10,000, one epoch each."""
    rows = workload.examples(workload.older(), 24)
    varied = [{**row, "prompt": f"{i}: {row['prompt']}"} for i, row in enumerate(rows * 10)]
    points = []
    for count in EXAMPLES:
        workload.forget_prompts()
        with Memory() as memory:
            spent = workload.timed_job(client, varied[:count], n_epochs=1)[0]
        points.append((count, spent, memory.training / 1e9))
    _record(sheet, "examples", "examples", points)


def lengths(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """32 examples of 64 to 2,048 tokens, one epoch each."""
    text = "\n\n".join(workload.older().text)
    points = []
    for length in LENGTHS:
        size = length - 16  # separator, completion and what decoding and encoding again may add
        pieces = [tokens.truncate(text[i * 9_000 : (i + 1) * 9_000], size) for i in range(32)]
        rows = [{"prompt": piece + workload.SEPARATOR, "completion": f" {workload.LABELS[i % 2]}"}
                for i, piece in enumerate(pieces)]
        workload.forget_prompts()
        with Memory() as memory:
            spent = workload.timed_job(client, rows, n_epochs=1)[0]
        points.append((length, spent, memory.training / 1e9))
    _record(sheet, "lengths", "tokens of each of 32 examples", points)


def jobs(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """1 to 20 jobs queued at once, on the same small data."""
    rows = workload.examples(workload.older(32), 64)
    points = []
    for count in JOBS:
        with Memory() as memory:
            spent = seconds(lambda c=count: [
                workload.finish(client, job) for job in [workload.start_job(client, rows, n_epochs=1)
                                                         for _ in range(c)]])
        points.append((count, spent, memory.training / 1e9))
    _record(sheet, "jobs", "jobs queued at once", points)


def clients(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """1 to 64 clients at once, each with one-token requests of its own."""
    prompts = workload.prompts(workload.older(max(CLIENTS) * REQUESTS), 64)
    points = []
    for count in CLIENTS:
        workload.forget_prompts()

        def one(number: int) -> None:
            own = openai.OpenAI(base_url=client.base_url, api_key=client.api_key, timeout=600)
            for prompt in prompts[number * REQUESTS : (number + 1) * REQUESTS]:
                own.completions.create(model=BASE, prompt=prompt, max_tokens=1, temperature=0)

        with Memory() as memory, ThreadPoolExecutor(count) as pool:
            spent = seconds(lambda n=count, work=one: list(pool.map(work, range(n))))
        points.append((count, spent, memory.serving / 1e9))
    _record(sheet, "serving", f"clients, {REQUESTS} requests each", points)


def _record(sheet: Sheet, row: str, what: str, points: list[tuple[int, float, float]]) -> None:
    """Each point's work, seconds and GB: figures, how much steeper than the work time grows, and a plot."""
    for size, spent, memory in points:
        sheet.figure(row, f"{size:,} {what}", spent, "s", f"{memory:.2f} GB resident")

    def steepness(begin: tuple[int, float, float], end: tuple[int, float, float]) -> float:
        return (end[1] / begin[1]) / (end[0] / begin[0])

    begin, end = max(pairwise(points), key=lambda step: steepness(*step))
    sheet.ratio(row, f"growth of time / of work, {points[0][0]:,} to {points[-1][0]:,}",
                steepness(points[0], points[-1]))
    sheet.ratio(row, f"the same at its steepest, {begin[0]:,} to {end[0]:,}", steepness(begin, end))
    _plot(sheet, row, what, points)


def _plot(sheet: Sheet, row: str, what: str, points: list[tuple[int, float, float]]) -> None:
    from matplotlib.figure import Figure

    sizes, spent, memory = zip(*points, strict=True)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(sizes, spent, marker="o", label="measured")
    left.loglog(sizes, [spent[0] * size / sizes[0] for size in sizes], color="grey", linestyle="--",
                label="in proportion to the first")
    left.set_yticks(spent, [f"{value:.3g}" for value in spent])
    left.legend()
    right.semilogx(sizes, memory, marker="o")
    for axes, quantity in ((left, "seconds"), (right, "resident memory (GB)")):
        axes.set(xlabel=what, ylabel=quantity)
        axes.minorticks_off()
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    right.set_ylim(0, 1.2 * max(memory))
    sheet.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(sheet.folder / f"{row}.png", dpi=120)
