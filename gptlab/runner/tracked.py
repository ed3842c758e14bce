"""A run as its tracker knows it, while it trains and afterwards."""

from __future__ import annotations

import warnings
from typing import Any

from gptlab.config import codec
from gptlab.config.registry import build
from gptlab.config.schema import Config
from gptlab.runner.run import Run, holder
from gptlab.tracker.console import say
from gptlab.tracker.guard import Guarded, TrackerWarning
from gptlab.tracker.protocol import Metrics, RunInfo


def run_info(run: Run, config: Config, flat: dict[str, Any], logged_to: int) -> RunInfo:
    """What a tracker is told of a run; `flat`: its config and what else is shown with it."""
    return RunInfo(
        f"{config.study}-{run.identity}", config.study, config.name or "base", run.directory, flat, logged_to,
        arm=_arm(config), tags=(config.study, f"seed {config.seed}"),
    )  # fmt: skip


def add_figures(run: Run, figures: Metrics) -> None:
    """Add what was measured of a run afterwards to what its tracker has of it. One that trains now is left to its trainer."""
    if holder(run.directory):
        say((f"{run.directory.name} trains now: its tracker gets these figures when it is evaluated again", "yellow"))
        return
    config = run.config()
    last = max((int(line.get("step", 0)) for line in run.metrics()), default=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Guarded(build(config.tracker)).add(run_info(run, config, codec.flatten(config), last), figures)
    for warning in told:
        if issubclass(warning.category, TrackerWarning):
            say((str(warning.message), "yellow"))


def _arm(config: Config) -> str:
    """What the seeds of this config have in common, for a tracker: the arm's name, else the run's less its seed."""
    parts = [part for part in config.name.split(",") if not part.startswith("seed=")]
    return config.arm or ",".join(parts) or "base"
