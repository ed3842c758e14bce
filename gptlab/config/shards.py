"""Whether a tensor is sharded over ranks, without the import of what makes such tensors: half a second of every start."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def in_shards(tensor: Any) -> TypeGuard[DTensor]:
    """Whether this is a DTensor, of which a rank holds its part."""
    made_by = sys.modules.get("torch.distributed.tensor")  # whoever has sharded one has imported it
    return made_by is not None and isinstance(tensor, made_by.DTensor)
