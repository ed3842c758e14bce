"""A schedule: the factor on the learning rate at a step (from 0) of a run of `total` steps (re-estimated where time is the budget).

Components take `batch_tokens` (tokens of a step) and `steps` (of the run; None where the clock decides) from the trainer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from gptlab.config.errors import ConfigError
from gptlab.config.resolve import parse_budget

Schedule = Callable[[int, float], float]

AUTO_STEPS = 100  # of a warm-up that nobody chose, in a run of at least twice as many
_SHARE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*%\s*$")


@dataclass(frozen=True)
class Warmup:
    """A linear warm-up of `steps` steps. `known`: they fit into the run, whose length is known."""

    steps: int
    known: bool

    def __call__(self, step: int) -> float:
        """The factor that is not exceeded at a step: in (0, 1), since the first update is not zero, and 1 after the warm-up."""
        return min(1.0, (step + 1) / (self.steps + 1))

    def end(self, total: float) -> float:
        """The step from which a run of `total` steps may cool: by half of one that the clock ends, so that it still does."""
        return self.steps if self.known else min(self.steps, total / 2)


def warm_up(warmup: int | str, batch_tokens: int, steps: int | None, *, decay: float = 0.0) -> Warmup:
    """The warm-up that `schedule.warmup` asks for: steps (100), a text (100steps, 2Mtokens, 2%), or auto: 100, or half of a shorter run.

    `decay`: the share of the run that a later phase takes. Raises ConfigError for a text that is none of these, for a share of a run
    that ends by the clock, and where a warm-up that was chosen and the decay take longer than the run.
    """
    if warmup == "auto":
        return Warmup(AUTO_STEPS if steps is None else min(AUTO_STEPS, steps // 2), steps is not None)
    chosen = _steps(warmup, batch_tokens, steps)
    left = math.inf if steps is None else int((1 - decay) * steps + 1e-9)
    if chosen > left:
        what = f"schedule.warmup={warmup}" + (f" ({chosen:,} steps)" if re.search("[%n]", str(warmup)) else "")  # of a share, or tokens
        if decay:
            what += f" and schedule.decay={decay} ({decay * (steps or 0):,.0f} steps)"
        raise ConfigError(f"{what} exceed{'' if decay else 's'} the run's {steps:,} steps; a warm-up of at most {left:,} steps fits")
    return Warmup(chosen, steps is not None)


def _steps(warmup: int | str, batch_tokens: int, steps: int | None) -> int:
    """A chosen warm-up in steps."""
    text = str(warmup)
    if share := _SHARE.match(text):
        if steps is None:
            raise ConfigError(f"schedule.warmup={text}: the steps of a run that ends by the clock are not known; give steps or tokens")
        if float(share[1]) > 100:
            raise ConfigError(f"schedule.warmup={text} is more than the run; give at most 100%")
        return round(float(share[1]) / 100 * steps)
    if re.fullmatch(r"\s*-?[0-9]+\s*", text):
        if int(text) < 0:
            raise ConfigError(f"schedule.warmup={text} must be at least 0")
        return int(text)
    try:
        found = parse_budget(text)
    except ConfigError:
        found = None
    if found is None or found.unit not in ("steps", "tokens") or text.lstrip().startswith("+"):
        raise ConfigError(f"schedule.warmup={text} is no length of a warm-up: auto, 100, 100steps, 2Mtokens or 2%")
    return math.ceil(found.amount / (batch_tokens if found.unit == "tokens" else 1) - 1e-9)


def progress(step: int, total: float, start: float) -> float:
    """How far a run is between the end of its warm-up (`start`) and its end, in [0, 1]."""
    return min(1.0, max(0.0, (step - start) / max(1.0, total - start)))


def check(**values: float) -> None:
    """Raise ConfigError unless every value is a share in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"schedule.{name}={value} must be in [0, 1]")
