"""Matrix products in 8 bits: e4m3 forward, e5m2 gradients, one scale a tensor taken from its largest value (Micikevicius et al., 2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16  # every size of a product must be a multiple of this: cuBLAS's rule
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, narrow: bool = False) -> Tensor:
    """x (…, d) · weight (o, d)ᵀ + bias, multiplied in 8 bits forward and backward, in bf16.

    A product with a size that is no multiple of 16, as a gate's few columns, stays in bf16. `narrow` is of no account: all is bf16.
    """
    if any(size % TILE for size in (*weight.shape, x.numel() // x.shape[-1])):
        return F.linear(x, weight, bias)
    made: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return made if bias is None else made + bias.to(made.dtype)


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits, scaled so that its largest value is the format's, and the scale (fp32, a scalar) that takes it back."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype), scale


def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """(m, k) · (n, k)ᵀ: the hardware wants both with k innermost.

    On a CPU the same product of the same 8-bit values, summed in fp32 as well: torch's own takes 0.2 s there for 512 x 64 x 256.
    """
    if not a[0].is_cuda:
        return (a[0].float() @ b[0].float().t()).mul_(a[1] * b[1]).bfloat16()
    return torch._scaled_mm(a[0].contiguous(), b[0].contiguous().t(), scale_a=a[1], scale_b=b[1], out_dtype=torch.bfloat16)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, matrix = quantised(x.reshape(-1, x.shape[-1]), FORWARD), quantised(weight, FORWARD)
        context.save_for_backward(*rows, *matrix)
        context.shape, context.dtypes = x.shape, (x.dtype, weight.dtype)
        return product(rows, matrix).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, row_scale, matrix, matrix_scale = context.saved_tensors
        given, scale = quantised(gradients[0].reshape(-1, gradients[0].shape[-1]), BACKWARD)
        of_x = of_weight = None
        if context.needs_input_grad[0]:
            of_x = product((given, scale), (matrix.t(), matrix_scale)).to(context.dtypes[0]).view(context.shape)
        if context.needs_input_grad[1]:
            of_weight = product((given.t(), scale), (rows.t(), row_scale)).to(context.dtypes[1])
        return of_x, of_weight
