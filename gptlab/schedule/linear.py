"""Linear decay."""

from __future__ import annotations

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check, progress, warmed


@register("schedule", "linear")
def linear(*, warmup: int = 100, final: float = 0.0) -> Schedule:
    """A straight line from the full rate to `final` of it, after `warmup` steps."""
    check(warmup=warmup, final=final)

    def factor(step: int, total: float) -> float:
        rising = warmed(step, warmup)
        return rising if rising is not None else 1 - (1 - final) * progress(step, total, warmup)

    return factor
