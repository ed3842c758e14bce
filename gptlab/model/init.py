"""Init: the distribution each parameter is drawn from, by its role and not by its name.

Each parameter is drawn on the CPU in fp32 from a generator seeded by (seed, canonical path): swapping one component leaves every
other weight identical, whatever the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptlab.config.registry import register
from gptlab.model.linear import FusedLinear, OutputLinear

ROLES = ("matrix", "embedding", "head", "gain", "bias")


@dataclass(frozen=True)
class Spec:
    """One parameter, or one part of a fused one, as an init sees it."""

    path: str
    role: str
    shape: tuple[int, ...]
    output: bool  # its product is added to the residual stream


Init = Callable[[Spec, torch.Generator], Tensor]


@register("model/init", "gpt2")
def gpt2(depth: int, *, std: float = 0.02) -> Init:
    """Normal with std 0.02; products that write to the residual stream divided by sqrt(2 · depth) (Radford et al., 2019)."""

    def draw(spec: Spec, generator: torch.Generator) -> Tensor:
        if spec.role in ("gain", "bias"):
            return torch.ones(spec.shape) if spec.role == "gain" else torch.zeros(spec.shape)
        scale = std / (2 * depth) ** 0.5 if spec.output and depth else std
        return torch.randn(spec.shape, generator=generator) * scale

    return draw


@register("model/init", "gpt2_nudged")
def gpt2_nudged(depth: int, *, std: float = 0.02, nudge: float = 1e-6) -> Init:
    """gpt2's weights times (1 + nudge x noise): an arm without a difference, to see what a verdict makes of chance alone."""
    plain = gpt2(depth, std=std)

    def draw(spec: Spec, generator: torch.Generator) -> Tensor:
        value = plain(spec, generator)
        return value * (1 + nudge * torch.randn(spec.shape, generator=generator))

    return draw


@register("model/init", "zero_output")
def zero_output(width: int, *, std: float = 0.02) -> Init:
    """Matrices at 1/sqrt(width), what writes to the residual stream and an untied head at zero: every block starts as the identity."""

    def draw(spec: Spec, generator: torch.Generator) -> Tensor:
        if spec.role == "gain":
            return torch.ones(spec.shape)
        if spec.role in ("bias", "head") or spec.output:
            return torch.zeros(spec.shape)
        scale = width**-0.5 if spec.role == "matrix" else std
        return torch.randn(spec.shape, generator=generator) * scale

    return draw


def widened(draw: Init, multiple: float) -> Init:
    """The same init for a model `multiple` times as wide: matrices sum so many more terms, and have that much less variance."""
    if multiple == 1:
        return draw
    return lambda spec, generator: draw(spec, generator) * (multiple**-0.5 if spec.role == "matrix" else 1.0)


def roles(model: nn.Module) -> dict[str, str]:
    """Parameter path -> role. A module may declare `roles = {"table": "bias"}` for parameters of its own."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        declared: dict[str, str] = getattr(module, "roles", {}) if isinstance(getattr(module, "roles", None), dict) else {}
        for name, parameter in module.named_parameters(recurse=False):
            role = declared.get(name)
            if role is None:
                if name == "bias":
                    role = "bias"
                elif isinstance(module, nn.Embedding):
                    role = "embedding"
                else:
                    role = "matrix" if parameter.dim() >= 2 else "gain"
            found[f"{prefix}.{name}" if prefix else name] = role
    return found


def initialise(model: nn.Module, draw: Init, seed: int) -> None:
    """Draw every parameter of the model. Raises AssertionError if an init gives another shape."""
    role_of = roles(model)
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                path = f"{prefix}.{name}" if prefix else name
                for part, target in _parts(module, prefix, name, parameter):
                    spec = Spec(part, role_of[path], tuple(target.shape), isinstance(module, OutputLinear) and name == "weight")
                    value = draw(spec, drawn_from(seed, part))
                    assert value.shape == target.shape, f"{part}: drawn {tuple(value.shape)} for {tuple(target.shape)}"
                    target.copy_(value)


def _parts(module: nn.Module, prefix: str, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter with its canonical path; a fused one as its parts (`attention.q.weight`)."""
    if not isinstance(module, FusedLinear):
        yield (f"{prefix}.{name}" if prefix else name), parameter
        return
    owner, start = prefix.rpartition(".")[0], 0
    for part, rows in module.parts.items():
        yield f"{owner}.{part}.{name}", parameter[start : start + rows]
        start += rows


def drawn_from(seed: int, path: str) -> torch.Generator:
    """The generator that a parameter is drawn from, by its canonical path."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
