"""Input: what is made of the token embeddings before the first block. (b, t, d) -> (b, t, d)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config.registry import register
from gptlab.model.cache import KVCache
from gptlab.model.norm import rms_normalised


@register("model/input", "plain")
class PlainInput(nn.Module):
    """The embeddings as they are."""

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "b t"], cache: KVCache | None) -> Float[Tensor, "b t d"]:
        return x


@register("model/input", "normalised")
class NormalisedInput(nn.Module):
    """The embeddings at a root mean square of 1, so that the stream begins at one size whatever the embedding's."""

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "b t"], cache: KVCache | None) -> Float[Tensor, "b t d"]:
        return rms_normalised(x, eps=1e-6)


@register("model/input", "smear")
class Smear(nn.Module):
    """x[t] + strength · sigmoid(x[t] · gate) · x[t-1] on normalised embeddings: each token brings a little of the one before it.

    One learned strength (from 0, so that the model begins without it) and a gate of `width` weights, as in the speed runs of
    modded-nanoGPT (2025). The first token of a row or document has nothing before it. Every later layer can then attend to pairs.
    """

    roles: ClassVar[dict[str, str]] = {"strength": "bias", "gate": "bias"}
    sums: ClassVar[tuple[str, ...]] = ("gate",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(1))
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "b t"], cache: KVCache | None) -> Float[Tensor, "b t d"]:
        x = rms_normalised(x, eps=1e-6)
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        if cache is not None:
            if cache.length:
                assert cache.last is not None
                before = torch.cat((cache.last, x[:, :-1]), 1)
            cache.last = x[:, -1:]
        weight = self.strength * torch.sigmoid(x @ self.gate) * (positions > 0)
        return torch.addcmul(x, before, weight[..., None])
