"""Rows on training files before any job: checking a large one, and counting tokens."""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import psutil

import labkit
from labkit import tokens
from tests.bench import workload
from tests.bench.sheet import Sheet

LINES = 1_000_000


def prepare(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """`labkit prepare` on a million chat lines, and on the lab's posts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chats.jsonl"
        write_chats(file, LINES)
        size = f"{LINES:,} chat lines, {file.stat().st_size / 1e6:.0f} MB"
        spent, memory = _run(file)
        sheet.figure("prepare", size, spent, "s")
        sheet.figure("prepare", f"{size}: memory of all processes", memory / 1e6, "MB resident",
                     "pages that processes share counted once for each")
        sheet.ratio("prepare", f"{size}: seconds", spent, ("<=", 90))
        sheet.ratio("prepare", f"{size}: MB", memory / 1e6, ("<=", 500))
        posts = Path(folder) / "posts.jsonl"
        posts.write_text("".join(json.dumps(row) + "\n" for row in workload.examples(workload.older(), 2_000)), "utf-8")
        spent, _ = _run(posts)
        sheet.figure("prepare", f"the lab's {len(workload.older()):,} posts", spent, "s", "with Python's own start")
        sheet.ratio("prepare", "the lab's posts: seconds", spent, ("<=", 2))


def count(client: openai.OpenAI, sheet: Sheet, dtype: str) -> None:
    """Counting the tokens of all posts, on one core."""
    texts = list(labkit.posts().text)
    size = sum(len(text.encode()) for text in texts) / 1e6
    for model in ("smollm2-135m-instruct", "ada", "gpt-4o", "gpt-4"):
        tokens.count_many(texts, model)  # loads the vocabulary; no text is remembered
        spent = [workload.seconds(lambda m=model: tokens.count_many(texts, m)) for _ in range(5)]
        speed = sheet.figure("count", f"{size:.1f} MB of posts for {model}", [size / one for one in spent], "MB/s")
        sheet.ratio("count", f"{model}: MB/s", speed, (">=", 5))


def write_chats(file: Path, lines: int) -> None:
    """Chats made of pieces of real posts at random places, each different, about 390 bytes a line."""
    words = " ".join(labkit.posts().text).split(" ")
    chance = random.Random(0)
    with open(file, "w", encoding="utf-8") as handle:
        for number in range(lines):
            asked, said = (int(chance.random() * (len(words) - 30)) for _ in range(2))
            turns = (("system", "You are a helpful assistant."),
                     ("user", f"{' '.join(words[asked:asked + 28]).strip()} ({number})"),
                     ("assistant", f"{' '.join(words[said:said + 16]).strip()}."))
            handle.write(json.dumps({"messages": [{"role": r, "content": text} for r, text in turns]}) + "\n")


def _run(file: Path) -> tuple[float, int]:
    """Seconds of `labkit prepare --dry-run`, and the most bytes resident in its processes together."""
    begin, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", "labkit", "prepare", str(file), "--dry-run"],
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        process = psutil.Process(run.pid)
        while run.poll() is None:
            now = 0
            for one in [process, *_below(process)]:
                try:
                    now += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, now)
            time.sleep(0.1)
        return time.perf_counter() - begin, peak


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:  # it has just ended
        return []
