"""A constant rate."""

from __future__ import annotations

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check, warmed


@register("schedule", "constant")
def constant(*, warmup: int = 100) -> Schedule:
    """The full rate throughout, after `warmup` steps."""
    check(warmup=warmup)

    def factor(step: int, total: float) -> float:
        rising = warmed(step, warmup)
        return 1.0 if rising is None else rising

    return factor
