"""LoRA over packed weights: what PEFT's layer computes, in one step forward and one back.

An adapter's own products are small, and most of their time is the dispatch of the operations
around them. PEFT's forward pass takes a dozen for each map, each with a derivative of its own.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear

from labkit.engine.packed import Packed


class PackedLora(Linear):
    """PEFT's layer over a `Packed` map; PEFT puts it there, see `adapter`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x W + (x A) B * scaling`, the adapter's part in its own float32, within rounding as PEFT's."""
        if self.disable_adapters or self.active_adapters[0] not in self.lora_A:  # others may be in more layers
            return self.base_layer(x)
        [name] = self.active_adapters
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return _Adapted.apply(x, down, up, self.scaling[name], self.base_layer)


class _Adapted(torch.autograd.Function):
    """`down` is A `[rank, in]`, `up` is B `[out, rank]`."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float, linear: Packed
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        between = (flat @ down.t()).mul_(scaling)
        found = linear.product(x)
        found.view(-1, found.shape[-1]).add_(between @ up.t())
        context.save_for_backward(flat, between, down, up)
        context.scaling, context.linear = scaling, linear
        return found

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, between, down, up = context.saved_tensors
        gradient = gradients[0].reshape(-1, up.shape[0]).float()
        to_between = (gradient @ up).mul_(context.scaling)
        to_x = None
        if context.needs_input_grad[0]:  # not in the first layer with an adapter: what enters it is constant
            to_x = context.linear.input_gradient(gradients[0])
            to_x.view(-1, down.shape[1]).add_(to_between @ down)
        return to_x, to_between.t() @ flat, gradient.t() @ between, None, None
