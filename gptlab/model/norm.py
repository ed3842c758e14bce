"""Normalisation of the residual stream: (b, t, d) -> (b, t, d)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.registry import register
from gptlab.model.path import on_cpu


def rms_normalised(x: Float[Tensor, "... d"], eps: float) -> Float[Tensor, "... d"]:
    """x divided by its root mean square over the last axis (Zhang & Sennrich, 2019), in x's own type.

    torch has no fused kernel for it on the CPU, and its graph of seven small operators takes three times as long there.
    """
    if not on_cpu(x) or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    normalised: Tensor = _RMSNormalised.apply(x, eps)  # type: ignore[no-untyped-call]
    return normalised


class _RMSNormalised(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factor = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        normalised: Tensor = x * factor
        context.save_for_backward(normalised, factor)
        return normalised

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (normalised, factor) = gradients, context.saved_tensors
        along = (gradient * normalised).mean(-1, keepdim=True)  # the part that would only make x longer is taken out
        return torch.addcmul(gradient, normalised, along, value=-1).mul_(factor), None


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

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        assert self.eps is not None
        return rms_normalised(x, self.eps) * self.weight


@register("model/norm", "rmsnorm_nonparametric")
class NonparametricRMSNorm(nn.Module):
    """RMSNorm without the gain: nothing to learn, and one product less."""

    def __init__(self, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return rms_normalised(x, self.eps)


@register("model/norm", "layernorm_nonparametric")
class NonparametricLayerNorm(nn.Module):
    """LayerNorm without gain and bias, as in OLMo (Groeneveld et al., 2024)."""

    def __init__(self, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


@register("model/norm", "none")
class NoNorm(nn.Module):
    """No normalisation: the stream as it is."""

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return x
