"""Masks: one elementwise formula each, of batch row b, head h, query place i and key place j.

Broadcast by the naive and SDPA kernels, used as `mask_mod` by FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Of each mask that is made for one pass what a kernel wrote out, for the layers behind it; gone with the mask. One that a layer keeps for
# ever is not among them: what it says of long rows would be held for ever, too.
written_out: WeakKeyDictionary[Mask, list[Tensor]] = WeakKeyDictionary()


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, " ..."]:
    """No token sees a later one."""
    return i >= j


def everything(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, " ..."]:
    """Every key: of one new token, whose cache holds what it may see and nothing else."""
    return j == j


def window(size: int) -> Mask:
    """Causal, and only the last `size` tokens (the token itself among them)."""

    def windowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, " ..."]:
        return (i >= j) & (i - j < size)

    return windowed


def document_starts(document: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """For each token the place in its row where its document begins. A document is a run of equal ids, whatever the ids."""
    place = torch.arange(document.shape[1], device=document.device)
    begins = torch.where(document[:, 1:] != document[:, :-1], place[1:], 0)
    return F.pad(begins, (1, 0)).cummax(1).values


def within_documents(mask: Mask, starts: Int[Tensor, "b t"]) -> Mask:
    """A causal `mask`, and no token sees another document. `starts` as of `document_starts`; for rows whose keys are the queries."""

    def separated(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, " ..."]:
        return mask(b, h, i, j) & (j >= starts[b, i])

    if not torch.compiler.is_compiling():
        written_out[separated] = []
    return separated
