"""Which of a part's paths is taken: the one measured to be best on a CPU, or the one for every other device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

_elsewhere = False


def on_cpu(x: Tensor) -> bool:
    """Whether a tensor is worked on by the CPU's own paths."""
    return x.device.type == "cpu" and not _elsewhere


@contextlib.contextmanager
def as_elsewhere() -> Iterator[None]:
    """In here tensors of the CPU go the way of a GPU's: what a GPU holds can be forecast where there is none."""
    global _elsewhere
    before, _elsewhere = _elsewhere, True
    try:
        yield
    finally:
        _elsewhere = before
