"""A tracker is never the reason that a run fails: whatever it raises costs one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from gptlab.tracker.protocol import Histogram, Metrics, RunInfo, Tracker


class Guarded:
    """Hands everything on to a tracker until it raises; then says so once and leaves it."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._alive = True

    def start(self, run: RunInfo) -> None:
        self._try(lambda: self.tracker.start(run))

    def log(self, metrics: Metrics) -> None:
        self._try(lambda: self.tracker.log(metrics))

    def text(self, step: int, name: str, text: str) -> None:
        self._try(lambda: self.tracker.text(step, name, text))

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        self._try(lambda: self.tracker.histograms(step, found))

    def finish(self, summary: Metrics, code: int) -> None:
        self._try(lambda: self.tracker.finish(summary, code))

    def add(self, run: RunInfo, figures: Metrics) -> None:
        self._try(lambda: self.tracker.add(run, figures))

    def _try(self, call: Callable[[], None]) -> None:
        if not self._alive:
            return
        try:
            call()
        except Exception as error:  # a service may raise anything, and none of it may cost the run
            self._alive = False
            sentence = " ".join(str(error).split())[:200]
            warnings.warn(
                TrackerWarning(f"the tracker failed ({type(error).__name__}: {sentence}); metrics go to metrics.jsonl alone"), stacklevel=2
            )


class TrackerWarning(UserWarning):
    """Something about tracking that the user should see once."""
