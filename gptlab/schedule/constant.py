"""A constant rate."""

from __future__ import annotations

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, warm_up


@register("schedule", "constant")
def constant(batch_tokens: int, steps: int | None, *, warmup: int | str = "auto") -> Schedule:
    """The full rate throughout, after the warm-up."""
    rise = warm_up(warmup, batch_tokens, steps)
    return lambda step, total: rise(step)
