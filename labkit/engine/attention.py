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
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "labkit"
PROBED = 8  # keys looked at for the highest score: a text's first tokens draw most attention (arXiv 2309.17453)
KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shared:
    """What the prompts of some `rows` begin with: keys and values `[layers, 2, heads, tokens, width + 1]`.

    The last column holds ones: it lets a matrix product of keys take away each position's
    reference from its scores, and one of values add up the weights.
    """

    states: torch.Tensor
    rows: list[int]


@dataclass(frozen=True)
class _Over:
    """What `over` sets for the block within it."""

    states: torch.Tensor
    hidden: torch.Tensor | None
    shared: Sequence[Shared]
    fresh: list[KeysValues]


_past: ContextVar[_Over | None] = ContextVar("past", default=None)


def supported(network: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether `over` works for this architecture: plain full attention behind transformers' interface."""
    special = ("sliding_window", "attn_logit_softcapping", "layer_types", "attention_chunk_size")
    return bool(network._supports_attention_backend) and not any(getattr(config, name, None) for name in special)


@contextmanager
def over(states: torch.Tensor, lengths: list[int], shared: Sequence[Shared] = ()) -> Iterator[list[KeysValues]]:
    """Within the block, a forward pass without a cache attends over this past as well.

    `states` is `[layers, 2, rows, heads, tokens, width]`, right-aligned; row i has `lengths[i]`
    tokens. Before them come what rows have in common, `shared`: a row is in one of these at most.
    The list it yields receives the fresh tokens' keys and values, layer by layer.
    """
    hidden, longest = None, states.shape[4]
    if min(lengths) < longest:
        hidden = (torch.arange(longest) < longest - torch.tensor(lengths)[:, None])[:, None, None, :]
    fresh: list[KeysValues] = []
    token = _past.set(_Over(states, hidden, shared, fresh))
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
    if not past.shared and not past.states.shape[4]:  # no past at all: PyTorch's own is quicker by 2 ms a pass
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=query.shape[2] > 1)
    assert isinstance(module.layer_idx, int)
    keys, values = past.states[module.layer_idx]
    rows, heads, fresh, width = query.shape
    groups = key.shape[1]
    shared = heads // groups  # query heads that share one key head
    scaling = width**-0.5 if scaling is None else scaling
    folded = (query * scaling).reshape(rows, groups, shared * fresh, width)
    # Scores stay in the network's own format: softmax works in float32 inside, and to convert them takes far longer.
    before = folded @ keys.transpose(2, 3)
    if past.hidden is not None:
        before = before.masked_fill(past.hidden, -torch.inf)
    later = torch.ones(fresh, fresh, dtype=torch.bool).triu(1).repeat(shared, 1)
    among = (folded @ key.transpose(2, 3)).masked_fill(later, -torch.inf)
    if past.shared:
        layer = [(part.states[module.layer_idx], part.rows) for part in past.shared]
        mixed = _with_shared(folded, [(before, values), (among, value)], layer)
    else:
        weights = torch.cat([before, among], dim=-1).softmax(-1)
        mixed = weights[..., : keys.shape[2]] @ values + weights[..., keys.shape[2] :] @ value
    return mixed.reshape(rows, heads, fresh, width).transpose(1, 2), None


def _with_shared(
    query: torch.Tensor, own: list[KeysValues], shared: list[tuple[torch.Tensor, list[int]]]
) -> torch.Tensor:
    """Attention over each row's `own` scores and values, and over what some rows share.

    `query` is `[rows, key heads, n, width]`, as the result; scores and values are `[rows, key heads, n,
    tokens]` and `[rows, key heads, tokens, width]`; what is shared is `[2, key heads, tokens, width + 1]`.
    """
    heads, width = query.shape[1], query.shape[3]
    folded = [query[members].transpose(0, 1).reshape(heads, -1, width) for _, members in shared]
    for probed in (PROBED, None):  # all keys only if a later score was higher by 88, and exp left its range
        peak = torch.cat([scores.amax(-1, keepdim=True) for scores, _ in own if scores.shape[-1]], dim=-1)
        peak = peak.amax(-1, keepdim=True)
        for together, (states, members) in zip(folded, shared, strict=True):
            highest = (together @ states[0, :, :probed, :width].transpose(1, 2)).amax(-1, keepdim=True)
            peak[members] = peak[members].maximum(_unfolded(highest, len(members)))
        total = torch.stack([(scores - peak).exp_() @ torch.nn.functional.pad(values, (0, 1), value=1.0)
                             for scores, values in own]).float().sum(0)
        for together, (states, members) in zip(folded, shared, strict=True):
            reference = peak[members].transpose(0, 1).reshape(heads, -1, 1)
            weights = (torch.cat([together, -reference], dim=-1) @ states[0].transpose(1, 2)).exp_()
            total[members] += _unfolded(weights @ states[1], len(members))
        if total.isfinite().all():
            break
    return (total[..., :width] / total[..., width:]).to(query.dtype)


def _unfolded(sums: torch.Tensor, rows: int) -> torch.Tensor:
    """`[key heads, rows * n, …]` as `[rows, key heads, n, …]`."""
    return sums.view(sums.shape[0], rows, -1, sums.shape[-1]).transpose(0, 1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
