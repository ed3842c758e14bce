"""Keys and values of the tokens already seen, so that generation feeds each token once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class KVCache:
    """Preallocated keys (already rotated) and values of every layer, for `batch` rows of equal length.

    The Transformer calls `advance` once after each forward pass; each attention calls `update` within it.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        *,
        layers: int,
        kv_heads: int,
        head_width: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (layers, batch, kv_heads, capacity, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.last: Tensor | None = None  # (b, 1, d): the last token as `model/input=smear` left it for the next one
        self.capacity = capacity
        self.length = 0

    def update(
        self, layer: int, k: Float[Tensor, "b g t k"], v: Float[Tensor, "b g t k"]
    ) -> tuple[Float[Tensor, "b g s k"], Float[Tensor, "b g s k"]]:
        """Append this pass's keys and values of a layer; return all so far."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {end}")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens of a finished forward pass."""
        self.length += tokens
