"""What this machine is quick with: number format, form of weights, threads; measured once, kept under LABKIT_HOME."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch

from labkit import paths
from labkit.engine import int8, packed
from labkit.errors import LabkitError

FLOPS = 2 * 512 * 576 * 1536  # operations of the product that is timed, as large as one of SmolLM2's layers
SECONDS = 0.05  # of a core, to time it in each format and form, and with each number of threads
AVAILABLE = torch.get_num_threads()  # threads, by torch's own choice: one for each core, or OMP_NUM_THREADS
SPARE = 0.95  # fewer are taken only if they need less than this share of the time
QUIET = 0.9  # of the time a lone thread must have had a core, or the machine was too busy to be measured
WORTH = 2 / 3  # of float32's time: int8 is taken if it needs less, rounding included
SLOW = 20  # times a plain product of 64 x 64 x 64: oneDNN's quick way takes 5 times as long, its slow one 200 times
TRUSTED = 600.0  # seconds for which what a busy machine seemed quick with is believed


def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32, else float32.

    bfloat16 is 3-4 times as fast on processors with AVX512_BF16 or AMX, and up to hundreds of
    times slower on some without (pytorch#146508). Raises `LabkitError` when LABKIT_DTYPE asks for
    another format.
    """
    if chosen := os.environ.get("LABKIT_DTYPE"):
        if chosen not in ("float32", "bfloat16"):
            raise LabkitError(f"LABKIT_DTYPE={chosen} is not known; set it to float32 or bfloat16, or unset it.")
        return getattr(torch, chosen)
    return getattr(torch, measured()["dtype"])


def packing_pays(dtype: torch.dtype) -> bool:
    """Whether weights in this format are multiplied faster in oneDNN's order (see `packed`)."""
    return measured()["packed"][str(dtype).removeprefix("torch.")]


def int8_pays() -> bool:
    """Whether to read prompts in int8 (see `int8`): where float32 is the quicker format, and int8 much quicker.

    It costs a little accuracy, too much where bfloat16 is quick (EXPERIMENTS.md). Never where
    LABKIT_DTYPE asks for a format.
    """
    return not os.environ.get("LABKIT_DTYPE") and measured()["int8"]


def use_threads() -> None:
    """Let torch compute in as many threads as were quickest here, in this process."""
    torch.set_num_threads(measured()["threads"])


def measured() -> dict[str, Any]:
    """`dtype`, the quicker of the two, `flops` (operations a second) by format, `threads`, and `torch` (version).

    `flops` has int8's too, with rounding to it from float32; 0 if this processor has no quick way to it.

    `packed` tells by format whether weights in oneDNN's order were quicker, `int8` whether products in
    int8 are to take float32's place for prompts. `threads` are as many as were quickest of those
    `available`: a processor with slow cores beside quick ones waits for the slow ones. Measured in a
    second or two, and again only with another machine, version or number of cores, or if the machine
    was busy, `quiet` False: after ten minutes then.
    """
    note = paths.home() / "machine.json"
    here = {"processor": platform.processor() or platform.machine(), "node": platform.node(),
            "torch": torch.__version__, "available": AVAILABLE}
    try:
        remembered, age = json.loads(note.read_text()), time.time() - note.stat().st_mtime
    except (OSError, ValueError):
        remembered, age = {}, 0.0
    current = isinstance(remembered.get("int8"), bool)  # earlier versions had none, or one for each format
    if current and all(remembered.get(key) == value for key, value in here.items()) and (
            remembered.get("quiet") or "quiet" in remembered and age < TRUSTED):
        return remembered
    found = here | _measure()
    paths.write_text(note, json.dumps(found, indent=1))
    return found


def _measure() -> dict[str, Any]:
    """Formats and forms are compared on one thread: beside another program's threads several wait for each other."""
    wall, cpu = time.perf_counter(), time.thread_time()
    seconds = {name: _product_seconds(name, threads=1) for name in ("float32", "bfloat16")}
    quiet = time.thread_time() - cpu > QUIET * (time.perf_counter() - wall)
    best = {name: min(ways[:2]) for name, ways in seconds.items()}  # attention's products are in the format itself
    dtype = min(best, key=lambda name: best[name])
    threads = _quickest_threads(dtype) if quiet else AVAILABLE
    plain, ordered, eight = seconds["float32"]
    together = {name: _product_seconds(name, threads) for name in seconds}
    flops = {name: FLOPS / min(ways[:2]) for name, ways in together.items()}
    return {"flops": flops | {"int8": FLOPS / together["float32"][2]}, "dtype": dtype,
            "packed": {name: ordered < plain for name, (plain, ordered, _) in seconds.items()},
            "int8": dtype == "float32" and eight < WORTH * ordered < WORTH * plain,
            "threads": threads, "quiet": quiet}


def _quickest_threads(dtype: str) -> int:
    """All that are available, or three, two or one quarter of them if that is quicker."""
    if "OMP_NUM_THREADS" in os.environ:  # somebody has chosen
        return AVAILABLE
    best, least = AVAILABLE, min(_product_seconds(dtype, AVAILABLE)[:2])
    for count in sorted({max(1, AVAILABLE * quarters // 4) for quarters in (1, 2, 3)} - {AVAILABLE}, reverse=True):
        spent = min(_product_seconds(dtype, count)[:2])
        if spent < SPARE * least:
            best, least = count, spent
    return best


def _product_seconds(dtype: str, threads: int) -> tuple[float, float, float]:
    """The best time of several products: with plain weights, packed ones, in int8 (infinite if there is no such way).

    In turn, so that all have the same luck, until this thread has had a core for `SECONDS` each:
    a worker gives way to other programs, and may wait that long in the midst of its first product.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = (torch.ones(size, dtype=getattr(torch, dtype)) for size in ((512, 576), (1536, 576)))
    ways: dict[str, Callable[[], object]] = {"plain": lambda: torch.nn.functional.linear(left, right)}
    with suppress(AttributeError, RuntimeError):  # this processor or platform has none
        ordered = packed.pack(right)
        packed.product(left, ordered)
        ways["packed"] = lambda: packed.product(left, ordered)
        if dtype == "float32" and has_int8():
            eight = int8.Weights(right)
            ways["int8"] = lambda: eight.product(int8.round_tokens(left))
    try:
        best = dict(zip(ways, _best_seconds(list(ways.values())), strict=True))
        return best["plain"], best.get("packed", math.inf), best.get("int8", math.inf)
    finally:
        torch.set_num_threads(before)


@cache
def has_int8() -> bool:
    """Whether this processor multiplies bytes by instructions made for it, exactly.

    Older ones add pairs of products in 16 bits, which ones, as the largest numbers here, overflow; and
    where oneDNN has no quick way at all, its slow one takes seconds for a product as large as a layer's.
    Raises `AttributeError` or `RuntimeError` where there is no such way.
    """
    ones = torch.ones(64, 64)
    eight = int8.Weights(ones)
    found = eight.product(int8.round_tokens(ones))
    quick, plain = _best_seconds([lambda: eight.product(int8.round_tokens(ones)), lambda: ones @ ones])
    return torch.allclose(found, torch.tensor(64.0), rtol=0.01) and quick < SLOW * plain


def _best_seconds(ways: Sequence[Callable[[], object]]) -> list[float]:
    best, end = [float("inf")] * len(ways), time.thread_time() + SECONDS * len(ways)
    while True:
        for number, work in enumerate(ways):
            begin = time.perf_counter()
            work()
            best[number] = min(best[number], time.perf_counter() - begin)
        if time.thread_time() > end:
            return best
