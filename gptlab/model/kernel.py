"""Kernels: the same softmax(q·k)·v, written for reading, for speed, or for fusing any formula."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.model.dropout import drop
from gptlab.model.mask import Mask, causal, everything, written_out
from gptlab.model.path import on_cpu
from gptlab.model.position import ScoreBias


class Kernel(Protocol):
    """softmax(scale · q·kᵀ + bias, where mask) · v. b batch, h query heads, g key/value heads, t queries, s keys, k head width.

    `q_positions` and `k_positions` are places in the row (they may be (1, t)); they are one object when the keys are the
    queries' own tokens. `taps` are the attention's `scores` and `pattern`, for kernels that materialise them.
    """

    materialises_pattern: bool

    def __call__(
        self,
        q: Float[Tensor, "b h t k"],
        k: Float[Tensor, "b g s k"],
        v: Float[Tensor, "b g s k"],
        *,
        mask: Mask,
        bias: ScoreBias | None,
        q_positions: Int[Tensor, "b t"],
        k_positions: Int[Tensor, "b s"],
        scale: float,
        dropout: float,
        taps: tuple[nn.Module, nn.Module] | None = None,
    ) -> Float[Tensor, "b h t k"]: ...


def _grid(q: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, head, query and key places, each shaped to broadcast to (b, h, t, s)."""
    batch = torch.arange(max(q_positions.shape[0], q.shape[0]), device=q.device)[:, None, None, None]
    head = torch.arange(q.shape[1], device=q.device)[None, :, None, None]
    return batch, head, q_positions[:, None, :, None], k_positions[:, None, None, :]


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: ScoreBias | None,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    dropout: float,
    taps: tuple[nn.Module, nn.Module] | None = None,
) -> Tensor:
    """The definition: scores, mask, softmax, dropout, mean of values."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    b, h, i, j = _grid(q, q_positions, k_positions)
    scores = (q @ k.transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias(h, i, j).to(scores.dtype)
    scores = scores.masked_fill(~mask(b, h, i, j), -math.inf)
    if taps is not None:
        scores = taps[0](scores)
    pattern = scores.softmax(-1)
    if taps is not None:
        pattern = taps[1](pattern)
    return drop(pattern, dropout).to(v.dtype) @ v


@register("model/kernel", "naive")
class Naive:
    """Every score in memory, as in the paper: slow, and all of it can be seen and patched."""

    materialises_pattern = True

    def __call__(
        self,
        q: Float[Tensor, "b h t k"],
        k: Float[Tensor, "b g s k"],
        v: Float[Tensor, "b g s k"],
        *,
        mask: Mask,
        bias: ScoreBias | None,
        q_positions: Int[Tensor, "b t"],
        k_positions: Int[Tensor, "b s"],
        scale: float,
        dropout: float,
        taps: tuple[nn.Module, nn.Module] | None = None,
    ) -> Float[Tensor, "b h t k"]:
        return _written_out(q, k, v, mask, bias, q_positions, k_positions, scale, dropout, taps)


def _as_given(q: Tensor) -> AbstractContextManager[Any]:
    """On a CPU fp32 stays fp32: autocast would make bf16 of it, whose fused backward pass torch has five times slower there."""
    own = on_cpu(q) and q.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if own else nullcontext()


@register("model/kernel", "sdpa")
class SDPA:
    """torch's scaled_dot_product_attention: the fused kernel of the device."""

    materialises_pattern = False

    def __call__(
        self,
        q: Float[Tensor, "b h t k"],
        k: Float[Tensor, "b g s k"],
        v: Float[Tensor, "b g s k"],
        *,
        mask: Mask,
        bias: ScoreBias | None,
        q_positions: Int[Tensor, "b t"],
        k_positions: Int[Tensor, "b s"],
        scale: float,
        dropout: float,
        taps: tuple[nn.Module, nn.Module] | None = None,
    ) -> Float[Tensor, "b h t k"]:
        with _as_given(q):
            return self._attend(q, k, v, mask, bias, q_positions, k_positions, scale, dropout)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        bias: ScoreBias | None,
        q_positions: Tensor,
        k_positions: Tensor,
        scale: float,
        dropout: float,
    ) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if dropout > 0 and on_cpu(q):
            # torch's fused CPU kernel has no dropout: torch, too, would write the pattern out, and draw its mask serially.
            return _written_out(q, k, v, mask, bias, q_positions, k_positions, scale, dropout)
        if mask is causal and bias is None and q_positions is k_positions:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
        if mask is everything and bias is None:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, enable_gqa=grouped)
        if bias is None:
            allowed = _allowed_places(mask, q, q_positions, k_positions)
        else:
            b, h, i, j = _grid(q, q_positions, k_positions)
            allowed = torch.where(mask(b, h, i, j), bias(h, i, j).to(q.dtype), -math.inf)
        if not on_cpu(q):  # which reads one row for all heads where it is
            allowed = allowed.expand(q.shape[0], allowed.shape[1], q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale, enable_gqa=grouped)


def _allowed_places(mask: Mask, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """Where queries may look, (b or 1, 1, t, s), as the device's kernel has it: a bool, and on a CPU 0 or -inf, which it adds as it is."""
    held = None if torch.compiler.is_compiling() or q_positions is not k_positions else written_out.get(mask)
    if held and held[0].dtype in (q.dtype, torch.bool):
        return held[0]
    found = mask(*_grid(q, q_positions, k_positions))
    if on_cpu(q) and not torch.compiler.is_compiling():
        found = torch.where(found, 0.0, -math.inf).to(q.dtype)
    if held is not None:
        held[:] = [found]
    return found


@register("model/kernel", "flex")
class Flex:
    """FlexAttention: mask and bias formulas fused into one kernel on a GPU; on the CPU forward only."""

    materialises_pattern = False

    def __init__(self) -> None:
        self._compiled: Any = None

    def __call__(
        self,
        q: Float[Tensor, "b h t k"],
        k: Float[Tensor, "b g s k"],
        v: Float[Tensor, "b g s k"],
        *,
        mask: Mask,
        bias: ScoreBias | None,
        q_positions: Int[Tensor, "b t"],
        k_positions: Int[Tensor, "b s"],
        scale: float,
        dropout: float,
        taps: tuple[nn.Module, nn.Module] | None = None,
    ) -> Float[Tensor, "b h t k"]:
        if on_cpu(q) and torch.is_grad_enabled() and q.requires_grad:
            raise ConfigError("model/kernel=flex has no backward pass on the CPU; train with sdpa or naive, or on a GPU")
        if dropout > 0:
            raise ConfigError("model/kernel=flex has no dropout; use model.dropout=0, or model/kernel=sdpa or naive")
        from torch.nn.attention.flex_attention import flex_attention

        batch = q.shape[0]
        rows, keys = q_positions.expand(batch, -1), k_positions.expand(batch, -1)

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if bias is not None:
                value = value + bias(h, rows[b, i], keys[b, j]).to(value.dtype)
            return torch.where(_allowed(mask, b, h, rows[b, i], keys[b, j]), value, -math.inf)

        function: Any = flex_attention
        if q.device.type == "cuda":
            self._compiled = self._compiled or torch.compile(flex_attention, dynamic=False)
            function = self._compiled
        result: Tensor = function(q, k, v, score_mod=score, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return result


def _allowed(mask: Mask, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, ""]:
    return mask(b, h, i, j)
