"""Warm-up, stable, decay."""

from __future__ import annotations

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check, warmed


@register("schedule", "wsd")
def wsd(*, warmup: int = 100, decay: float = 0.2, final: float = 0.0) -> Schedule:
    """A trapezoid (Hu et al., 2024): the full rate, then a line to `final` of it over the last `decay` share of the run."""
    check(warmup=warmup, decay=decay, final=final)

    def factor(step: int, total: float) -> float:
        rising = warmed(step, warmup)
        if rising is not None:
            return rising
        length = max(1.0, min(decay * total, total - warmup))  # a decay that began within the warm-up would be a jump
        left = min(1.0, max(0.0, (total - step) / length))
        return final + (1 - final) * left

    return factor
