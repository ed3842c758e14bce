"""AdamW."""

from __future__ import annotations

import torch

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.optimizer.groups import Groups, torch_groups


@register("optimizer", "adamw")
def adamw(
    groups: Groups,
    device: torch.device,
    *,
    learning_rate: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019); fused where the device has it."""
    check_rates(learning_rate, weight_decay)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ConfigError(f"optimizer.{name}={beta} must be in [0, 1)")
    return torch.optim.AdamW(
        torch_groups(groups, weight_decay),
        lr=learning_rate,
        betas=(beta1, beta2),
        eps=eps,
        fused=device.type in ("cpu", "cuda", "mps"),
    )


def check_rates(learning_rate: float, weight_decay: float) -> None:
    """Raise ConfigError for a rate no optimizer can use."""
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"optimizer.{name}={value} must be at least 0 and finite")
