"""Cosine decay."""

from __future__ import annotations

import math

from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check, progress, warmed


@register("schedule", "cosine")
def cosine(*, warmup: int = 100, final: float = 0.1) -> Schedule:
    """Half a cosine (Loshchilov & Hutter, 2017) from the full rate to `final` of it, after `warmup` steps."""
    check(warmup=warmup, final=final)

    def factor(step: int, total: float) -> float:
        rising = warmed(step, warmup)
        if rising is not None:
            return rising
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress(step, total, warmup)))

    return factor
