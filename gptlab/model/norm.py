"""Normalisation of the residual stream: (b, t, d) -> (b, t, d)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.registry import register


@register("model/norm", "layernorm")
class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al., 2016): mean and variance, a gain, and a bias where the model has biases."""

    def __init__(self, width: int, bias: bool, *, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps, bias=bias)


@register("model/norm", "rmsnorm")
class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation (Zhang & Sennrich, 2019): no mean, no bias."""

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__(width, eps=eps)


@register("model/norm", "none")
class NoNorm(nn.Module):
    """No normalisation: the stream as it is."""

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return x
