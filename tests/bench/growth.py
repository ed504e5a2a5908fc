"""Rows on cost as work grows: time and memory against examples, length, jobs and clients, a plot each."""

from concurrent.futures import ThreadPoolExecutor

import matplotlib
import openai

from labkit import tokens
from tests.bench import workload
from tests.bench.sheet import Sheet
from tests.bench.workload import BASE, Memory, seconds

matplotlib.use("Agg")
EXAMPLES, LENGTHS, JOBS, CLIENTS = (100, 1_000, 10_000), (64, 256, 1_024, 2_048), (1, 5, 20), (1, 4, 16, 64)


def examples(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """Short examples, 100 to 10,000, one epoch each."""
    rows = workload.examples(workload.older(), 24)
    varied = [{**row, "prompt": f"{i}: {row['prompt']}"} for i, row in enumerate(rows * 10)]
    points = []
    for count in EXAMPLES:
        workload.forget_prompts()
        with Memory() as memory:
            spent = workload.timed_job(client, varied[:count], n_epochs=1)[0]
        points.append((count, spent, memory.peak / 1e9))
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
        points.append((length, spent, memory.peak / 1e9))
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
        points.append((count, spent, memory.peak / 1e9))
    _record(sheet, "jobs", "jobs queued at once", points)


def clients(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """128 one-token requests spread over 1 to 64 clients."""
    prompts = workload.prompts(workload.older(128), 64)
    points = []
    for count in CLIENTS:
        workload.forget_prompts()

        def one(number: int, count: int = count) -> None:
            own = openai.OpenAI(base_url=client.base_url, api_key=client.api_key, timeout=600)
            for prompt in prompts[number::count]:
                own.completions.create(model=BASE, prompt=prompt, max_tokens=1, temperature=0)

        with Memory() as memory, ThreadPoolExecutor(count) as pool:
            spent = seconds(lambda n=count, work=one: list(pool.map(work, range(n))))
        points.append((count, spent, memory.peak / 1e9))
    _record(sheet, "serving", "clients that share 128 requests", points)


def _record(sheet: Sheet, row: str, what: str, points: list[tuple[int, float, float]]) -> None:
    from matplotlib.figure import Figure

    for size, spent, memory in points:
        sheet.figure(row, f"{size:,} {what}", spent, "s", f"{memory:.2f} GB resident" if memory else "")
    (small, least, _), (large, most, _) = points[0], points[-1]
    sheet.ratio(row, f"time x{most / least:.3g} for work x{large / small:.3g}", (most / least) / (large / small))
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.loglog([p[0] for p in points], [p[1] for p in points], marker="o")
    axes.set(xlabel=what, ylabel="seconds", title=row)
    sheet.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(sheet.folder / f"{row}.png", dpi=120)
