"""The hidden units that a text excites, and what else in a corpus excites them, of all layers in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.interpret.activations import forward
from gptlab.interpret.given import Model, model_of, tokens_of
from gptlab.interpret.taps import places
from gptlab.model.transformer import Transformer

PASS = 1024  # tokens of a corpus in one forward: all layers' hidden units are held


@dataclass(frozen=True)
class Excited:
    """A unit of a layer: its activation on the text (t,), and the rows of a corpus that excite it most, with its activation there."""

    layer: int
    unit: int
    own: Float[Tensor, " t"]
    texts: list[tuple[int, Float[Tensor, " s"]]]

    @property
    def high(self) -> float:
        """Its largest activation, in the corpus or on the text."""
        return max(float(values.max()) for values in (self.own, *(own for _, own in self.texts)))


def excited(model: Model, tokens: Tensor, corpus: Int[Tensor, "n s"] | None, *, per_layer: int = 6, top: int = 4) -> list[Excited]:
    """Of each layer the units that rise furthest above their own mean on the text (1, t), the furthest first.

    With a corpus, also its rows where each is largest. Layers without hidden units (no feed-forward, experts) have none.
    """
    inside, ids = model_of(model), tokens_of(model, tokens)
    names = {
        f"blocks.{layer}.ffn.hidden": layer
        for layer, block in enumerate(inside.blocks)
        if hasattr(block.ffn, "hidden") and hasattr(block.ffn, "down")
    }
    if not names:
        return []
    own = {name: values[0].float() for name, values in _hidden(inside, ids, list(names)).items()}
    units = {name: (x.amax(0) - x.mean(0)).topk(min(per_layer, x.shape[-1])).indices for name, x in own.items()}
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    rows = max(1, PASS // corpus.shape[1]) if corpus is not None else 1
    for part in () if corpus is None else torch.split(corpus.to(ids.device), rows):
        for name, held in _hidden(inside, part, list(names)).items():
            seen[name].append(held[..., units[name]].float())
    found = []
    for name, layer in names.items():
        values = torch.cat(seen[name]) if seen[name] else None  # (n, s, units)
        for i, unit in enumerate(units[name].tolist()):
            best = [] if values is None else values[..., i].amax(1).topk(min(top, len(values))).indices.tolist()
            texts = [] if values is None else [(row, values[row, :, i]) for row in best]
            found.append(Excited(layer, unit, own[name][:, unit], texts))
    return found


def _hidden(model: Transformer, ids: Int[Tensor, "b t"], names: list[str]) -> dict[str, Float[Tensor, "b t f"]]:
    return forward(model, ids, places(model, names), {})[0]
