"""Attention: how a token gathers from the tokens before it. (b, t, d) -> (b, t, d)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.model.context import Context
from gptlab.model.dropout import drop
from gptlab.model.kernel import Kernel
from gptlab.model.linear import FusedLinear, Linear, OutputLinear
from gptlab.model.mask import causal, everything
from gptlab.model.mask import window as window_mask
from gptlab.model.norm import rms_normalised


@register("model/attention", "multihead")
class MultiHead(nn.Module):
    """Multi-head attention (Vaswani et al., 2017), with grouped keys and values, a sliding window and QK-norm at choice.

            ┌ q (h heads) ─ norm ─ rotate ┐
        x ──┼ k (g heads) ─ norm ─ rotate ┼─ softmax(q·k)·v ─ gate ─ out ──
            └ v (g heads) ─ value ────────┘

    `value` is called with the key/value heads and their width, and gives what is added to v; `gate` weighs the heads.
    With `document_mask` no token sees another document, and positions restart with each: the model asks for its documents
    (`Transformer.sees_documents`), and whoever feeds it gives them.
    Raises ConfigError when the heads do not divide the width, or kv_heads the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        kernel: Kernel,
        value: Callable[[int, int], nn.Module],
        gate: nn.Module,
        bias: bool,
        dropout: float,
        layer: int,
        scale: float,
        *,
        kv_heads: int | None = None,
        window: int | None = None,
        qk_norm: bool = False,
        document_mask: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ConfigError(f"model.attention.kv_heads={kv_heads} must divide model.heads={heads}")
        if window is not None and window < 1:
            raise ConfigError(f"model.attention.window={window} must be at least 1")
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.layer, self.qk_norm, self.dropout = layer, qk_norm, dropout
        self.document_mask = document_mask  # read by Transformer.sees_documents; the mask itself comes with the documents
        self.window = window  # what a cache must hold
        self.mask = causal if window is None else window_mask(window)
        # Normalised q and k have length sqrt(k), so the same scale holds scores within ±sqrt(k).
        self.scale = scale
        sizes = {"q": heads * head_width, "k": kv_heads * head_width, "v": kv_heads * head_width}
        self.qkv = FusedLinear(width, sizes, bias=bias)
        self.out = OutputLinear(heads * head_width, width, bias=bias)
        self.kernel, self.value, self.gate = kernel, value(kv_heads, head_width), gate
        self.q, self.k, self.v, self.z = nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity()  # taps
        if kernel.materialises_pattern:
            self.scores, self.pattern = nn.Identity(), nn.Identity()

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        b, t, _ = x.shape
        heads = self.qkv(x).view(b, t, self.heads + 2 * self.kv_heads, self.head_width)
        if self.qk_norm:
            qk, v = torch.split(heads, [self.heads + self.kv_heads, self.kv_heads], 2)
            q, k = torch.split(rms_normalised(qk, eps=1e-6), [self.heads, self.kv_heads], 2)
        else:
            q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), self.value(v.transpose(1, 2), context)
        q, k = context.position.rotate(q, k, context.positions)
        q, k, v = self.q(q), self.k(k), self.v(v)
        k_order = context.order
        mask = context.within(self.mask)
        if context.cache is not None:
            seen = context.cache.update(self.layer, k, v)
            k, v, k_order = seen.keys, seen.values, context.order if seen.places is None else seen.places
            mask = everything if seen.whole else mask
        z = self.kernel(
            q,
            k,
            v,
            mask=mask,
            bias=context.position.bias,
            q_positions=context.order,
            k_positions=k_order,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            taps=(self.scores, self.pattern) if self.kernel.materialises_pattern else None,
        )
        z = self.z(self.gate(z.transpose(1, 2), x).reshape(b, t, self.heads * self.head_width))
        return drop(self.out(z), self.dropout, self.training)


@register("model/attention", "average")
class Average(nn.Module):
    """The plain mean of the values so far: what attention is before it learns whom to ask. `document_mask` as in multihead."""

    def __init__(
        self,
        width: int,
        bias: bool,
        layer: int,
        *,
        form: Literal["loop", "matmul", "softmax"] = "matmul",
        document_mask: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.document_mask = layer, document_mask
        self.kv_heads, self.head_width = 1, width  # what a cache must hold
        self.value = Linear(width, width, bias=bias)
        self.out = OutputLinear(width, width, bias=bias)
        self.mean = {"loop": mean_by_loop, "matmul": mean_by_matmul, "softmax": mean_by_softmax}[form]
        self.z = nn.Identity()  # tap

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        value: Tensor = self.value(x)
        order, k_order = context.order, context.order
        if context.cache is not None:
            seen = context.cache.update(self.layer, value[:, None], value[:, None])
            value, k_order = seen.values[:, 0], order if seen.places is None else seen.places
        allowed = order[:, :, None] >= k_order[:, None, :]
        if context.document is not None:
            allowed = allowed & (k_order[:, None, :] >= context.document[:, :, None])
        out: Tensor = self.out(self.z(self.mean(value, allowed.expand(x.shape[0], -1, -1))))
        return out


def mean_by_loop(value: Float[Tensor, "b s d"], allowed: Int[Tensor, "b t s"]) -> Float[Tensor, "b t d"]:
    """One row and one query at a time: the definition."""
    rows = [torch.stack([v[seen].mean(0) for seen in row]) for v, row in zip(value, allowed, strict=True)]
    return torch.stack(rows)


def mean_by_matmul(value: Float[Tensor, "b s d"], allowed: Int[Tensor, "b t s"]) -> Float[Tensor, "b t d"]:
    """A product with a triangle of ones whose rows are divided by their sums."""
    weight = allowed.to(value.dtype)
    return (weight / weight.sum(-1, keepdim=True)) @ value


def mean_by_softmax(value: Float[Tensor, "b s d"], allowed: Int[Tensor, "b t s"]) -> Float[Tensor, "b t d"]:
    """Scores of zero, the future at -inf, softmax: attention with nothing to say."""
    scores = torch.zeros(allowed.shape, device=value.device, dtype=value.dtype).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ value
