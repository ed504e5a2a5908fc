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
from functools import reduce
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "labkit"
FEW = 16  # fresh tokens to which the past is not joined: a copy costs more then, and gradients run through it
PIECE = 64  # queries at a time
SAFE = 1e30  # a sum of exp(score) between this and its inverse lost nothing; float32 and bfloat16 end at 3e38
KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shared:
    """What the prompts of some `rows` begin with: keys and values `[layers, 2, heads, tokens, width]`."""

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
    parts = [(found, values) for found, (_, values) in zip(scores, own, strict=True)]
    mixed = _with_shared(folded, parts, shared) if shared else None
    if mixed is None:
        parts = [*_spread(folded, shared), *parts]
        scores = [found for found, _ in parts]
        weights = (torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]).softmax(-1)
        pieces = weights.split([found.shape[-1] for found in scores], dim=-1)
        mixed = reduce(torch.add, (piece @ values for piece, (_, values) in zip(pieces, parts, strict=True)))
    return mixed.view(rows, heads, count, width)


def _with_shared(
    query: torch.Tensor, own: list[KeysValues], shared: list[tuple[torch.Tensor, list[int]]]
) -> torch.Tensor | None:
    """Attention over each row's `own` scores and values, and over what some rows share.

    `query` is `[rows, key heads, n, width]`, as the result; scores and values are `[rows, key heads, n,
    tokens]` and `[rows, key heads, tokens, width]`; what is shared is `[2, key heads, tokens, width]`.
    Scores enter exp as they are, which saves a pass over them; None if one was too high or all too low for that.
    """
    rows, heads, _, width = query.shape
    mixed, total = torch.zeros_like(query), torch.zeros_like(query[..., :1])
    for scores, values in own:
        weights = scores.exp()
        mixed += weights @ values
        total += weights.sum(-1, keepdim=True)
    for (keys, values), members in shared:
        every = len(members) == rows
        folded = (query if every else query[members]).transpose(0, 1).reshape(heads, -1, width)
        weights = (folded @ keys.transpose(1, 2)).exp_()
        for sums, part in ((mixed, weights @ values), (total, weights.sum(-1, keepdim=True))):
            part = part.view(heads, len(members), -1, part.shape[-1]).transpose(0, 1)
            if every:
                sums += part
            else:
                sums[members] += part
    least, most = total.aminmax()
    return mixed / total if least > 1 / SAFE and most < SAFE else None  # and None for NaN


def _spread(query: torch.Tensor, shared: list[tuple[torch.Tensor, list[int]]]) -> Iterator[KeysValues]:
    """What some rows share as scores and values of every row; the scores of other rows take them away."""
    rows, heads, count, _ = query.shape
    for (keys, values), members in shared:
        scores = torch.full((rows, heads, count, keys.shape[1]), -torch.inf, dtype=query.dtype)
        scores[members] = query[members] @ keys.transpose(1, 2)
        yield scores, values.expand(rows, -1, -1, -1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
