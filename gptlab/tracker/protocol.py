"""What a tracker is told. `metrics.jsonl` is always written; a tracker takes the same names elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class RunInfo:
    """The run as a tracker shows it."""

    id: str  # study-identity
    study: str
    name: str
    directory: Path
    config: dict[str, Any]  # flat: components under model/norm, values under model.width
    logged_to: int  # last step already tracked before a resume; its replay is not sent again


class Tracker(Protocol):
    """A place metrics go to."""

    def start(self, run: RunInfo) -> None:
        """Called once, before the first metrics."""

    def log(self, metrics: Metrics) -> None:
        """One line: `step`, `tokens`, `flops`, `seconds`, `wall` and what was measured."""

    def finish(self, summary: Metrics, code: int) -> None:
        """Called once, whatever happened, with the exit code of the run."""
