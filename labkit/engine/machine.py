"""The number format that this machine is quick in, and the form of weights: measured once, kept under LABKIT_HOME."""

import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from labkit import paths
from labkit.engine import packed
from labkit.errors import LabkitError

FLOPS = 2 * 512 * 576 * 1536  # operations of the product that is timed, as large as one of SmolLM2's layers
SECONDS = 0.2  # to time it in each format and form


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


def measured() -> dict[str, Any]:
    """`dtype`, the quicker of the two, `flops` (operations a second) by format, `threads`, and `torch` (version).

    `packed` tells by format whether these are of weights in oneDNN's order, which was quicker then.
    Measured in a second, and again only with another machine, version or number of threads.
    """
    note = paths.home() / "machine.json"
    here = {"processor": platform.processor() or platform.machine(), "node": platform.node(),
            "torch": torch.__version__, "threads": torch.get_num_threads()}
    try:
        remembered = json.loads(note.read_text())
    except (OSError, ValueError):
        remembered = {}
    if {"flops", "packed"} <= set(remembered) and all(remembered.get(key) == value for key, value in here.items()):
        return remembered
    seconds = {name: _product_seconds(getattr(torch, name)) for name in ("float32", "bfloat16")}
    flops = {name: FLOPS / min(both) for name, both in seconds.items()}
    found = here | {"flops": flops, "packed": {name: ordered < plain for name, (plain, ordered) in seconds.items()},
                    "dtype": max(flops, key=lambda name: flops[name])}
    paths.write_text(note, json.dumps(found, indent=1))
    return found


def _product_seconds(dtype: torch.dtype) -> tuple[float, float]:
    """The best time of several products, with plain weights and with packed ones (infinite if there is no such way)."""
    left, right = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    plain = _best_seconds(lambda: torch.nn.functional.linear(left, right))
    try:
        ordered = packed.pack(right)
        return plain, _best_seconds(lambda: packed.product(left, ordered))
    except (AttributeError, RuntimeError):  # this processor or platform has none
        return plain, float("inf")


def _best_seconds(work: Callable[[], object]) -> float:
    best, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        begin = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            return best
