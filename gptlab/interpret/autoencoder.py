"""Sparse autoencoders: an activation as a sum of few of many directions, which are easier to name than its units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.interpret.activations import forward, losses
from gptlab.interpret.fitting import fit
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.interpret.sizes import collect
from gptlab.interpret.taps import Edit, Place, places

HELD_OUT = 0.1  # of the rows


class SparseAutoencoder(nn.Module):
    """x ≈ center + scale · Σ of `active` directions, those of the largest positive products with x (TopK; Gao et al., 2024).

    `center` and `scale` are the mean and the root mean square deviation of the activation; directions have length 1.
    """

    roles: ClassVar[dict[str, str]] = {"directions": "matrix", "offset": "bias"}
    center: Tensor
    scale: Tensor

    def __init__(self, width: int, features: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.encoder = nn.Linear(width, features)
        self.directions = nn.Parameter(torch.empty(features, width))
        self.offset = nn.Parameter(torch.zeros(width))
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        """The features of an activation: at most `active` of them are not zero."""
        products = F.relu(self.encoder((x - self.center) / self.scale - self.offset))
        largest = products.topk(self.active, -1)
        return torch.zeros_like(products).scatter(-1, largest.indices, largest.values)

    def decode(self, features: Float[Tensor, "... f"]) -> Float[Tensor, "... d"]:
        """The activation that features stand for."""
        return (features @ self.directions + self.offset) * self.scale + self.center

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def renormalise(self) -> None:
        """Directions back to length 1: else features could shrink as directions grow."""
        self.directions.copy_(F.normalize(self.directions, dim=-1))


@dataclass(frozen=True)
class Trained:
    """An autoencoder of one activation, and what it is worth on rows that it was not trained on.

    `explained`: the share of the variance that it gives back. `frequency`: the share of tokens at which a feature is active. Next-token
    losses in nats: `loss` of the model, `loss_through` with what the autoencoder gives back in the activation's place, `loss_without`
    with the mean there.
    """

    autoencoder: SparseAutoencoder
    name: str
    explained: float
    frequency: Float[Tensor, " f"]
    loss: float
    loss_through: float
    loss_without: float

    @property
    def alive(self) -> float:
        """The share of features that are ever active."""
        return float((self.frequency > 0).float().mean())


def train_autoencoder(
    model: Model,
    tokens: Tokens,
    name: str,
    *,
    features: int | None = None,
    active: int = 8,
    steps: int = 500,
    batch: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Trained:
    """A sparse autoencoder of one activation over a corpus of rows, of which a tenth is held out. `features`: eight times its width.

    Raises ConfigError for fewer than two rows, numbers that do not fit, and an activation that is no vector a token.
    """
    inside, ids = model_of(model), tokens_of(model, tokens, "the corpus")
    if len(ids) < 2:
        raise ConfigError("an autoencoder needs at least two rows of tokens: some are held out, to judge it")
    x = collect(model, ids, name).float()
    width = x.shape[-1]
    features = 8 * width if features is None else features
    if not 1 <= active <= features or batch < 1:
        raise ConfigError(f"active={active} must be from 1 to features={features}, and batch={batch} at least 1")
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ids), generator=draw).to(ids.device)
    split = max(1, round(HELD_OUT * len(ids)))
    held_out, vectors = ids[order[:split]], x[order[split:]].flatten(0, 1)
    made = SparseAutoencoder(width, features, active).to(vectors.device)
    with torch.no_grad():
        made.center.copy_(vectors.mean(0))
        made.scale.copy_((vectors - made.center).square().mean().sqrt().clamp(min=1e-12))
        made.directions.copy_(F.normalize(torch.randn(features, width, generator=draw), dim=-1))
        made.encoder.weight.copy_(made.directions)  # each feature begins by reading what it writes
        made.encoder.bias.zero_()

    def loss(step: int) -> Tensor:
        some = vectors[torch.randint(len(vectors), (min(batch, len(vectors)),), generator=draw).to(vectors.device)]
        error: Tensor = ((made(some) - some) / made.scale).square().mean()
        return error

    fit(made, loss, steps=steps, learning_rate=learning_rate, after=made.renormalise)
    made.requires_grad_(False)
    left = x[order[:split]].flatten(0, 1)
    spread = (left - left.mean(0)).square().sum()
    explained = 1 - float((made(left) - left).square().sum() / spread) if spread else 1.0
    frequency = (made.encode(left) > 0).float().mean(0)
    (place,) = places(inside, name)
    edits: tuple[dict[Place, Edit], ...] = (
        {},
        {place: lambda value: made(value.float()).to(value)},
        {place: lambda value: made.center.to(value)},
    )
    three = [float(losses(forward(inside, held_out, [], edit)[1], held_out).mean()) for edit in edits]
    return Trained(made, name, explained, frequency, *three)
