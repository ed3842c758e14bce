"""What lies near what in a model's embeddings: of tokens, and of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.data.tokenizer import Tokenizer
from gptlab.interpret.given import Model, model_of, token_of, tokenizer_of
from gptlab.model.position import Position

if TYPE_CHECKING:
    import pandas as pd

MINUS = ("-", "\u2212")  # the second is what a word processor makes of the first


def neighbours(model: Model, token: str | int, *, top: int = 10) -> pd.DataFrame:
    """The tokens whose embeddings have the largest cosine with that of a token (a text of one token, or its id): token, text, cosine."""
    tokenizer = tokenizer_of(model, "a view of embeddings")
    ids = [token_of(model, token)]
    return _nearest(model, tokenizer, _unit(model)[ids[0]], ids, top)


def analogy(model: Model, expression: str, *, top: int = 10) -> pd.DataFrame:
    """`vater - mann + frau`: the tokens nearest to that sum of embeddings of length 1 (Mikolov et al., 2013), less its own.

    Columns as of `neighbours`.

    Raises ConfigError where a word is not one token of the tokeniser (with a space before it, as words in a text have, or without).
    """
    tokenizer = tokenizer_of(model, "an analogy")
    parts = expression.split()
    words, between = parts[::2], parts[1::2]
    if len(words) != len(between) + 1 or not set(between) <= {"+", *MINUS}:
        raise ConfigError(f"{expression!r} is no analogy; write one as `vater - mann + frau`, with spaces around the signs")
    ids = [token_of(model, word, as_word=True) for word in words]
    signs = [1.0, *(1.0 if sign == "+" else -1.0 for sign in between)]
    aim = (_unit(model)[ids] * torch.tensor(signs, device=model_of(model).embedding.weight.device)[:, None]).sum(0)
    return _nearest(model, tokenizer, aim, ids, top)


def position_similarity(model: Model, length: int | None = None) -> Float[Tensor, "t t"]:
    """Cosines between the embeddings of positions 0 … length - 1 (the context). Raises ConfigError for a scheme that adds none."""
    inside = model_of(model)
    context = inside.config.context_length
    length = context if length is None else length
    if type(inside.position).embed is Position.embed:
        name = component_of(inside.config.position).name
        raise ConfigError(f"model/position={name} adds no embedding of positions that could be compared; learned and sinusoidal do")
    if not 1 <= length <= context:
        raise ConfigError(f"length={length} must be from 1 to model.context_length={context}")
    with torch.no_grad():
        nothing = torch.zeros(1, length, inside.config.width, device=inside.order.device, dtype=inside.embedding.weight.dtype)
        vectors = F.normalize(inside.position.embed(nothing, inside.order[:, :length])[0].float(), dim=-1)
    return vectors @ vectors.T


def _unit(model: Model) -> Float[Tensor, "v d"]:
    inside = model_of(model)
    return F.normalize(inside.embedding.weight.detach()[: inside.vocabulary].float(), dim=-1)


def _nearest(model: Model, tokenizer: Tokenizer, aim: Float[Tensor, " d"], without: list[int], top: int) -> pd.DataFrame:
    import pandas as pd

    cosines = _unit(model) @ F.normalize(aim, dim=-1)
    cosines[without] = -torch.inf
    best = cosines.topk(max(0, min(top, len(cosines) - len(set(without)))))
    lines = [(token, tokenizer.decode([token]), value) for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    return pd.DataFrame(lines, columns=["token", "text", "cosine"])
