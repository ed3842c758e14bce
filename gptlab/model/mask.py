"""Masks: one elementwise formula each, of batch row b, head h, query place i and key place j.

Broadcast by the naive and SDPA kernels, used as `mask_mod` by FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Int
from torch import Tensor

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, " ..."]:
    """No token sees a later one."""
    return i >= j


def window(size: int) -> Mask:
    """Causal, and only the last `size` tokens (the token itself among them)."""

    def windowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, " ..."]:
        return (i >= j) & (i - j < size)

    return windowed


def within_documents(mask: Mask, document: Int[Tensor, "b t"]) -> Mask:
    """`mask`, and no token sees another document. For rows whose keys are the queries (no cache)."""

    def separated(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, " ..."]:
        return mask(b, h, i, j) & (document[b, i] == document[b, j])

    return separated
