"""Inverse square root decay."""

from __future__ import annotations

import math

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check, warmed


@register("schedule", "inverse_sqrt")
def inverse_sqrt(*, warmup: int = 100) -> Schedule:
    """sqrt(warmup / step) after `warmup` steps (Vaswani et al., 2017): it does not know where the run ends."""
    check(warmup=warmup)

    def factor(step: int, total: float) -> float:
        rising = warmed(step, warmup)
        return rising if rising is not None else math.sqrt((warmup + 1) / (step + 1))

    return factor
