"""Gate: how much of each attention head is let through. z (b, t, h, k), x (b, t, d) -> (b, t, h, k)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.model.linear import linear


@register("model/gate", "none")
class NoGate(nn.Module):
    """All of it."""

    def forward(self, z: Float[Tensor, "b t h k"], x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h k"]:
        return z


@register("model/gate", "per_head")
class PerHead(nn.Module):
    """z · 2 · sigmoid(x · weight), a number a head and token (Qiu et al., 2025): a head can say nothing where it found nothing.

    The weights begin at 0, so that every gate begins at 1. `inputs`: how many of x's features it sees, as in modded-nanoGPT (2025).
    """

    roles: ClassVar[dict[str, str]] = {"weight": "bias"}

    def __init__(self, width: int, heads: int, *, inputs: int = 16) -> None:
        super().__init__()
        if inputs < 1:
            raise ConfigError(f"model.gate.inputs={inputs} must be at least 1; one beyond model.width means all of them")
        self.inputs = min(inputs, width)
        self.weight = nn.Parameter(torch.zeros(heads, self.inputs))

    def forward(self, z: Float[Tensor, "b t h k"], x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h k"]:
        gate = 2 * torch.sigmoid(linear(x[..., : self.inputs], self.weight))
        return z * gate[..., None].to(z.dtype)
