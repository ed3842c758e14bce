"""What a tracker is told. `metrics.jsonl` is always written; a tracker takes the same names elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Metrics = dict[str, float | int | str]
Histogram = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # counts (n,) and edges (n + 1,)


@dataclass(frozen=True)
class RunInfo:
    """The run as a tracker shows it."""

    id: str  # study-identity
    study: str
    name: str
    directory: Path
    config: dict[str, Any]  # flat: components under model/norm, values under model.width
    logged_to: int  # last step already tracked before a resume; its replay is not sent again
    arm: str = ""  # what its seeds have in common
    tags: tuple[str, ...] = ()


class Tracker(Protocol):
    """A place metrics go to."""

    def start(self, run: RunInfo) -> None:
        """Called once, before the first metrics."""

    def log(self, metrics: Metrics) -> None:
        """One line: `step`, `tokens`, `flops`, `seconds`, `wall` and what was measured."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text that the model wrote."""

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """How values are spread, by name."""

    def finish(self, summary: Metrics, code: int) -> None:
        """Called once, whatever happened, with the exit code of the run."""

    def add(self, run: RunInfo, figures: Metrics) -> None:
        """Add figures to a run that is over, `logged_to` its last step; in place of `start`, `log` and `finish`."""
