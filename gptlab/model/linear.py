"""Linear layers that say what they are: their parts (for seeding) and whether they write to the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


class FusedLinear(nn.Linear):
    """Several products in one: `parts` names the slices of the output, each drawn from a seed of its own."""

    def __init__(self, width: int, parts: dict[str, int], *, bias: bool) -> None:
        super().__init__(width, sum(parts.values()), bias=bias)
        self.parts = parts


class OutputLinear(nn.Linear):
    """The last product of attention or feed-forward: what it gives is added to the residual stream."""


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Layers made here keep torch's uninitialised memory: `initialise` draws every parameter, and drawing twice is slow."""
    kept = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    try:
        for kind in kept:
            kind.reset_parameters = lambda self: None  # type: ignore[method-assign]
        yield
    finally:
        for kind, reset in kept.items():
            kind.reset_parameters = reset  # type: ignore[method-assign]
