"""Value: what is added to attention's values beside what comes from the stream. (b, g, t, k) -> (b, g, t, k)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.model.context import Context


@register("model/value", "none")
class NoValue(nn.Module):
    """Nothing."""

    def forward(self, v: Float[Tensor, "b g t k"], context: Context) -> Float[Tensor, "b g t k"]:
        return v


@register("model/value", "embedding")
class ValueEmbedding(nn.Module):
    """v + scale · table[token]: a second embedding of the tokens, read straight into the values (Zhou et al., 2024).

    A table of vocabulary x kv width for each `every`-th layer, counted from the last, and a learned scale a head; no FLOPs to speak of.
    """

    roles: ClassVar[dict[str, str]] = {"scale": "gain"}

    def __init__(self, kv_heads: int, head_width: int, vocabulary: int, layer: int, depth: int, *, every: int = 1) -> None:
        super().__init__()
        if every < 1:
            raise ConfigError(f"model.value.every={every} must be at least 1")
        self.kv_heads, self.head_width = kv_heads, head_width
        self.here = (depth - 1 - layer) % every == 0
        if self.here:
            self.table = nn.Embedding(vocabulary, kv_heads * head_width)
            self.scale = nn.Parameter(torch.ones(kv_heads, 1, 1))

    def forward(self, v: Float[Tensor, "b g t k"], context: Context) -> Float[Tensor, "b g t k"]:
        if not self.here:
            return v
        b, t = context.tokens.shape
        looked_up = self.table(context.tokens).view(b, t, self.kv_heads, self.head_width).transpose(1, 2)
        return torch.addcmul(v, self.scale.to(v.dtype), looked_up.to(v.dtype))
