"""Low-rank adapters beside the products of a model whose own weights stay as they are (Hu et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.model.autoencoder import PREFIX
from gptlab.model.experts import ExpertLinear
from gptlab.model.init import drawn_from
from gptlab.model.linear import Linear

TARGETS = ("attention", "ffn")
MARK = ".adapter."


class LowRank(nn.Module):
    """scale · x · downᵀ · upᵀ, with scale = alpha / rank. `up` begins at zero, so that a model with new adapters is the model without."""

    scale: Tensor

    def __init__(self, width: int, outputs: int, rank: int, alpha: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width, device=device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.register_buffer("scale", torch.full((), alpha / rank, device=device))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... o"]:
        narrow = F.linear(x, self.down.to(x.dtype))
        return F.linear(narrow, self.up.to(x.dtype)) * self.scale.to(x.dtype)


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Give every product of the targeted parts of each block an adapter, and freeze all that was there before.

    `targets`: `attention`, `ffn`. Raises ConfigError for a target that is none, a mixture of experts, or a rank that is larger than any
    of its products.
    """
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(f"objective.lora_targets: {target!r} is not one of {', '.join(TARGETS)}")
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Linear) and any(part in targets for part in path.split("."))
    ]
    for path, module in found:
        if isinstance(module, ExpertLinear):
            raise ConfigError(
                f"objective.lora_targets={list(targets)}: {path} holds the matrices of many experts, which an adapter cannot stand beside; "
                "use objective.lora_targets=[attention]"
            )
    if not found:
        raise ConfigError(f"objective.lora_targets={list(targets)}: this model has no product there that an adapter could stand beside")
    most = max(min(module.weight.shape) for _, module in found)
    if rank > most:
        raise ConfigError(f"objective.lora_rank={rank} is more than the {most} that the largest product has; that is full fine-tuning")
    model.requires_grad_(False)
    for path, module in found:
        outputs, width = module.weight.shape
        adapter = LowRank(width, outputs, min(rank, width, outputs), alpha, module.weight.device)
        with torch.no_grad():
            noise = torch.rand(adapter.down.shape, generator=drawn_from(seed, f"{path}.adapter.down"))
            adapter.down.copy_((2 * noise - 1) * width**-0.5)
        module.adapter = adapter


def added(name: str) -> bool:
    """Whether a tensor of a model is one that an objective has added: an adapter's, or an autoencoder's."""
    return MARK in name or name.startswith(PREFIX)


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights without what an objective has added: adapters become part of the products they stand beside."""
    found = {name: tensor for name, tensor in weights.items() if not added(name)}
    for name in weights:
        if name.endswith(f"{MARK}up"):
            stem = name.removesuffix(f"{MARK}up")
            up, down, scale = (weights[f"{stem}{MARK}{part}"] for part in ("up", "down", "scale"))
            own = found[f"{stem}.weight"]
            found[f"{stem}.weight"] = (own.float() + scale.float() * (up.float() @ down.float())).to(own.dtype)
    return found
