"""Lion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gptlab.config.registry import register
from gptlab.optimizer.groups import Groups, check_shares, torch_groups


class Lion(torch.optim.Optimizer):
    """The sign of a mean of gradients: every weight moves by the rate (Chen et al., 2023)."""

    def __init__(self, groups: Groups, *, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients, rate, (beta1, beta2) = [p.grad for p in parameters], group["lr"], group["betas"]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
            means = [self.state[p]["mean"] for p in parameters]
            updates = torch._foreach_lerp(means, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-rate)
            torch._foreach_lerp_(means, gradients, 1 - beta2)


@register("optimizer", "lion")
def lion(
    groups: Groups,
    *,
    learning_rate: float = 1e-4,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 1.0,
    rates: dict[str, float] = {},  # noqa: B006, a config's default, copied for each
    decays: dict[str, float] = {},  # noqa: B006
) -> torch.optim.Optimizer:
    """Sign updates with momentum (Chen et al., 2023); its paper takes a tenth of AdamW's rate and ten times its decay."""
    check_shares(beta1=beta1, beta2=beta2)
    return Lion(torch_groups(groups, learning_rate, weight_decay, rates, decays, wider=1.0), betas=(beta1, beta2))
