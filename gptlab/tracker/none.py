"""No tracker beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping

from gptlab.config.registry import register
from gptlab.tracker.protocol import Histogram, Metrics, RunInfo


@register("tracker", "none")
class NoTracker:
    """Metrics go to metrics.jsonl alone."""

    def start(self, run: RunInfo) -> None:
        """Nothing to start."""

    def log(self, metrics: Metrics) -> None:
        """Nothing to send."""

    def text(self, step: int, name: str, text: str) -> None:
        """Texts lie in the run's folder."""

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Nothing keeps them."""

    def finish(self, summary: Metrics, code: int) -> None:
        """Nothing to finish."""

    def add(self, run: RunInfo, figures: Metrics) -> None:
        """They lie in the run's folder."""
