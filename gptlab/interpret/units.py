"""The hidden units (or an autoencoder's features) that a text excites, and what else in a corpus excites them, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.interpret.activations import forward
from gptlab.interpret.features import Features
from gptlab.interpret.given import Model, model_of, tokens_of
from gptlab.interpret.taps import places
from gptlab.model.transformer import Transformer

PASS = 1024  # tokens of a corpus in one forward: all layers' hidden units are held

_Read: TypeAlias = tuple[str, Callable[[Tensor], Tensor]]  # the activation, and what is made of it


@dataclass(frozen=True)
class Excited:
    """A unit: its activation on the text (t,), and the rows of a corpus that excite it most, with its activation there.

    `layer`: the number of the layer whose hidden unit it is; of an autoencoder's feature what it reads, as `features of blocks.1`.
    """

    layer: str
    unit: int
    own: Float[Tensor, " t"]
    texts: list[tuple[int, Float[Tensor, " s"]]]

    @property
    def high(self) -> float:
        """Its largest activation, in the corpus or on the text."""
        return max(float(values.max()) for values in (self.own, *(own for _, own in self.texts)))


def excited(
    model: Model,
    tokens: Tensor,
    corpus: Int[Tensor, "n s"] | None,
    *,
    document: Int[Tensor, "n s"] | None = None,
    per_layer: int = 6,
    top: int = 4,
    features: Features | None = None,
) -> list[Excited]:
    """Of each layer the units that rise furthest above their own mean on the text (1, t), the furthest first; of `features` before them.

    With a corpus, also its rows where each is largest, as far as it rises above 0 there; `document` is that of each token of the corpus,
    where several share a row and the model keeps them apart. Layers without hidden units (no feed-forward, experts) have none.
    """
    inside, ids = model_of(model), tokens_of(model, tokens)
    read: dict[str, _Read] = {} if features is None else {f"features of {features.name}": (features.name, features.encode)}
    for number, block in enumerate(inside.blocks):
        if hasattr(block.ffn, "hidden") and hasattr(block.ffn, "down"):
            read[str(number)] = (f"blocks.{number}.ffn.hidden", Tensor.float)
    if not read:
        return []
    own = {layer: values[0] for layer, values in _units(inside, ids, read).items()}
    units = {layer: (x.amax(0) - x.mean(0)).topk(min(per_layer, x.shape[-1])).indices for layer, x in own.items()}
    seen: dict[str, list[Tensor]] = {layer: [] for layer in read}
    rows = max(1, PASS // corpus.shape[1]) if corpus is not None else 1
    parts = [] if corpus is None else list(torch.split(corpus.to(ids.device), rows))
    within = [None] * len(parts) if document is None else list(torch.split(document, rows))
    for part, told in zip(parts, within, strict=True):
        for layer, held in _units(inside, part, read, told).items():
            seen[layer].append(held[..., units[layer]])
    found = []
    for layer in read:
        values = torch.cat(seen[layer]) if seen[layer] else None  # (n, s, units)
        for i, unit in enumerate(units[layer].tolist()):
            best = [] if values is None else values[..., i].amax(1).topk(min(top, len(values))).indices.tolist()
            texts = [] if values is None else [(row, values[row, :, i]) for row in best if values[row, :, i].max() > 0]
            found.append(Excited(layer, unit, own[layer][:, unit], texts))
    return found


def _units(
    model: Transformer, ids: Int[Tensor, "b t"], read: dict[str, _Read], document: Tensor | None = None
) -> dict[str, Float[Tensor, "b t f"]]:
    held, _, _ = forward(model, ids, places(model, [name for name, _ in read.values()]), {}, document)
    return {layer: through(held[name]) for layer, (name, through) in read.items()}
