"""AdamW."""

from __future__ import annotations

import torch

from gptlab.config.registry import register
from gptlab.optimizer.groups import Groups, check_shares, torch_groups


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
    rates: dict[str, float] = {},  # noqa: B006, a config's default, copied for each
    decays: dict[str, float] = {},  # noqa: B006
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019); fused where the device has it."""
    check_shares(beta1=beta1, beta2=beta2)
    return torch.optim.AdamW(
        torch_groups(groups, learning_rate, weight_decay, rates, decays, wider=1.0),
        lr=learning_rate,
        betas=(beta1, beta2),
        eps=eps,
        fused=device.type in ("cpu", "cuda", "mps"),
    )
