"""Adafactor."""

from __future__ import annotations

import torch

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.optimizer.groups import Groups, torch_groups


@register("optimizer", "adafactor")
def adafactor(
    groups: Groups,
    *,
    learning_rate: float = 1e-2,
    decay_exponent: float = -0.8,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    rates: dict[str, float] = {},  # noqa: B006, a config's default, copied for each
    decays: dict[str, float] = {},  # noqa: B006
) -> torch.optim.Optimizer:
    """Adam's squares kept as a row and a column of each matrix (Shazeer & Stern, 2018): hardly any memory beside the weights.

    The rate is relative to each parameter's size; `clip`: largest root mean square of an update; no momentum.
    """
    if decay_exponent > 0 or clip < 1:
        raise ConfigError(f"optimizer: decay_exponent={decay_exponent} must be at most 0, and clip={clip} at least 1")
    made = torch_groups(groups, learning_rate, weight_decay, rates, decays)
    return torch.optim.Adafactor(made, lr=learning_rate, beta2_decay=decay_exponent, d=clip)
