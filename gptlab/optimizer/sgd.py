"""Stochastic gradient descent."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor  # sharded parameters, for which torch has no fused step

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.optimizer.adamw import check_rates
from gptlab.optimizer.groups import Groups, torch_groups


@register("optimizer", "sgd")
def sgd(
    groups: Groups,
    device: torch.device,
    *,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Gradient descent with (Nesterov) momentum."""
    check_rates(learning_rate, weight_decay)
    if not 0 <= momentum < 1:
        raise ConfigError(f"optimizer.momentum={momentum} must be in [0, 1)")
    return torch.optim.SGD(
        torch_groups(groups, weight_decay),
        lr=learning_rate,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        fused=device.type in ("cpu", "cuda", "mps") and not any(isinstance(p, DTensor) for g in groups for p in g["params"]),
    )
