"""Inverse square root decay."""

from __future__ import annotations

import math

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, warm_up


@register("schedule", "inverse_sqrt")
def inverse_sqrt(batch_tokens: int, steps: int | None, *, warmup: int | str = "auto") -> Schedule:
    """sqrt(warmup / step) after the warm-up (Vaswani et al., 2017): it does not know where the run ends."""
    rise = warm_up(warmup, batch_tokens, steps)
    return lambda step, total: min(rise(step), math.sqrt((rise.steps + 1) / (step + 1)))
