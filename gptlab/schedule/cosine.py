"""Cosine decay."""

from __future__ import annotations

import math

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check, progress, warm_up


@register("schedule", "cosine")
def cosine(batch_tokens: int, steps: int | None, *, warmup: int | str = "auto", final: float = 0.1) -> Schedule:
    """Half a cosine (Loshchilov & Hutter, 2017) from the full rate to `final` of it, after the warm-up."""
    check(final=final)
    rise = warm_up(warmup, batch_tokens, steps)

    def factor(step: int, total: float) -> float:
        fall = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress(step, total, rise.end(total))))
        return min(rise(step), fall)

    return factor
