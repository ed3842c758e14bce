"""The terminal while a run trains: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from gptlab.tracker.protocol import Metrics

console = Console(stderr=False, highlight=False, soft_wrap=True)


_SHOWN = (
    ("loss", "train/loss", "loss {:.3f} "),
    ("val", "val/loss", "val {:.3f} "),
    ("rate", "train/tokens_per_second", "{:,.0f}/s"),
)


class RunProgress:
    """Progress of one run: step, loss, held-out loss, tokens a second, time left."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total = title, total
        self.live = console.is_terminal and not os.environ.get("GPTLAB_QUIET")
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._shown: dict[str, Any] = {"loss": "", "val": "", "rate": ""}

    def __enter__(self) -> RunProgress:
        if self.live:
            self._progress = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=30)),
                BarColumn(bar_width=10),
                TextColumn("{task.completed:>5.0f}/{task.total:.0f}" if self.total else "{task.completed:>5.0f}"),
                TextColumn("{task.fields[loss]}{task.fields[val]}[dim]{task.fields[rate]}[/]", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task(self.title, total=self.total, **self._shown)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, metrics: Metrics) -> None:
        """Show what is new in a line of metrics."""
        if self._progress is None or self._task is None:
            return
        for key, name, form in _SHOWN:
            if name in metrics:
                self._shown[key] = form.format(metrics[name])
        self._progress.update(self._task, completed=float(metrics["step"]), **self._shown)


def say(*parts: str | tuple[str, str]) -> None:
    """One line for the user, on standard output: plain text, and (text, style) pairs. Brackets in a text are only brackets."""
    console.print(Text.assemble(*parts))


def complain(text: str) -> None:
    """One line about something wrong, on standard error."""
    print(text, file=sys.stderr)
