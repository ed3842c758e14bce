"""Stream: what becomes of the residual stream on its way into a block. (b, t, d) -> (b, t, d)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.registry import register
from gptlab.model.context import Context


@register("model/stream", "plain")
class PlainStream(nn.Module):
    """As it comes."""

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        return x


@register("model/stream", "input_skip")
class InputSkip(nn.Module):
    """keep · x + skip · embedded, two learned numbers a layer (from 1 and 0): a residual scale, and a way back to the embedding.

    As in the speed runs of modded-nanoGPT (2024). Into the first block the two are the same tensor, and there is no skip.
    """

    roles: ClassVar[dict[str, str]] = {"keep": "gain", "skip": "bias"}

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.keep = nn.Parameter(torch.ones(1))
        self.skip = nn.Parameter(torch.zeros(1)) if layer else None

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        return self.keep * x if self.skip is None else torch.addcmul(self.keep * x, self.skip, context.embedded)
