"""Tables that a model reads and does not learn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tabulated(make: Callable[[], Tensor], *shape: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """What `make` makes, which has this shape and dtype; on the meta device the shape alone, and `make` is not asked.

    A model without memory is made for its counts. The first sum on that device imports torch's compiler, which takes a second.
    """
    where = torch.get_default_device() if device is None else device
    return torch.empty(shape, dtype=dtype, device=where) if where.type == "meta" else make()
