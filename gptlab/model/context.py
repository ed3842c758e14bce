"""What every block may see of the forward pass: made once, handed down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.model.cache import KVCache
from gptlab.model.mask import Mask, within_documents

if TYPE_CHECKING:
    from gptlab.model.position import Position


class Auxiliary:
    """What parts add to the training loss, kept in a dictionary of the caller's.

    No dictionary itself: FSDP hands a block copies of the dictionaries that hold what it differentiates, and entries would be lost.
    """

    def __init__(self, into: dict[str, Tensor]) -> None:
        self._into = into

    def __setitem__(self, name: str, loss: Tensor) -> None:
        self._into[name] = loss


@dataclass
class Context:
    """One forward pass. b batch, t queries, d width.

    `positions` restart with each document and feed embeddings and rotations; `order` is a token's place in its row, always
    rising, and feeds masks and score biases. Both are (1, t) in the common case of rows 0…t-1. `document` names each token's
    document by the place in the row where it begins, whatever ids the caller gave; None where all of a row is one document.

    `losses`: what a part adds to the training loss (a load balance), a mean over the tokens under a name of its own, assigned and
    never added to, since a checkpointed block runs twice; None where nobody asks.
    """

    tokens: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    order: Int[Tensor, "b t"]
    document: Int[Tensor, "b t"] | None
    embedded: Float[Tensor, "b t d"]
    position: Position
    cache: KVCache | None = None
    losses: Auxiliary | None = None
    masks: dict[Mask, Mask] = field(default_factory=dict, init=False, repr=False)  # of this pass

    def within(self, mask: Mask) -> Mask:
        """`mask` within the documents, if there are any: one object for all layers, of which a kernel may keep what it said."""
        if self.document is None:
            return mask
        if torch.compiler.is_compiling():
            return within_documents(mask, self.document)
        if mask not in self.masks:
            self.masks[mask] = within_documents(mask, self.document)
        return self.masks[mask]
