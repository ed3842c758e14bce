"""What a part is needed for: the loss that taking it out costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.interpret.activations import forward, losses
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.interpret.taps import Edit, Place, has_heads, places, tapped
from gptlab.model.transformer import Transformer

if TYPE_CHECKING:
    import pandas as pd

How = Literal["zero", "mean", "resample"]


def components(model: Transformer) -> list[str]:
    """What a study of a model's parts takes unless told: every head (or attention, where it has none) and every feed-forward."""
    found = []
    for layer, block in enumerate(model.blocks):
        found.append(f"blocks.{layer}.attention.head.*" if has_heads(block.attention) else f"blocks.{layer}.attention")
        found.append(f"blocks.{layer}.ffn")
    return [place.name for place in places(model, found)]


def ablate(
    model: Model,
    tokens: Tokens,
    names: str | Iterable[str] | None = None,
    *,
    how: How = "mean",
    reference: Tokens | None = None,
    together: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """One line for each activation that `names` mean, taken out by itself, or one for all of them `together`: component, loss, cost.

    `loss` is the mean of the next tokens' (nats), `cost` what it is above the whole model's. `names`: every head and feed-forward,
    unless given. `how`: zero (scores that are masked stay so); mean, the activation's over the tokens of `reference`, each head's its
    own, and of patterns and scores over its rows alone, since they are of two tokens; resample, that of another row of `reference`,
    drawn by `seed`, at the same positions. `reference` is the tokens themselves unless given.
    Raises ConfigError for a name that means nothing, rows of one token, a resampling without another row of the same length, and a mean
    of patterns or scores of another length.
    """
    import pandas as pd

    if how not in get_args(How):
        raise ConfigError(f"how={how}: no such ablation; there are {', '.join(get_args(How))}")
    inside, ids = model_of(model), tokens_of(model, tokens)
    others = ids if reference is None else tokens_of(model, reference, "the reference")
    taken = tapped(inside, components(inside) if names is None else names)
    whole = float(losses(forward(inside, ids, [], {})[1], ids).mean())
    edits = {place: _edit(inside, place, axes, ids, others, how, seed) for place, axes in taken.items()}
    lines = []
    for name, chosen in [(" + ".join(p.name for p in taken), edits)] if together else [(p.name, {p: e}) for p, e in edits.items()]:
        loss = float(losses(forward(inside, ids, [], chosen)[1], ids).mean())
        lines.append((name, loss, loss - whole))
    return pd.DataFrame(lines, columns=["component", "loss", "cost"])


def _edit(
    model: Transformer, place: Place, axes: tuple[int, ...], ids: Int[Tensor, "b t"], others: Int[Tensor, "n t"], how: How, seed: int
) -> Edit:
    """What is put in the activation's place. `axes`: those of its tokens."""
    if how == "zero":
        return lambda x: torch.zeros_like(x).masked_fill(x == -torch.inf, -torch.inf)
    if how == "mean":
        return _mean(model, place, axes, ids, others)
    same = others is ids or torch.equal(others, ids)
    if others.shape[1] != ids.shape[1] or (same and len(ids) < 2):
        raise ConfigError(
            f"how=resample takes activations of other rows of the same length: {len(others)} of {others.shape[1]} tokens will not do for "
            f"rows of {ids.shape[1]}; give more rows, or a reference"
        )
    draw = torch.Generator().manual_seed(seed)
    if same:  # another row for each: all move on by the same number
        rows = (torch.arange(len(ids)) + int(torch.randint(1, len(ids), (), generator=draw))) % len(ids)
    else:
        rows = torch.randint(len(others), (len(ids),), generator=draw)
    found = forward(model, others[rows.to(ids.device)], [place], {})[0][place.name]
    if found.dim() and (0 in axes or found.shape[0] != len(ids)):
        raise ConfigError(f"{place.name} has no rows that could be exchanged (its shape is {tuple(found.shape)}); use how=zero or mean")
    return found


def _mean(model: Transformer, place: Place, axes: tuple[int, ...], ids: Int[Tensor, "b t"], others: Int[Tensor, "n t"]) -> Tensor:
    """The activation's mean over rows and tokens; of what is of two tokens over rows alone, so that no query gets weight on later keys."""
    pairs = len(axes) > 1
    if pairs and others.shape[1] != ids.shape[1]:
        raise ConfigError(
            f"{place.name} is of queries and keys, and its mean over rows of {others.shape[1]} tokens does not fit rows of {ids.shape[1]}; "
            "give a reference of rows as long"
        )
    found = forward(model, others, [place], {})[0][place.name]
    rows = (0,) if found.dim() > 1 and found.shape[0] == len(others) else ()
    over = rows if pairs else tuple({*rows, *axes})
    return found.mean(over, keepdim=True) if over else found
