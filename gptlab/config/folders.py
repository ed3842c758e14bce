"""Where runs and studies lie."""

from __future__ import annotations

import os
from pathlib import Path


def runs_root() -> Path:
    """Where runs live: $GPTLAB_RUNS, else ./runs."""
    return Path(os.environ.get("GPTLAB_RUNS") or "runs")


def study_folder(name: str) -> Path:
    """A study's own runs, and what is noted of it."""
    return runs_root() / name
