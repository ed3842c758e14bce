"""Linear decay."""

from __future__ import annotations

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check, progress, warm_up


@register("schedule", "linear")
def linear(batch_tokens: int, steps: int | None, *, warmup: int | str = "auto", final: float = 0.0) -> Schedule:
    """A straight line from the full rate to `final` of it, after the warm-up."""
    check(final=final)
    rise = warm_up(warmup, batch_tokens, steps)
    return lambda step, total: min(rise(step), 1 - (1 - final) * progress(step, total, rise.end(total)))
