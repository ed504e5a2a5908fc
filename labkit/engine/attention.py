"""Attention of a few fresh tokens over a long constant past.

Training on cached prompts differentiates through the fresh tokens only. PyTorch's fused
attention would work out gradients for all cached keys and values as well, a third of the
step's time; here the past enters as constants.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "labkit"
KeysValues = tuple[torch.Tensor, torch.Tensor]
_past: ContextVar[tuple[torch.Tensor, torch.Tensor | None, list[KeysValues]] | None] = ContextVar("past", default=None)


def supported(network: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether `over` works for this architecture: plain full attention behind transformers' interface."""
    special = ("sliding_window", "attn_logit_softcapping", "layer_types", "attention_chunk_size")
    return bool(network._supports_attention_backend) and not any(getattr(config, name, None) for name in special)


@contextmanager
def over(states: torch.Tensor, lengths: list[int]) -> Iterator[list[KeysValues]]:
    """Within the block, a forward pass without a cache attends over this past as well.

    `states` is `[layers, 2, rows, heads, tokens, width]`, right-aligned; row i has `lengths[i]`
    tokens. The list it yields receives the fresh tokens' keys and values, layer by layer.
    """
    hidden, longest = None, states.shape[4]
    if min(lengths) < longest:
        hidden = (torch.arange(longest) < longest - torch.tensor(lengths)[:, None])[:, None, None, :]
    fresh: list[KeysValues] = []
    token = _past.set((states, hidden, fresh))
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
    """Transformers' attention function: PyTorch's own, unless a past is set by `over`.

    `query` is `[rows, query heads, n, width]`, `key` and `value` `[rows, key heads, n, width]`; the
    result is `[rows, n, query heads, width]`.
    """
    past = _past.get()
    if past is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    states, hidden, seen = past
    seen.append((key.detach(), value.detach()))
    assert isinstance(module.layer_idx, int)
    keys, values = states[module.layer_idx]
    rows, heads, fresh, width = query.shape
    groups = key.shape[1]
    shared = heads // groups  # query heads that share one key head
    scaling = width**-0.5 if scaling is None else scaling
    folded = (query * scaling).reshape(rows, groups, shared * fresh, width)
    before = (folded @ keys.transpose(2, 3)).float()
    if hidden is not None:
        before = before.masked_fill(hidden, -torch.inf)
    later = torch.ones(fresh, fresh, dtype=torch.bool).triu(1).repeat(shared, 1)
    among = (folded @ key.transpose(2, 3)).float().masked_fill(later, -torch.inf)
    weights = torch.cat([before, among], dim=-1).softmax(-1).to(query.dtype)
    mixed = weights[..., : keys.shape[2]] @ values + weights[..., keys.shape[2] :] @ value
    return mixed.reshape(rows, heads, fresh, width).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
