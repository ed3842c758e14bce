"""Where each head looks: attention's weights over the tokens so far, whatever the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.interpret.activations import forward, kernel_note
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.interpret.taps import described, places
from gptlab.model.attention import Average
from gptlab.model.mask import document_starts
from gptlab.model.transformer import Transformer

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Patterns(Mapping[int, Tensor]):
    """Of each layer its weights (b, h, t, s), rows summing to 1: `found[layer][0, head]`. `note`: how they came about, where it matters."""

    tokens: Int[Tensor, "b t"]
    weights: dict[int, Float[Tensor, "b h t s"]]
    note: str = ""

    def __getitem__(self, layer: int) -> Tensor:
        return self.weights[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def frame(self, row: int = 0, at_least: float = 0.0) -> pd.DataFrame:
        """One line a layer, head, query and key of a row whose weight is at least so much: layer, head, query, key, weight."""
        import pandas as pd

        parts = []
        for layer, weights in self.items():
            seen = torch.ones_like(weights[row], dtype=torch.bool).tril() & (weights[row] >= at_least)
            head, query, key = (index.cpu().numpy() for index in seen.nonzero(as_tuple=True))
            columns = {"layer": layer, "head": head, "query": query, "key": key, "weight": weights[row][seen].float().cpu().numpy()}
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)


def patterns(model: Model, tokens: Tokens, *, document: Int[Tensor, "b t"] | None = None) -> Patterns:
    """The weights of every head over the tokens before it.

    Of a fused kernel the naive one computes them, and `note` says so; of an averaging attention they are the even mean, by definition.
    Raises ConfigError for a model without attention, or with one that has no pattern.
    """
    inside, ids = model_of(model), tokens_of(model, tokens)
    made, note = of_attention(inside, ids, document)
    return Patterns(ids, made, note)


def of_attention(model: Transformer, tokens: Int[Tensor, "b t"], document: Tensor | None = None) -> tuple[dict[int, Tensor], str]:
    """Layer -> weights, and the note."""
    if not model.blocks:
        raise ConfigError("this model has no attention (model.depth=0, a bigram): there is no pattern to look at")
    even = [layer for layer, block in enumerate(model.blocks) if isinstance(getattr(block, "attention", None), Average)]
    asked = {layer: f"blocks.{layer}.attention.pattern" for layer in range(len(model.blocks)) if layer not in even}
    found, _, fused = forward(model, tokens, places(model, asked.values()), {}, document) if asked else ({}, None, False)
    notes = [kernel_note(model)] if fused else []
    if even:
        notes.append(
            f"{described(model, f'blocks.{even[0]}.attention')} weighs all tokens so far alike: its pattern is the same for any text"
        )
    made = {layer: found[asked[layer]] if layer in asked else _even(tokens, document) for layer in range(len(model.blocks))}
    return made, "; ".join(notes)


def _even(tokens: Int[Tensor, "b t"], document: Tensor | None) -> Float[Tensor, "b 1 t s"]:
    place = torch.arange(tokens.shape[1], device=tokens.device)
    allowed = (place[:, None] >= place).expand(tokens.shape[0], -1, -1)
    if document is not None:
        allowed = allowed & (place >= document_starts(document.to(tokens.device)).expand_as(tokens)[..., None])
    weight = allowed.float()
    return (weight / weight.sum(-1, keepdim=True))[:, None]
