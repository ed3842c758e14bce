"""Activation checkpointing: what of a block is kept for the backward pass, and what is computed again in it (Chen et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gptlab.config.registry import register

Layer = Callable[[Tensor], Tensor]
Recompute = Callable[[Layer, Tensor], Tensor]  # (a block, its input (b, t, d)) -> its output (b, t, d)

_ATEN = torch.ops.aten
# What `selective` keeps: matrix products and attention, which take the time; norms, activations, gates and dropout are computed again.
PRODUCTS = frozenset(
    (
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN.baddbmm.default,
        _ATEN._scaled_mm.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    )
)


@register("hardware/checkpointing", "none")
def none() -> Recompute:
    """Every activation is kept."""
    return lambda layer, x: layer(x)


@register("hardware/checkpointing", "block")
def block() -> Recompute:
    """A block keeps its input alone: least memory, for about one more forward pass."""
    return partial(checkpoint, use_reentrant=False)


@register("hardware/checkpointing", "selective")
def selective() -> Recompute:
    """A block keeps its matrix products and its attention (as in torchtitan, 2024); what lies between is computed again."""
    return partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    own = getattr(operator, "namespace", "") == "gptlab"  # the experts' products
    return CheckpointPolicy.MUST_SAVE if own or operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
