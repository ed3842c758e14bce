"""Schedule-free AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.optimizer.groups import Groups, check_shares, torch_groups


@register("optimizer", "schedule_free")
def schedule_free(
    groups: Groups,
    *,
    learning_rate: float = 2.5e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    rates: dict[str, float] = {},  # noqa: B006, a config's default, copied for each
    decays: dict[str, float] = {},  # noqa: B006
) -> torch.optim.Optimizer:
    """AdamW that averages its weights instead of decaying its rate (Defazio et al., 2024); takes schedule=constant, which warms it up.

    What is measured, sampled and loaded is the average (of weight `beta1` in the weights it is trained at). Library: schedulefree.
    """
    check_shares(beta1=beta1, beta2=beta2)
    if beta1 == 0:
        raise ConfigError("optimizer.beta1=0.0: the average cannot be had from weights that hold nothing of it; give more than 0")
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise ConfigError("optimizer=schedule_free needs the library schedulefree: run `pip install 'gptlab[optimizers]'`") from error

    class ScheduleFree(AdamWScheduleFree):  # type: ignore[misc, unused-ignore]
        """Always in training mode: the library's `eval()` and `train()` turn the weights forth and back with rounding, and a run
        would depend on how often it is measured."""

        @torch.no_grad()
        def average(self, parameter: Tensor) -> Tensor:
            """A copy of a parameter as evaluation wants it (x of the paper), from the value it is trained at (y) and its `z`."""
            state: dict[str, Any] = self.state.get(parameter, {})
            return parameter.detach().lerp(state["z"], 1 - 1 / beta1) if "z" in state else parameter.detach().clone()

    made = torch_groups(groups, learning_rate, weight_decay, rates, decays, wider=1.0)
    optimizer = ScheduleFree(made, lr=learning_rate, betas=(beta1, beta2), eps=eps)
    optimizer.train()  # there is no state yet: this sets the mode alone
    return optimizer  # type: ignore[no-any-return, unused-ignore]
