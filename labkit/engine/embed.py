"""Embeddings of texts: the base model's final hidden states, averaged over a text's tokens."""

from collections.abc import Sequence

import torch

from labkit.engine import adapter as adapters
from labkit.engine.model import BaseModel


@torch.inference_mode()
def embed(model: BaseModel, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Unit vectors `[texts, hidden width]` in float32 for texts given as token ids, each at least one.

    The mean over all tokens, not the last token's state: this model was trained to predict the
    next token and nothing else, so its last state is mostly about that one token, while the mean
    keeps what every part of the text added. Padding does not enter the mean.
    """
    lengths = torch.tensor([len(ids) for ids in texts])
    padded = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
    for row, ids in enumerate(texts):
        padded[row, : len(ids)] = torch.tensor(ids)
    # No mask is needed: what stands right of a row's end is never looked at by its tokens.
    with adapters.active(model, None):
        states = model.network.base_model(input_ids=padded, use_cache=False).last_hidden_state.float()
    real = torch.arange(padded.shape[1]) < lengths[:, None]
    mean = (states * real.unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1)
    return torch.nn.functional.normalize(mean, dim=-1)
