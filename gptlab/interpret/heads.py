"""What heads do: how much of their attention goes where an induction, previous-token or duplicate-token head would look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.interpret.attention_patterns import of_attention
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.model.transformer import Transformer

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 64  # tokens before they repeat


def repeated_tokens(model: Model, *, rows: int = 8, length: int | None = None, seed: int = 0) -> Int[Tensor, "b t"]:
    """Rows of `length` random tokens, each row's twice in a row: what nobody could predict the first time, and induction the second.

    No token stands twice in one half, so that each of the second has one place to look. `length`: half the context, 64 and the
    vocabulary at most, unless given, and so short (but at least 2) that the smallest window of a windowed attention, which looks at its
    own token too, reaches back to where a token stood first. Raises ConfigError where that does not fit.
    """
    inside = model_of(model)
    most = _most(inside)
    length = repeat_length(inside) if length is None else length
    if not 2 <= length <= most:
        sizes = f"model.context_length={inside.config.context_length} and a vocabulary of {inside.vocabulary}"
        fits = f"from 2 to {most} would" if most >= 2 else "no tokens that repeat would"
        raise ConfigError(f"{length} different tokens, twice, do not fit {sizes}; {fits}")
    if rows < 1:
        raise ConfigError(f"rows={rows} must be at least 1")
    draw = torch.Generator().manual_seed(seed)
    half = torch.stack([torch.randperm(inside.vocabulary, generator=draw)[:length] for _ in range(rows)])
    return torch.cat((half, half), 1).to(inside.embedding.weight.device)


def repeat_length(model: Transformer) -> int:
    """The length of a half of `repeated_tokens`, unless given; below 2 for a model that has no room for one."""
    windows = [getattr(getattr(block, "attention", None), "window", None) for block in model.blocks]
    return min([_most(model), LONGEST, *(max(2, int(window) - 1) for window in windows if window is not None)])


def _most(model: Transformer) -> int:
    return min(model.config.context_length // 2, model.vocabulary)


def head_scores(model: Model, tokens: Tokens | None = None, *, rows: int = 8, length: int | None = None, seed: int = 0) -> pd.DataFrame:
    """One line a layer and head: layer, head, induction, previous_token, duplicate_token, entropy.

    Each score is the mean weight, in [0, 1], that goes to the places that count, over the tokens that have such a place before them:
    induction, the tokens that followed earlier ones like this one (Olsson et al., 2022); previous_token, the one before; duplicate_token,
    earlier ones like this one (Wang et al., 2022). entropy: of the weights, in nats, over all tokens. Measured on `repeated_tokens`,
    or on tokens of one's own; a score is NaN where these have no such place. Raises ConfigError for a model without patterns.
    """
    import pandas as pd

    inside = model_of(model)
    ids = repeated_tokens(model, rows=rows, length=length, seed=seed) if tokens is None else tokens_of(model, tokens)
    scores = score_heads(inside, ids)
    layers, heads = scores["entropy"].keys(), {layer: len(values) for layer, values in scores["entropy"].items()}
    index = [(layer, head) for layer in layers for head in range(heads[layer])]
    columns = {name: [float(of_layer[layer][head]) for layer, head in index] for name, of_layer in scores.items()}
    return pd.DataFrame({"layer": [i[0] for i in index], "head": [i[1] for i in index], **columns})


def score_heads(model: Transformer, tokens: Int[Tensor, "b t"]) -> dict[str, dict[int, Float[Tensor, " h"]]]:
    """The columns of `head_scores` as score -> layer -> (h,): for those who want no data frame."""
    weights, _ = of_attention(model, tokens)
    places = {
        "induction": induction_places(tokens),
        "previous_token": previous_places(tokens),
        "duplicate_token": duplicate_places(tokens),
    }
    found = {name: {layer: mean_weight(w, where) for layer, w in weights.items()} for name, where in places.items()}
    return found | {"entropy": {layer: torch.special.entr(w).sum(-1).mean((0, 2)) for layer, w in weights.items()}}


def mean_weight(weights: Float[Tensor, "b h t s"], where: Bool[Tensor, "b t s"]) -> Float[Tensor, " h"]:
    """The mean, over the queries that have such a place, of the weight that goes to their places."""
    asked = where.any(-1)
    there = (weights * where[:, None]).sum(-1)
    return (there * asked[:, None]).sum((0, 2)) / asked.sum()


def induction_places(tokens: Int[Tensor, "b t"]) -> Bool[Tensor, "b t s"]:
    """[b, i, j]: j <= i, and the token before j is that at i: what followed it the last times."""
    same = tokens[:, :, None] == tokens[:, None, :]
    followed = torch.zeros_like(same)
    followed[:, :, 1:] = same[:, :, :-1]
    return followed.tril()


def duplicate_places(tokens: Int[Tensor, "b t"]) -> Bool[Tensor, "b t s"]:
    """[b, i, j]: j < i, and both hold the same token."""
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


def previous_places(tokens: Int[Tensor, "b t"]) -> Bool[Tensor, "b t s"]:
    """[b, i, j]: j is i - 1."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return (place[:, None] - 1 == place).expand(tokens.shape[0], -1, -1)
