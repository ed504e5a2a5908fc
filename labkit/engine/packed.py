"""Linear maps whose frozen weights stand in memory in the order in which the processor multiplies them.

A plain matrix product puts the weights into that order each time. For few tokens this is much of
its work, and in float32 PyTorch takes another library, which was slow on the processor measured
(EXPERIMENTS.md). oneDNN, which PyTorch's builds for x86 bring, multiplies weights that are in order
already; PyTorch's own compiler uses the same two operations for frozen models.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from labkit.engine import int8


class Packed(torch.nn.Linear):
    """`torch.nn.Linear` with frozen weights, held in oneDNN's order as well; gradients reach its input alone.

    With `eight`, in float32, it has them in int8 too, for what is computed within `int8.products`.
    """

    def __init__(self, plain: torch.nn.Linear, eight: bool = False) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self._ordered = pack(plain.weight.detach())
        self._transposed: torch.Tensor | None = None  # for gradients, from the first one on
        self._eight = int8.Weights(plain.weight.detach()) if eight else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The same as `torch.nn.Linear`, within rounding."""
        if torch.is_grad_enabled() and input.requires_grad:
            return _Differentiable.apply(input, self)
        return self.product(input)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """The result alone, without a way back for gradients."""
        if self._eight is not None and (rounded := int8.rounded(input)) is not None:
            found = self._eight.product(rounded).view(*input.shape[:-1], self.out_features)
            return found if self.bias is None else found.add_(self.bias)
        return product(input, self._ordered, self.bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the input, from that of the output."""
        if self._transposed is None:
            self._transposed = pack(self.weight.detach().t().contiguous())
        return product(gradient, self._transposed)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, input: torch.Tensor, linear: Packed) -> torch.Tensor:
        context.linear = linear
        return linear.product(input)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return context.linear.input_gradient(gradients[0]), None


def install(network: PreTrainedModel, eight: bool = False) -> None:
    """Put `Packed` in the place of every linear map of a frozen network; with `eight` all but the last have int8 too.

    The last gives logits, a few of them for a prompt.
    """
    for part in list(network.modules()):
        for name, child in part.named_children():
            if type(child) is torch.nn.Linear:
                setattr(part, name, Packed(child, eight and child is not network.get_output_embeddings()))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Weights `[out, in]` in oneDNN's order.

    Raises `AttributeError` or `RuntimeError` on a processor or platform without it.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def product(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`[..., in]` times a packed matrix, `[..., out]`; raises as `pack` does."""
    return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
