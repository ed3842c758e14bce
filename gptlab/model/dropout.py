"""Dropout. torch draws a CPU mask from one serial generator, a third of a small model's step; ours takes 16 bits an element."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.model.path import on_cpu

LEVELS = 1 << 16


def drop(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element with probability p and scale the rest by 1 / (1 - p) (Srivastava et al., 2014).

    On the CPU p is rounded to 1 / 65,536, and the mask comes from a stream seeded by torch's generator, so that a checkpoint of
    that generator resumes it.
    """
    if p == 0 or not training:
        return x
    if not on_cpu(x) or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped: Tensor = _SeededDropout.apply(x, p)  # type: ignore[no-untyped-call]
    return dropped


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * LEVELS)
        seed = int(torch.randint(1 << 62, ()))
        stream = np.random.Generator(np.random.SFC64(seed))
        words = stream.integers(0, 1 << 64, size=-(-x.numel() // 4), dtype=np.uint64, endpoint=False)
        bits = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)
        # 0 or 1 / (1 - p) in x's own type: products of unlike types are several times slower on the CPU
        factor = torch.ge(bits, dropped - LEVELS // 2, out=torch.empty_like(x, memory_format=torch.contiguous_format))
        factor.mul_(LEVELS / (LEVELS - dropped))
        context.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = context.saved_tensors
        return gradients[0] * factor, None
