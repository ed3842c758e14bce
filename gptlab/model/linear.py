"""Linear layers that say what they are: their parts (for seeding) and whether they write to the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.product import cpu_multiplies_bf16, mm
from gptlab.model.path import on_cpu

SMALL = 256  # features in or out


def linear(
    x: Float[Tensor, "... d"], weight: Float[Tensor, "o d"], bias: Float[Tensor, " o"] | None = None, *, narrow: bool = False
) -> Float[Tensor, "... o"]:
    """x · weightᵀ + bias. Under bf16 autocast on a CPU a small matrix multiplies in bf16, forward and backward, and gives fp32.

    torch's own autocast gives bf16, and sums and products of unlike types cost a narrow model all that its matrix products gain
    (a step of width 128 takes 0.75 of the time of fp32 this way, and as long as fp32 that way; at width 384 torch's is the faster by
    a fifth; a CPU without bf16 instructions goes this way at any width). `narrow`: leave it in bf16 all the same, for what only goes
    through a function on its way to the next product.
    """
    own = on_cpu(x) and torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    if own and (min(weight.shape) < SMALL or not cpu_multiplies_bf16()):
        product: Tensor = _Product.apply(x, weight, torch.get_autocast_dtype("cpu"), narrow)  # type: ignore[no-untyped-call]
        return product if bias is None else product + bias.to(product.dtype)
    return F.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, narrow: bool) -> Tensor:
        rows, matrix = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        context.save_for_backward(rows, matrix)
        context.shape, context.dtype = x.shape, x.dtype
        product = mm(rows, matrix.t())
        return (product if narrow else product.float()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, matrix = context.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).to(rows.dtype)
        of_x = mm(gradient, matrix).to(context.dtype).view(context.shape) if context.needs_input_grad[0] else None
        of_weight = mm(gradient.t(), rows).float() if context.needs_input_grad[1] else None
        return of_x, of_weight, None, None


class Linear(nn.Linear):
    """A linear layer by `linear`, or by another `product`, as hardware.precision=fp8 has one; what it gives may stay `narrow`."""

    narrow = False

    def __init__(self, width: int, outputs: int, *, bias: bool) -> None:
        super().__init__(width, outputs, bias=bias)
        self.product: Callable[..., Tensor] = linear
        self.adapter: nn.Module | None = None  # what is added to the product: gptlab/model/lora.py

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... o"]:
        product = self.product(x, self.weight, self.bias, narrow=self.narrow)
        return product if self.adapter is None else product + self.adapter(x)


class HiddenLinear(Linear):
    """The first product of a feed-forward: what it gives goes through an activation into the next product."""

    narrow = True


class FusedLinear(Linear):
    """Several products in one: `parts` names the slices of the output, each drawn from a seed of its own."""

    def __init__(self, width: int, parts: dict[str, int], *, bias: bool) -> None:
        super().__init__(width, sum(parts.values()), bias=bias)
        self.parts = parts


class OutputLinear(Linear):
    """The last product of attention or feed-forward: what it gives is added to the residual stream."""


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Layers made here keep torch's uninitialised memory: `initialise` draws every parameter, and drawing twice is slow."""
    kept = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    try:
        for kind in kept:
            kind.reset_parameters = lambda self: None  # type: ignore[method-assign]
        yield
    finally:
        for kind, reset in kept.items():
            kind.reset_parameters = reset  # type: ignore[method-assign]
