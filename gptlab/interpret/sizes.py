"""How large activations are, and which texts excite a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.interpret.activations import forward
from gptlab.interpret.given import Model, Tokens, model_of, tokenizer_of, tokens_of
from gptlab.interpret.lenses import stream_names
from gptlab.interpret.taps import Place, tapped
from gptlab.model.transformer import Transformer

if TYPE_CHECKING:
    import pandas as pd

TOKENS = 4096  # of a corpus, in one forward
BEFORE, AFTER = 24, 8  # tokens of text shown around the one that excites a unit


def rows_of(model: Model, text: str, *, length: int | None = None, limit: int | None = None) -> Int[Tensor, "n t"]:
    """A text as rows of `length` tokens (the context, or all of a shorter text), `limit` at most; what is left over is dropped.

    Raises ConfigError for a text of no token, or a bare model, which has no tokeniser.
    """
    context = model_of(model).config.context_length
    ids = np.asarray(tokenizer_of(model, "a text").encode(text), np.int64)
    length = min(context, len(ids)) if length is None else length
    if not 1 <= length <= min(context, len(ids)):
        raise ConfigError(f"rows of {length} tokens cannot be cut from a text of {len(ids):,} for model.context_length={context}")
    rows = len(ids) // length if limit is None else min(limit, len(ids) // length)
    return torch.from_numpy(ids[: rows * length].reshape(rows, length)).to(model_of(model).embedding.weight.device)


def norms(model: Model, tokens: Tokens, names: str | Iterable[str] | None = None) -> pd.DataFrame:
    """One line an activation: name, layer (-1 outside of blocks), norm (of a token's vector, a mean over tokens), rms, and largest entry.

    `names`: the stream, and what attention and feed-forward write to it, unless given. Scores that are masked (-inf) are left out.
    Raises ConfigError for a name that means nothing.
    """
    import pandas as pd

    inside, ids = model_of(model), tokens_of(model, tokens)
    if names is None:
        written = [f"blocks.{layer}.{part}" for layer in range(len(inside.blocks)) for part in ("attention", "ffn")]
        names = [*stream_names(inside), *written]
    found, _, _ = forward(inside, ids, list(tapped(inside, names)), {})
    lines = []
    for name, x in found.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        if x.dim():  # a feed-forward that is none writes a bare zero
            seen = x != -torch.inf
            x = x.float().masked_fill(~seen, 0.0)
            lines.append((name, layer, float(x.norm(dim=-1).mean()), float((x.square().sum() / seen.sum()).sqrt()), float(x.abs().max())))
    return pd.DataFrame(lines, columns=["name", "layer", "norm", "rms", "largest"])


def top_texts(
    model: Model,
    tokens: Tokens,
    name: str,
    units: Iterable[int],
    *,
    top: int = 5,
    through: Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t f"]] | None = None,
) -> pd.DataFrame:
    """The rows of a corpus (n, t) that excite units of an activation most, at the token that does: of each row its largest value.

    A unit that no token of a row brings above zero has no line of it.

    One line a unit and text: unit, rank, activation, row, position, and before, token, after (text). `units` are entries of the last
    axis of `name`; with `through` (an autoencoder's `encode`), of what that makes of it.
    Raises ConfigError for a bare model, an activation without positions, and a unit that it has not.
    """
    import pandas as pd

    inside, ids, tokenizer = model_of(model), tokens_of(model, tokens, "the corpus"), tokenizer_of(model, "a view of texts")
    (place,) = _one(inside, name)
    chosen = list(units)
    parts = []
    for rows in _batches(ids):
        x = forward(inside, rows, [place], {})[0][place.name]
        x = x if through is None else through(x)
        if x.dim() != 3 or x.shape[:2] != rows.shape:
            raise ConfigError(f"{name} is no row of units a token (its shape is {tuple(x.shape)})")
        bad = [unit for unit in chosen if not 0 <= unit < x.shape[-1]]
        if bad:
            raise ConfigError(f"{name} has {x.shape[-1]:,} units, from 0 to {x.shape[-1] - 1}; there is no {bad[0]}")
        parts.append(x[..., chosen].float().max(1))
    values, at = (torch.cat([getattr(part, field) for part in parts]) for field in ("values", "indices"))  # (n, units)
    lines = []
    for column, unit in enumerate(chosen):
        best = values[:, column].topk(min(top, len(ids))).indices.tolist()
        for rank, row in enumerate(best):
            if values[row, column] <= 0:
                break  # nothing here excites it
            position = int(at[row, column])
            line = ids[row].tolist()
            around = line[max(0, position - BEFORE) : position], line[position : position + 1], line[position + 1 : position + 1 + AFTER]
            lines.append((unit, rank, float(values[row, column]), row, position, *(tokenizer.decode(part) for part in around)))
    return pd.DataFrame(lines, columns=["unit", "rank", "activation", "row", "position", "before", "token", "after"])


def _one(model: Transformer, name: str) -> list[Place]:
    found = list(tapped(model, name))
    if len(found) != 1:
        raise ConfigError(f"{name} means {len(found)} activations, and units are those of one")
    return found


def _batches(ids: Int[Tensor, "n t"]) -> Iterator[Int[Tensor, "b t"]]:
    yield from torch.split(ids, max(1, TOKENS // ids.shape[1]))


def collect(model: Model, tokens: Tokens, name: str) -> Float[Tensor, "n t d"]:
    """An activation over a corpus of any number of rows, a few at a time. Raises ConfigError for one without positions."""
    inside, ids = model_of(model), tokens_of(model, tokens, "the corpus")
    (place,) = _one(inside, name)
    parts = []
    for rows in _batches(ids):
        parts.append(forward(inside, rows, [place], {})[0][place.name])
        if parts[-1].dim() != 3 or parts[-1].shape[:2] != rows.shape:
            raise ConfigError(
                f"{name} is no vector a token (its shape is {tuple(parts[-1].shape)}), and cannot be read position by position"
            )
    return torch.cat(parts)
