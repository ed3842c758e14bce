"""Where runs and studies lie."""

from __future__ import annotations

import os
from pathlib import Path

RUNS_TOO = "GPTLAB_RUNS_TOO"


def runs_root() -> Path:
    """Where runs live: $GPTLAB_RUNS, else ./runs."""
    return Path(os.environ.get("GPTLAB_RUNS") or "runs")


def roots() -> list[Path]:
    """Where a run that is named is looked for: the root, and behind it $GPTLAB_RUNS_TOO (those of a user who tries something out)."""
    too = os.environ.get(RUNS_TOO)
    return [runs_root(), *([Path(too)] if too else [])]


def study_folder(name: str) -> Path:
    """A study's own runs, and what is noted of it."""
    return runs_root() / name
