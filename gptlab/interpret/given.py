"""What a study is given: a model, and the tokens to run it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.data.tokenizer import Tokenizer, digest, to_json
from gptlab.model.transformer import Transformer
from gptlab.runner.load import Loaded

Model: TypeAlias = Transformer | Loaded
Tokens: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]] | str


def model_of(model: Model) -> Transformer:
    """The Transformer itself."""
    return model.model if isinstance(model, Loaded) else model


def tokens_of(model: Model, tokens: Tokens, what: str = "the prompt") -> Int[Tensor, "b t"]:
    """Ids as (b, t), on the model's device.

    Raises ConfigError for a text without a tokeniser, several texts, no tokens, more of them than the context, and ids that are no whole
    numbers or beyond the vocabulary.
    """
    inside = model_of(model)
    if isinstance(tokens, str):
        if not isinstance(model, Loaded):
            raise ConfigError(
                f"{what} is a text, and a bare model has no tokeniser: give token ids, or what load() gives instead of its .model"
            )
        text, tokens = tokens, [int(i) for i in model.tokenizer.encode(tokens)]
        if not tokens:
            raise ConfigError(f"{what} is {text!r}, which has no token; give a text of at least one")
    if isinstance(tokens, Sequence) and any(isinstance(row, str) for row in tokens):
        raise ConfigError(f"{what} is a list of texts; give one text, or rows of token ids of one length")
    try:
        given = torch.as_tensor(tokens, device=inside.embedding.weight.device)
    except ValueError as error:
        raise ConfigError(f"{what} has rows of different lengths; rows of one study must have the same ({error})") from error
    if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
        raise ConfigError(f"{what} is of {str(given.dtype).removeprefix('torch.')}; token ids are whole numbers")
    ids = given.long()
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or not ids.numel():
        raise ConfigError(f"{what} must be at least one token, as ids (t,) or (b, t), not of shape {tuple(ids.shape)}")
    length, context = ids.shape[1], inside.config.context_length
    if length > context:
        raise ConfigError(f"{what} has {length:,} tokens, more than model.context_length={context:,}; give at most that many")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= inside.vocabulary:
        raise ConfigError(f"{what} holds token {high if low >= 0 else low}; this model's ids go from 0 to {inside.vocabulary - 1}")
    return ids


def token_of(model: Model, token: str | int, *, as_word: bool = False) -> int:
    """The id of a token: itself, or that of a text that is one token, as it stands or with a space before it.

    `as_word`: that with the space first, since so words stand in a text. Raises ConfigError for a text of several tokens, or a bare model.
    """
    if isinstance(token, int):
        if not 0 <= token < model_of(model).vocabulary:
            raise ConfigError(f"there is no token {token}; this model's ids go from 0 to {model_of(model).vocabulary - 1}")
        return token
    tokenizer = tokenizer_of(model, f"the text {token!r}")
    plain, spaced = tokenizer.encode(token), _spaced(tokenizer, token)
    for ids in (spaced, plain) if as_word else (plain, spaced):
        if len(ids) == 1:
            return int(ids[0])
    raise ConfigError(f"{token!r} is {len(plain)} tokens of the tokeniser {tokenizer.name}, and a single one is asked for")


def _spaced(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    try:
        return [int(i) for i in tokenizer.encode(f" {text}")]
    except ConfigError:  # a tokeniser that knows no space
        return []


def tokenizer_of(model: Model, what: str) -> Tokenizer:
    """The tokeniser of a loaded run. Raises ConfigError for a bare model."""
    if isinstance(model, Loaded):
        return model.tokenizer
    raise ConfigError(f"{what} needs a tokeniser: give what load() gives instead of its .model")


def same_tokenizer(runs: Mapping[str, Loaded]) -> Tokenizer:
    """The one tokeniser of all runs, each by a name. Raises ConfigError, naming two that differ, since their tokens are not the same."""
    digests = {name: digest(to_json(run.tokenizer)) for name, run in runs.items()}
    first = next(iter(runs))
    for name, found in digests.items():
        if found != digests[first]:
            kinds = f"{runs[first].tokenizer.name} and {runs[name].tokenizer.name}"
            raise ConfigError(
                f"{first} and {name} have two tokenisers ({kinds}): their tokens are not the same, and what is measured on them cannot be "
                "compared; compare runs of one tokeniser"
            )
    return runs[first].tokenizer
