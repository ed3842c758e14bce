"""The end of a run at a constant rate, begun at one of its checkpoints."""

from __future__ import annotations

import math
from typing import Literal

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.schedule.protocol import Schedule, check


@register("schedule", "cooldown")
def cooldown(start: int, *, shape: Literal["linear", "sqrt"] = "linear", final: float = 0.0) -> Schedule:
    """From the full rate to `final` of it, over all steps since the checkpoint that trainer.start names.

    `linear`: a straight line, so that constant and cooldown together are wsd (Hu et al., 2024). `sqrt`: 1 - sqrt of the share that is
    over (Hägele et al., 2024). Raises ConfigError for a run that begins at no checkpoint.
    """
    check(final=final)
    if start < 1:
        raise ConfigError(
            "schedule=cooldown goes on from a checkpoint: name it with trainer.start=RUN@STEP, or let `gptlab cooldown RUN` do it all"
        )

    def factor(step: int, total: float) -> float:
        left = min(1.0, max(0.0, (total - step) / max(1.0, total - start)))
        return final + (1 - final) * (left if shape == "linear" else 1 - math.sqrt(1 - left))

    return factor
