"""A small trainer for what is fitted to a model's activations in seconds: tuned lenses, probes.

The runner trains a Transformer on tokens, and its runs, losses and checkpoints are of that; what is fitted here is a few matrices on
tensors at hand, in seconds. So this is a loop of its own, with the optimizers and schedules that are registered for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.config.errors import ConfigError, DivergedError
from gptlab.config.registry import build, component, load_components
from gptlab.model.init import roles
from gptlab.optimizer.groups import parameter_groups


def fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    optimizer: str = "adamw",
    schedule: str = "linear",
    weight_decay: float = 0.0,
) -> list[float]:
    """Train a module by `loss(step)`, in the mode it is in; returns the losses.

    `optimizer` and `schedule` are registered names. Raises ConfigError for one that is none or no steps, DivergedError for a loss that is
    not finite.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1")
    load_components()
    device = next(module.parameters()).device
    options: Any = component("optimizer", optimizer).options
    chosen = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    updates: torch.optim.Optimizer = build(options(**chosen), groups=parameter_groups(module, roles(module)), device=device)
    factor = build(component("schedule", schedule).options(), batch_tokens=1, steps=steps)
    rates, seen = [group["lr"] for group in updates.param_groups], []
    for step in range(steps):
        for group, rate in zip(updates.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, steps)
        with torch.enable_grad():
            value = loss(step)
            value.backward()  # type: ignore[no-untyped-call]
        seen.append(float(value.detach()))
        if not math.isfinite(seen[-1]):
            raise DivergedError(f"the loss is {seen[-1]} at step {step + 1}; a learning_rate below {learning_rate:g} may help")
        updates.step()
        updates.zero_grad(set_to_none=True)
    return seen
