"""TensorBoard's event files in the run's folder: `tensorboard --logdir runs` shows every run of every study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.tracker.protocol import Histogram, Metrics, RunInfo

FOLDER = "tensorboard"
_AXES = ("step", "tokens", "flops", "seconds", "wall")  # TensorBoard has the step and its own clock


@register("tracker", "tensorboard")
class TensorBoard:
    """TensorBoard's event files, each metric against the step; the config as a text. Library: tensorboard."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("tracker=tensorboard needs the library tensorboard: run `pip install 'gptlab[tensorboard]'`") from error
        self._make: Any = SummaryWriter
        self._writer: Any = None
        self._logged_to = -1

    def start(self, run: RunInfo) -> None:
        self._logged_to = run.logged_to
        resumed = {"purge_step": run.logged_to + 1} if run.logged_to > 0 else {}  # what a crash left beyond it is shown no more
        self._writer = self._make(log_dir=str(run.directory / FOLDER), **resumed)
        if not resumed:
            self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=1, default=str)}\n```")

    def log(self, metrics: Metrics) -> None:
        step = int(metrics["step"])
        if step <= self._logged_to:
            return
        for name, value in metrics.items():
            if name not in _AXES and not isinstance(value, str):
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        if step > self._logged_to:
            self._writer.add_text(name, f"```\n{text}\n```", step)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        if step <= self._logged_to:
            return
        for name, (counts, edges) in found.items():
            middles = (edges[1:] + edges[:-1]) / 2  # the sums are those of the bins, which is all that is known of the values
            sums = float((counts * middles).sum()), float((counts * middles**2).sum())
            limits = edges[1:].tolist()
            self._writer.add_histogram_raw(name, edges[0], edges[-1], int(counts.sum()), *sums, limits, counts.tolist(), step)

    def finish(self, summary: Metrics, code: int) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, run: RunInfo, figures: Metrics) -> None:
        self.start(run)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, run.logged_to)
        self._writer.close()
