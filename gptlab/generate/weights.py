"""Weights as generation wants them: a step reads every one of them once, so that fewer bytes, laid out as they are read, are more speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.product import cpu_multiplies_bf16
from gptlab.model.linear import FusedLinear, HiddenLinear, Linear, OutputLinear
from gptlab.model.transformer import Transformer

PRECISIONS = ("fp32", "bf16", "int8")
INT8_ROWS = 2  # up to so many rows torch's int8 product is the faster on a CPU; above, the weights become bf16 again for the product


def for_generation(model: Transformer, precision: str) -> Transformer:
    """The model itself, to be generated with from here on, and for nothing else.

    `bf16` rounds the parameters (buffers keep their format: angles in bf16 would turn far positions wrongly), and on a CPU with bf16
    products lays the matrices out as oneDNN reads them, once instead of at every product: about 1.7 times as fast. `int8` rounds each
    row of the matrices to 8 bits with a scale of its own, the head's among them; the rest is bf16. Raises ConfigError for another name, or
    for bf16 on a CPU without it.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision} is not one of {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return model
    device = model.embedding.weight.device
    packs = precision == "bf16" and device.type == "cpu"
    if packs and not cpu_multiplies_bf16():
        raise ConfigError("--precision bf16: this CPU has no bf16 products, which would be many times slower; use fp32 or int8")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.bfloat16)
    if precision == "bf16" and not packs:
        return model
    make: Callable[[Tensor], Callable[..., Tensor]] = _Packed if packs else _Int8
    module: Any
    for module in model.modules():
        if type(module) in (Linear, HiddenLinear, FusedLinear, OutputLinear):  # another kind may read its weight itself, as experts do
            module.product = make(module.weight)
            module.weight.data = torch.empty(0, device=device, dtype=torch.bfloat16)  # held once, in its new form
    head: Any = model.head
    if hasattr(head, "multiply"):
        head.multiply = make(head.matrix)
    return model


def held_bytes(model: Transformer) -> int:
    """Bytes of a model's weights, whatever form `for_generation` gave them."""
    products = {id(p): p for m in model.modules() for p in (getattr(m, "product", None), getattr(m, "multiply", None))}
    made = sum(p.bytes for p in products.values() if isinstance(p, (_Packed, _Int8)))
    return made + sum(p.numel() * p.element_size() for p in model.parameters())


class _Packed:
    """A product with a bf16 matrix that oneDNN has laid out once. Its own layout, since torch's product makes it anew each time."""

    def __init__(self, weight: Float[Tensor, "o d"]) -> None:
        self.bytes = 2 * weight.numel()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)

    def __call__(self, x: Float[Tensor, "... d"], weight: Tensor, bias: Tensor | None = None, *, narrow: bool = False) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, bias, "none", [], "")
        return product


class _Int8:
    """A product with a matrix of 8-bit numbers, each row with a scale."""

    def __init__(self, weight: Float[Tensor, "o d"]) -> None:
        rows = weight.detach().float()
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        # torch's product reads 16 numbers at a time, beyond a row's end where they do not fit: columns of zeros are added.
        self._spare = -rows.shape[1] % 16
        self._weight = F.pad((rows / scale).round().clamp(-127, 127).to(torch.int8), (0, self._spare))
        self._scale = scale[:, 0].to(torch.bfloat16)
        self.bytes = self._weight.numel() + 2 * self._scale.numel()

    def __call__(self, x: Float[Tensor, "... d"], weight: Tensor, bias: Tensor | None = None, *, narrow: bool = False) -> Tensor:
        rows = F.pad(x.reshape(-1, x.shape[-1]), (0, self._spare))
        if rows.shape[0] <= INT8_ROWS and x.device.type == "cpu":
            product: Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self._weight, self._scale)
            product = product if bias is None else product + bias
        else:
            product = F.linear(rows, self._weight.to(x.dtype) * self._scale[:, None], bias)
        return product.view(*x.shape[:-1], -1)
