"""Attention of a few fresh tokens over a long constant past.

Training on cached prompts differentiates through the fresh tokens only. PyTorch's fused
attention would work out gradients for all cached keys and values as well, a third of the
step's time; here the past enters as constants.

Rows whose prompts begin alike attend over that beginning together, without a copy for each: the
beginning and the rest each give unnormalised sums, which are added and then divided.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "labkit"
PROBED = 8  # keys looked at for the highest score: a text's first tokens draw most attention (arXiv 2309.17453)
FEW = 16  # fresh tokens to which the past is not joined: a copy costs more then, and gradients run through it
PIECE = 64  # queries at a time
KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shared:
    """What the prompts of some `rows` begin with: keys and values `[layers, 2, heads, tokens, width + 1]`.

    The last column holds ones: it lets a matrix product of keys take away each position's
    reference from its scores, and one of values add up the weights.
    """

    states: torch.Tensor
    rows: list[int]


class Enough(Exception):
    """Ends a forward pass of which only keys and values are wanted, where the last layer's are known."""


@dataclass(frozen=True)
class _Over:
    """What `over` sets for the block within it."""

    states: torch.Tensor
    first: int
    states_only: bool
    hidden: torch.Tensor | None
    shared: Sequence[Shared]
    fresh: list[KeysValues]
    later: dict[int, torch.Tensor] = field(default_factory=dict)  # masks by number of queries: alike in all layers

    def mask(self, count: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """What hides later keys from `count` queries of each of several `heads`, `[heads * count, count]`."""
        if count not in self.later:
            self.later[count] = torch.full((count, count), -torch.inf, dtype=dtype).triu(1).repeat(heads, 1)
        return self.later[count]


_past: ContextVar[_Over | None] = ContextVar("past", default=None)


def supported(network: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether `over` works for this architecture: plain full attention behind transformers' interface."""
    special = ("sliding_window", "attn_logit_softcapping", "layer_types", "attention_chunk_size")
    return bool(network._supports_attention_backend) and not any(getattr(config, name, None) for name in special)


@contextmanager
def over(
    states: torch.Tensor, lengths: list[int], shared: Sequence[Shared] = (), first: int = 0, states_only: bool = False
) -> Iterator[list[KeysValues]]:
    """Within the block, a forward pass without a cache attends over this past as well.

    `states` is `[layers, 2, rows, heads, tokens, width]`, right-aligned, of the layers from number
    `first` on, the only ones that may run then; row i has `lengths[i]` tokens. Before them come what
    rows have in common, `shared`: a row is in one of these at most.
    The list it yields receives the fresh tokens' keys and values, layer by layer. With `states_only`
    nothing else is wanted: the block ends with the last of these, by an `Enough` that it must catch.
    """
    hidden, longest = None, states.shape[4]
    if min(lengths) < longest:
        hidden = (torch.arange(longest) < longest - torch.tensor(lengths)[:, None])[:, None, None, :]
    fresh: list[KeysValues] = []
    token = _past.set(_Over(states, first, states_only, hidden, shared, fresh))
    try:
        yield fresh
    finally:
        _past.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function: PyTorch's own, unless a past is set by `over` that holds tokens.

    `query` is `[rows, query heads, n, width]`, `key` and `value` `[rows, key heads, n, width]`; the
    result is `[rows, n, query heads, width]`.
    """
    past = _past.get()
    if past is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    past.fresh.append((key.detach(), value.detach()))
    if past.states_only and len(past.fresh) == len(past.states):
        raise Enough
    assert isinstance(module.layer_idx, int)
    keys, values = past.states[module.layer_idx - past.first]
    own = [(keys, values), (key, value)]
    fresh = query.shape[2]
    if not keys.shape[2]:
        own = own[1:]
    elif fresh > FEW:
        own = [(torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2))]
    shared = [(part.states[module.layer_idx], part.rows) for part in past.shared]
    query = query * (query.shape[3] ** -0.5 if scaling is None else scaling)
    mixed = []
    for begin, end in [(0, fresh)] if shared else _pieces(fresh):
        keys, values = own[-1]
        seen = keys.shape[2] - fresh + end
        upto = [*own[:-1], (keys[:, :, :seen], values[:, :, :seen])]
        later = past.mask(end - begin, query.shape[1] // key.shape[1], query.dtype)
        mixed.append(_attend(query[:, :, begin:end], upto, past.hidden, later, shared))
    return torch.cat(mixed, dim=2).transpose(1, 2), None


def _pieces(fresh: int) -> list[tuple[int, int]]:
    """Where to part the queries: scores that the mask would hide are mostly not worked out then."""
    count = max(1, round(fresh / PIECE))
    return [(fresh * i // count, fresh * (i + 1) // count) for i in range(count)]


def _attend(
    query: torch.Tensor, own: list[KeysValues], hidden: torch.Tensor | None, later: torch.Tensor,
    shared: list[tuple[torch.Tensor, list[int]]],
) -> torch.Tensor:
    """Attention of scaled queries `[rows, query heads, n, width]`, the last of which stands where `own` ends.

    What is added to scores takes away keys on the left that are padding, `hidden`, and those of `later` queries.
    """
    rows, heads, count, width = query.shape
    groups = own[0][0].shape[1]
    folded = query.reshape(rows, groups, -1, width)  # query heads that share a key head, one after another
    # Scores stay in the network's own format: softmax works in float32 inside, and to convert them takes far longer.
    scores = [folded @ keys.transpose(2, 3) for keys, _ in own]
    if hidden is not None:
        scores[0][..., : hidden.shape[-1]].masked_fill_(hidden, -torch.inf)
    scores[-1][..., -count:].add_(later)
    values = [values for _, values in own]
    if shared:
        mixed = _with_shared(folded, list(zip(scores, values, strict=True)), shared)
    elif len(own) == 1:
        mixed = scores[0].softmax(-1) @ values[0]
    else:
        weights = torch.cat(scores, dim=-1).softmax(-1)
        before = values[0].shape[2]
        mixed = weights[..., :before] @ values[0] + weights[..., before:] @ values[1]
    return mixed.view(rows, heads, count, width)


def _with_shared(
    query: torch.Tensor, own: list[KeysValues], shared: list[tuple[torch.Tensor, list[int]]]
) -> torch.Tensor:
    """Attention over each row's `own` scores and values, and over what some rows share.

    `query` is `[rows, key heads, n, width]`, as the result; scores and values are `[rows, key heads, n,
    tokens]` and `[rows, key heads, tokens, width]`; what is shared is `[2, key heads, tokens, width + 1]`.
    """
    rows, heads, count, width = query.shape
    together = [(query if len(members) == rows else query[members]).transpose(0, 1).reshape(heads, -1, width)
                for _, members in shared]
    every = sum(len(members) for _, members in shared) == rows
    for probed in (PROBED, None):  # all keys only if a score was higher by 88, and exp left its range
        peak = torch.full((rows, heads, count, 1), -torch.inf, dtype=query.dtype)
        if not every or probed is None:
            peak = torch.cat([scores.amax(-1, keepdim=True) for scores, _ in own if scores.shape[-1]], dim=-1)
            peak = peak.amax(-1, keepdim=True)
        for folded, (states, members) in zip(together, shared, strict=True):
            highest = (folded @ states[0, :, :probed, :width].transpose(1, 2)).amax(-1, keepdim=True)
            peak[members] = peak[members].maximum(_unfolded(highest, len(members)))
        total = torch.zeros(rows, heads, count, width + 1, dtype=query.dtype)
        for scores, values in own:
            total += (scores - peak).exp_() @ torch.nn.functional.pad(values, (0, 1), value=1.0)
        for folded, (states, members) in zip(together, shared, strict=True):
            reference = peak[members].transpose(0, 1).reshape(heads, -1, 1)
            weights = (torch.cat([folded, -reference], dim=-1) @ states[0].transpose(1, 2)).exp_()
            sums = _unfolded(weights @ states[1], len(members))
            if len(members) == rows:
                total += sums
            else:
                total[members] += sums
        if total[..., width].isfinite().all():
            break
    return total[..., :width] / total[..., width:]


def _unfolded(sums: torch.Tensor, rows: int) -> torch.Tensor:
    """`[key heads, rows * n, …]` as `[rows, key heads, n, …]`."""
    return sums.view(sums.shape[0], rows, -1, sums.shape[-1]).transpose(0, 1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
