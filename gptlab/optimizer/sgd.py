"""Stochastic gradient descent."""

from __future__ import annotations

import torch

from gptlab.config.registry import register
from gptlab.config.shards import in_shards
from gptlab.optimizer.groups import Groups, check_shares, torch_groups


@register("optimizer", "sgd")
def sgd(
    groups: Groups,
    device: torch.device,
    *,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    rates: dict[str, float] = {},  # noqa: B006, a config's default, copied for each
    decays: dict[str, float] = {},  # noqa: B006
) -> torch.optim.Optimizer:
    """Gradient descent with (Nesterov) momentum."""
    check_shares(momentum=momentum)
    return torch.optim.SGD(
        torch_groups(groups, learning_rate, weight_decay, rates, decays),
        lr=learning_rate,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        fused=device.type in ("cpu", "cuda", "mps") and not any(in_shards(p) for g in groups for p in g["params"]),
    )
