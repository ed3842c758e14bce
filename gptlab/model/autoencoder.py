"""Sparse autoencoders: an activation as a sum of few of many directions, which are easier to name than its units."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PREFIX = "autoencoder."  # of its tensors, as a part of the model that it looks into


class SparseAutoencoder(nn.Module):
    """x ≈ center + scale · Σ of `active` directions, those of the largest positive products with x (TopK; Gao et al., 2024).

    `center` and `scale` are the mean and the root mean square deviation of the activation. Directions count with length 1, so that
    features cannot shrink as directions grow.
    """

    roles: ClassVar[dict[str, str]] = {"directions": "matrix", "offset": "bias"}
    center: Tensor
    scale: Tensor

    def __init__(self, width: int, features: int, active: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.active = active
        self.encoder = nn.Linear(width, features, device=device)
        self.directions = nn.Parameter(torch.empty(features, width, device=device))
        self.offset = nn.Parameter(torch.zeros(width, device=device))
        self.register_buffer("center", torch.zeros(width, device=device))
        self.register_buffer("scale", torch.ones((), device=device))

    @torch.no_grad()
    def initialise(self, draw: torch.Generator) -> SparseAutoencoder:
        """Draw directions, each of them read by its feature as it is written. Returns self."""
        drawn = torch.randn(self.directions.shape, generator=draw)
        self.directions.copy_(F.normalize(drawn, dim=-1))
        self.encoder.weight.copy_(self.directions)
        self.encoder.bias.zero_()
        return self

    @torch.no_grad()
    def standardise(self, x: Float[Tensor, "n d"]) -> None:
        """Take center and scale from these activations."""
        self.center.copy_(x.mean(0))
        self.scale.copy_((x - self.center).square().mean().sqrt().clamp(min=1e-12))

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        """The features of an activation: at most `active` of them are not zero."""
        products = F.relu(self.encoder((x - self.center) / self.scale - self.offset))
        largest = products.topk(self.active, -1)
        return torch.zeros_like(products).scatter(-1, largest.indices, largest.values)

    def decode(self, features: Float[Tensor, "... f"]) -> Float[Tensor, "... d"]:
        """The activation that features stand for."""
        return (features @ F.normalize(self.directions, dim=-1) + self.offset) * self.scale + self.center

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.decode(self.encode(x))
