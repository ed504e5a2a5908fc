"""Products of prompts' tokens with frozen weights in int8, for processors with VNNI and without quick bfloat16.

Weights are rounded once, with a scale for each output; what is multiplied with them is rounded
token by token, so that a token's result does not depend on what is read beside it (both as in
LLM.int8(), arXiv 2208.07339, but for its outliers). Sums are exact, in int32. What is read so is
what the base model reads: its prompts, and those of an activated adapter. Where an adapter acts,
in training and in answers, and where an answer goes on, the network's own format is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

Rounded = tuple[torch.Tensor, torch.Tensor]  # bytes `[tokens, in]`, and a scale for each token `[tokens, 1]`
MIDDLE = 128  # stands for zero: oneDNN has quick products of unsigned bytes with signed ones only


@dataclass
class _Latest:
    """What was rounded last: queries, keys and values are made of the same input, gate and up as well."""

    input: torch.Tensor | None = None
    rounded: Rounded | None = None


_latest: ContextVar[_Latest | None] = ContextVar("latest", default=None)


@contextmanager
def products(wanted: bool) -> Iterator[None]:
    """Within the block, if it is `wanted`, packed maps that have weights in int8 as well use these."""
    token = _latest.set(_Latest() if wanted else None)
    try:
        yield
    finally:
        _latest.reset(token)


def rounded(input: torch.Tensor) -> Rounded | None:
    """`input` in bytes, for `Weights.product`; None outside `products`."""
    latest = _latest.get()
    if latest is None:
        return None
    if latest.input is not input:
        latest.input, latest.rounded = input, round_tokens(input)
    return latest.rounded


def round_tokens(input: torch.Tensor) -> Rounded:
    """float32 `[..., in]` in bytes, each token scaled so that its largest number is 127; `MIDDLE` stands for zero."""
    tokens = input.reshape(-1, input.shape[-1])
    scales = _scales(tokens)
    return (tokens / scales).round_().to(torch.int8).bitwise_xor_(-MIDDLE).view(torch.uint8), scales


def _scales(rows: torch.Tensor) -> torch.Tensor:
    """For each row what stands for one step, `[rows, 1]`; of zeros the least there is, to divide by."""
    return rows.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)


class Weights:
    """A float32 matrix `[out, in]` in int8 in oneDNN's order, with a scale for each output.

    Raises `AttributeError` or `RuntimeError` on a processor or platform without it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        scales = _scales(weight)
        steps = (weight / scales).round_().to(torch.int8)
        self._scales = scales.squeeze(1)
        self._ordered = torch.ops.onednn.qlinear_prepack(steps, None)
        self._zeros = torch.zeros(len(steps), dtype=torch.int64)
        # What `MIDDLE` adds to each sum is taken away as a bias: with a zero point some processors are slow.
        self._shift = steps.sum(1).mul(-MIDDLE) * self._scales

    def product(self, input: Rounded) -> torch.Tensor:
        """`[tokens, in]` times the matrix, `[tokens, out]`."""
        steps, scales = input
        found = torch.ops.onednn.qlinear_pointwise(
            steps, 1.0, 0, self._ordered, self._scales, self._zeros, self._shift, 1.0, 0, torch.float32, "none", [],
            "")
        return found.mul_(scales)
