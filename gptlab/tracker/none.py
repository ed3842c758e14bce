"""No tracker beside metrics.jsonl."""

from __future__ import annotations

from gptlab.config.registry import register
from gptlab.tracker.protocol import Metrics, RunInfo


@register("tracker", "none")
class NoTracker:
    """Metrics go to metrics.jsonl alone."""

    def start(self, run: RunInfo) -> None:
        """Nothing to start."""

    def log(self, metrics: Metrics) -> None:
        """Nothing to send."""

    def finish(self, summary: Metrics, code: int) -> None:
        """Nothing to finish."""
