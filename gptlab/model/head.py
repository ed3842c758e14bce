"""Heads: from the last features (b, t, d) to logits (b, t, v)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.model.linear import linear


def _capped(logits: Float[Tensor, "b t v"], soft_cap: float | None) -> Float[Tensor, "b t v"]:
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def _check(soft_cap: float | None) -> float | None:
    if soft_cap is not None and soft_cap <= 0:
        raise ConfigError(f"model.head.soft_cap={soft_cap} must be positive (null: none)")
    return soft_cap


@register("model/head", "tied")
class Tied(nn.Module):
    """Logits by the token embedding itself (Press & Wolf, 2017), as in GPT-2."""

    def __init__(self, embedding: nn.Embedding, *, soft_cap: float | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: the parameter belongs to the embedding, not to two modules
        self.soft_cap = _check(soft_cap)
        self.multiply: Callable[[Tensor, Tensor], Tensor] = linear

    @property
    def matrix(self) -> Tensor:
        """What the features are multiplied with, (v, d)."""
        return self._embedding[0].weight

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        return _capped(self.multiply(x, self.matrix), self.soft_cap)


@register("model/head", "untied")
class Untied(nn.Module):
    """Logits by a matrix of their own."""

    roles: ClassVar[dict[str, str]] = {"weight": "head"}

    def __init__(self, width: int, vocabulary: int, *, soft_cap: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))  # drawn by the init
        self.soft_cap = _check(soft_cap)
        self.multiply: Callable[[Tensor, Tensor], Tensor] = linear

    @property
    def matrix(self) -> Tensor:
        """What the features are multiplied with, (v, d)."""
        return self.weight

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        return _capped(self.multiply(x, self.matrix), self.soft_cap)
