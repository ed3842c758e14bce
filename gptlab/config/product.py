"""Products in bf16 on a CPU: where its instructions have none, the same numbers by fp32's. Model and optimizer share it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products; without, torch multiplies one number at a time (measured: 50 times slower)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def emulated(x: Tensor) -> bool:
    """Whether products of this tensor are made in fp32 of its bf16 numbers: these are exact there, and are summed in fp32 either way."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not cpu_multiplies_bf16()


def mm(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) · (m, k) in the format of `a`."""
    return torch.mm(a.float(), b.float()).to(a.dtype) if emulated(a) else torch.mm(a, b)
