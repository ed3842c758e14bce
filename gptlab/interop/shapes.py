"""What GPT-2's and Llama's weights are called elsewhere, and how they lie there: one list a shape, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptlab.config.codec import completed
from gptlab.config.errors import CheckpointError, ConfigError
from gptlab.config.registry import component, component_of
from gptlab.config.schema import ModelConfig
from gptlab.model.transformer import meta_model


@dataclass(frozen=True)
class Piece:
    """One parameter of ours: the tensors it is made of there, one above the other, each perhaps lying as (inputs, outputs)."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    rows: tuple[int, ...] = ()  # of each part, where there are several


@dataclass(frozen=True)
class Shape:
    """An architecture that others read.

    `config`: ours, of a config.json; `settings`: a config.json, of ours, after `fits`, which raises ConfigError with the component that
    has no place in it; `pieces`: the weights of a model of ours. `prefix` may be left out of the names. `ignored` are the ends of
    tensors' names that are no weights.
    """

    name: str
    prefix: str
    config: Callable[[Mapping[str, Any], str], ModelConfig]
    fits: Callable[[ModelConfig], None]
    settings: Callable[[ModelConfig, int], dict[str, Any]]
    pieces: Callable[[ModelConfig], list[Piece]]
    ignored: tuple[str, ...]


def model_config(*, width: int, depth: int, heads: int, context_length: int, bias: bool, pad_vocab_to: int, **parts: Any) -> ModelConfig:
    """A config of ours. `parts`: slot -> (component, its options); those that every recipe shares are there."""
    chosen = {"kernel": ("sdpa", {}), "block": ("prenorm", {}), "init": ("gpt2", {}), **parts}
    options: dict[str, Any] = {slot: component(f"model/{slot}", name).options(**values) for slot, (name, values) in chosen.items()}
    sizes: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "context_length": context_length}
    return completed(ModelConfig(bias=bias, pad_vocab_to=pad_vocab_to, **sizes, **options))


def imported(shape: Shape, config: ModelConfig, vocabulary: int, theirs: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights of ours in fp32, from theirs; a bias that they have not is 0.

    Raises CheckpointError naming the first tensor that is missing, of another shape, or one that the architecture has no place for.
    """
    wanted = {name: tuple(t.shape) for name, t in meta_model(config, vocabulary).state_dict().items()}
    found = {_named(shape, name): tensor for name, tensor in theirs.items() if not name.endswith(shape.ignored)}
    weights: dict[str, Tensor] = {}
    for piece in shape.pieces(config):
        parts = [found.pop(name, None) for name in piece.theirs]
        if any(part is None for part in parts):
            if not piece.ours.endswith(".bias"):
                missing = next(name for name, part in zip(piece.theirs, parts, strict=True) if part is None)
                raise CheckpointError(f"{where}: there is no tensor {shape.prefix}{missing}; is the download complete?")
            rows = piece.rows or (wanted[piece.ours][0],)
            parts = [torch.zeros(n) if part is None else part for n, part in zip(rows, parts, strict=True)]
        made = [(part.t() if piece.transposed and part.dim() == 2 else part).float() for part in parts if part is not None]
        for name, part, rows in zip(piece.theirs, made, piece.rows or (wanted[piece.ours][0],), strict=True):
            expected = (rows, *wanted[piece.ours][1:])
            if tuple(part.shape) != expected:
                turn = -1 if piece.transposed else 1
                raise CheckpointError(
                    f"{where}: {shape.prefix}{name} is {tuple(part.shape)[::turn]}, and its config makes it {expected[::turn]}: "
                    "weights and config are of two models"
                )
        weights[piece.ours] = made[0].contiguous() if len(made) == 1 else torch.cat(made)
    found.pop("lm_head.weight", None)  # the same matrix once more, where it is tied
    if found:
        raise CheckpointError(
            f"{where}: {shape.prefix}{min(found)} has no place in {shape.name}'s shape: the model has a part that we have not"
        )
    assert weights.keys() == wanted.keys(), sorted(weights.keys() ^ wanted.keys())
    return weights


def exported(shape: Shape, config: ModelConfig, vocabulary: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names and in their layout; rows beyond the vocabulary are left out. What ours has not is what it stands for."""
    shape.fits(config)
    made: dict[str, Tensor] = {}
    for piece in shape.pieces(config):
        whole = weights.get(piece.ours)
        if whole is None:  # a norm without weights, a layer without biases
            beside = weights.get(piece.ours.replace(".bias", ".weight"))
            length = config.width if beside is None else beside.shape[0]
            whole = torch.ones(length) if piece.ours.endswith("weight") else torch.zeros(length)
        parts: Iterable[Tensor] = torch.split(whole, list(piece.rows)) if piece.rows else (whole,)
        for name, part in zip(piece.theirs, parts, strict=True):
            made[name] = (part.t() if piece.transposed and part.dim() == 2 else part).contiguous()
    for name in made:
        if name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight")):
            made[name] = made[name][:vocabulary].contiguous()
    return {name if name == "lm_head.weight" else shape.prefix + name: tensor for name, tensor in made.items()}


def _named(shape: Shape, name: str) -> str:
    return name.removeprefix(shape.prefix)


def must_be(config: ModelConfig, shape: str, wanted: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError for the first slot whose component the shape cannot hold. `wanted`: slot -> the components it can."""
    for slot, names in wanted.items():
        name = component_of(getattr(config, slot)).name
        if name not in names:
            raise ConfigError(f"model/{slot}={name} has no place in {shape}'s shape, which has {' or '.join(names)}: export to safetensors")


PLAIN = {
    "block": ("prenorm",),
    "input": ("plain",),
    "stream": ("plain",),
    "value": ("none",),
    "gate": ("none",),
    "head": ("tied", "untied"),
    "attention": ("multihead",),
    "parametrisation": ("standard",),
}


def must_be_plain(config: ModelConfig, shape: str) -> None:
    """What neither shape can hold, whatever else the model is made of. Raises ConfigError naming it."""
    must_be(config, shape, PLAIN)
    attention, head = config.attention, config.head
    for key, value, plain in (
        ("model.attention.qk_norm", getattr(attention, "qk_norm", False), False),
        ("model.head.soft_cap", getattr(head, "soft_cap", None), None),
    ):
        if value != plain:
            raise ConfigError(f"{key}={value} has no place in {shape}'s shape: export to safetensors")
