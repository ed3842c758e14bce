"""Warm-up, stable, decay."""

from __future__ import annotations

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check, warm_up


@register("schedule", "wsd")
def wsd(batch_tokens: int, steps: int | None, *, warmup: int | str = "auto", decay: float = 0.2, final: float = 0.0) -> Schedule:
    """A trapezoid (Hu et al., 2024): the full rate, then a line to `final` of it over the last `decay` share of the run.

    A decay that would begin within a warm-up of `auto`, or of a run that the clock ends, begins after it.
    """
    check(decay=decay, final=final)
    rise = warm_up(warmup, batch_tokens, steps, decay=decay)

    def factor(step: int, total: float) -> float:
        length = max(1.0, min(decay * total, total - rise.end(total)))  # a decay that began within the warm-up would be a jump
        left = min(1.0, max(0.0, (total - step) / length))
        return min(rise(step), final + (1 - final) * left)

    return factor
