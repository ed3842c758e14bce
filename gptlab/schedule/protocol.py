"""A schedule: the factor on the learning rate at a step (from 0) of a run of `total` steps (re-estimated where time is the budget)."""

from __future__ import annotations

from collections.abc import Callable

from gptlab.config.errors import ConfigError

Schedule = Callable[[int, float], float]


def warmed(step: int, warmup: int) -> float | None:
    """The factor during a linear warm-up of `warmup` steps (the first update is not zero); None after it."""
    return (step + 1) / (warmup + 1) if step < warmup else None


def progress(step: int, total: float, warmup: int) -> float:
    """How far a run is between the end of its warm-up and its end, in [0, 1]."""
    return min(1.0, max(0.0, (step - warmup) / max(1.0, total - warmup)))


def check(**values: float) -> None:
    """Raise ConfigError unless `warmup` is at least 0 and every other value is a share in [0, 1]."""
    for name, value in values.items():
        if value < 0 or (name != "warmup" and value > 1):
            limit = "at least 0" if name == "warmup" else "in [0, 1]"
            raise ConfigError(f"schedule.{name}={value} must be {limit}")
