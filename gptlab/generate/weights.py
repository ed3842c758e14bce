"""Weights as generation wants them: a step reads every one of them once, so that fewer bytes, laid out as they are read, are more speed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.product import cpu_multiplies_bf16
from gptlab.generate import native, step
from gptlab.model.linear import FusedLinear, HiddenLinear, Linear, OutputLinear
from gptlab.model.pages import Pages
from gptlab.model.transformer import Transformer

PRECISIONS = ("fp32", "bf16", "int8")
BF16_ROWS, INT8_ROWS = 8, 16  # up to so many rows our own products are the faster on a CPU
TORCH_INT8_ROWS = 2  # up to so many torch's int8 product, where there are none; above, the weights become bf16 again for the product


def for_generation(model: Transformer, precision: str) -> Transformer:
    """The model itself, to be generated with from here on, and for nothing else.

    `bf16` rounds the parameters (buffers keep their format: angles in bf16 would turn far positions wrongly). `int8` rounds each row of
    the matrices to 8 bits with a scale of its own, the head's among them; the rest is bf16, and so is what they are multiplied with. On a
    CPU the products of few rows are those of `native`, the weights lie in large pages, and a model of parts that `step` knows is prepared
    for it. Raises ConfigError for another name, or for bf16 on a CPU without it.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision} is not one of {', '.join(PRECISIONS)}")
    _round(model, precision)
    step.prepare(model)
    return model


def _round(model: Transformer, precision: str) -> None:
    device = model.embedding.weight.device
    on_cpu = device.type == "cpu"
    if precision == "bf16" and on_cpu and not cpu_multiplies_bf16():
        raise ConfigError("--precision bf16: this CPU has no bf16 products, which would be many times slower; use fp32 or int8")
    pages = Pages()
    for parameter in model.parameters():
        if precision != "fp32":
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.bfloat16)
        if on_cpu and precision != "int8":
            parameter.data = pages.copy(parameter.data)
    if precision == "fp32" or (precision == "bf16" and not on_cpu):
        return
    make: Callable[[Tensor], Callable[..., Tensor]] = _Bf16 if precision == "bf16" else partial(_Int8, pages=pages)
    module: Any
    for module in model.modules():
        if type(module) in (Linear, HiddenLinear, FusedLinear, OutputLinear):  # another kind may read its weight itself, as experts do
            module.product = make(module.weight)
            if precision == "int8":
                module.weight.data = torch.empty(0, device=device, dtype=torch.bfloat16)  # held once, in its new form
    head: Any = model.head
    if hasattr(head, "multiply"):
        head.multiply = make(head.matrix)


def held_bytes(model: Transformer) -> int:
    """Bytes of a model's weights, whatever form `for_generation` gave them."""
    products = {id(p): p for m in model.modules() for p in (getattr(m, "product", None), getattr(m, "multiply", None))}
    made = sum(p.bytes for p in products.values() if isinstance(p, _Int8))
    return made + sum(p.numel() * p.element_size() for p in model.parameters())


class _Bf16:
    """A product with a bf16 matrix on a CPU."""

    def __init__(self, weight: Float[Tensor, "o d"]) -> None:
        self._weight = weight.detach().contiguous()
        self._few = native.Product(self._weight) if native.available() else None

    @property
    def operands(self) -> tuple[Tensor, None]:
        """The matrix, and no scale."""
        return self._weight, None

    def __call__(self, x: Float[Tensor, "... d"], weight: Tensor, bias: Tensor | None = None, *, narrow: bool = False) -> Tensor:
        if self._few is not None and _rows(x) <= BF16_ROWS:
            return self._few(x, bias)
        # The matrix first: torch lays out anew what comes second, at every product, and that takes longer than the product.
        product = self._weight @ x.reshape(-1, x.shape[-1]).t()
        product = (product if bias is None else product + bias[:, None]).t()
        return product.reshape(*x.shape[:-1], -1)


class _Int8:
    """A product with a matrix of 8-bit numbers, each row with a scale."""

    def __init__(self, weight: Float[Tensor, "o d"], pages: Pages | None = None) -> None:
        rows = weight.detach().float()
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        # torch's product reads 16 numbers at a time, beyond a row's end where they do not fit: columns of zeros are added.
        self._spare = -rows.shape[1] % 16
        self._weight = F.pad((rows / scale).round().clamp(-127, 127).to(torch.int8), (0, self._spare))
        self._scale = scale[:, 0].contiguous()
        if pages is not None and weight.device.type == "cpu":
            self._weight = pages.copy(self._weight)
        self._few = native.Product(self._weight, self._scale) if weight.device.type == "cpu" and native.available() else None
        self.bytes = self._weight.numel() + 4 * self._scale.numel()

    @property
    def operands(self) -> tuple[Int8[Tensor, "o d"], Float[Tensor, " o"]]:
        """The 8-bit numbers, with the columns that were added, and the scale of their rows."""
        return self._weight, self._scale

    def __call__(self, x: Float[Tensor, "... d"], weight: Tensor, bias: Tensor | None = None, *, narrow: bool = False) -> Tensor:
        x = F.pad(x, (0, self._spare)) if self._spare else x
        if self._few is not None and _rows(x) <= INT8_ROWS:
            return self._few(x, bias)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= TORCH_INT8_ROWS and x.device.type == "cpu":
            product: Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self._weight, self._scale.to(x.dtype))
            product = product if bias is None else product + bias
        else:
            product = F.linear(rows, self._weight.to(x.dtype) * self._scale[:, None].to(x.dtype), bias)
        return product.view(*x.shape[:-1], -1)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
