"""Read any activation by its name, and run a model with some of them changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.interpret.taps import Edit, Place, check_given, hooked, places, tapped
from gptlab.model.transformer import Transformer


@dataclass(frozen=True)
class Activations(Mapping[str, Tensor]):
    """What one forward held, by name: `found["blocks.0.attention.pattern"]`. b batch, t tokens, v vocabulary.

    `note` says where a fused kernel was replaced by the naive one, to show its pattern; else it is empty.
    """

    tokens: Int[Tensor, "b t"]
    logits: Float[Tensor, "b t v"]
    held: dict[str, Tensor]
    note: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def capture(model: Model, tokens: Tokens, names: str | Iterable[str] = "*", *, document: Int[Tensor, "b t"] | None = None) -> Activations:
    """The activations that `names` (names and globs; `*`: all of them, patterns too) mean, of one forward over the tokens.

    They are the model's own tensors, without gradients. Heads and neurons are given where a name asks for them (`*.head.*`).
    Raises ConfigError for a name that means nothing here (naming the nearest), and for tokens that the model cannot take.
    """
    return run_with(model, tokens, {}, names, document=document)


def run_with(
    model: Model, tokens: Tokens, edits: Mapping[str, Edit], names: str | Iterable[str] = (), *, document: Int[Tensor, "b t"] | None = None
) -> Activations:
    """A forward in which each activation of `edits` is replaced: by a tensor that fits it, or by what a function makes of it.

    A glob may stand for several. What is captured besides is as it is after the edits. Raises ConfigError as `capture`.
    """
    inside, ids = model_of(model), tokens_of(model, tokens)
    names = [names] if isinstance(names, str) else list(names)
    given = tapped(inside, edits)
    changed = {place: edit for name, edit in edits.items() for place in places(inside, name) if place in given}
    found, logits, fused = forward(inside, ids, places(inside, names), changed, document)
    check_given(inside, names, found)
    return Activations(ids, logits, found, kernel_note(inside) if fused else "")


def forward(
    model: Transformer, tokens: Int[Tensor, "b t"], read: list[Place], edits: Mapping[Place, Edit], document: Tensor | None = None
) -> tuple[dict[str, Tensor], Float[Tensor, "b t v"], bool]:
    """The places read, the logits, and whether a fused kernel was replaced to show its pattern."""
    found: dict[str, Tensor] = {}
    with hooked(model, read, found, dict(edits)) as fused:
        logits: Tensor = model(tokens, document=None if document is None else document.to(tokens.device))
    return found, logits, bool(fused)


def losses(logits: Float[Tensor, "b t v"], tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """-log p of each next token, in nats; there are t - 1 of them a row. Raises ConfigError for rows of one token."""
    if tokens.shape[1] < 2:
        raise ConfigError("a loss needs at least two tokens in a row: the second is what the first should predict")
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return wide.logsumexp(-1) - wide.gather(-1, tokens[:, 1:, None])[..., 0]


def kernel_note(model: Transformer) -> str:
    """What a reader of a fused kernel's pattern must know."""
    return f"patterns are computed by model/kernel=naive: model/kernel={component_of(model.config.kernel).name} shows none"
