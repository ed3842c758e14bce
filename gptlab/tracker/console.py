"""The terminal while a run trains: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from gptlab.tracker.protocol import Metrics

LONGEST_WORD = 34  # of a table, that a narrow terminal does not break


class _Console(Console):
    """Prints a table wider than the terminal rather than without a column, or with its words in pieces: the lines then go on below."""

    def print(self, *objects: Any, **options: Any) -> None:
        for shown in objects:
            if isinstance(shown, Table) and shown.columns and (least := _least_width(shown)) > self.width:
                shown.width = least
        super().print(*objects, **options)


def _least_width(shown: Table) -> int:
    """Characters that a table takes with every figure on one line, and no word broken."""
    wide = Console(width=10_000)
    cells = [[_plain(cell) for cell in (column.header, *column.cells)] for column in shown.columns]
    slack = 0
    for column, texts in zip(shown.columns, cells, strict=True):
        if not column.no_wrap and column.width is None:
            words = max((cell_len(word) for text in texts for word in text.split()), default=0)
            whole = max((cell_len(line) for text in texts for line in text.splitlines()), default=0)
            slack += max(0, whole - max(min(words, LONGEST_WORD), column.min_width or 0))
    return wide.measure(shown).maximum - slack


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(cell).plain if isinstance(cell, str) else ""


# Of torchrun's processes the first speaks; the others write what goes wrong to their own logs.
console = _Console(stderr=False, highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ)


SHOWN_EVERY, LINE_EVERY = 0.25, 10.0  # seconds
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


@dataclass(frozen=True)
class _Reading:
    source: str
    done: int
    total: int | None
    stage: str = "reading"
    unit: str = "characters"
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    waiting: str = ""


class PreparationProgress:
    """Progress of preparing text: rows, tokens, megabytes a second, time left."""

    def __init__(self, lines: bool = False) -> None:
        self.live = console.is_terminal and not os.environ.get("GPTLAB_QUIET")
        self.lines = lines and not self.live  # a plain line now and then, for a log
        self.bytes, self.seconds = 0, 0.0  # of text tokenised so far, and how long that took
        self.worked = False  # whether anything was tokenised
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._started, self._first, self._shown = 0.0, 0, 0.0
        self._before = (0, 0.0)

    def __enter__(self) -> PreparationProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, told: Any) -> None:
        """Show how far it is: what `gptlab.data.prepare.Progress` says."""
        now = time.monotonic()
        stage = f"{told.source} {told.stage}".strip()
        if stage != self._stage:
            self._stage, self._started, self._first, self._before = stage, now, told.bytes, (self.bytes, self.seconds)
            self._shown = now if self.lines else 0.0  # a log wants no line of what takes seconds
        self.worked = self.worked or bool(told.tokens)
        self.bytes, self.seconds = self._before[0] + told.bytes - self._first, self._before[1] + now - self._started
        if now - self._shown < (LINE_EVERY if self.lines else SHOWN_EVERY):
            return
        self._shown = now
        if self.lines:
            share = f" {told.done / told.total:.0%}" if told.total else ""
            say((f"{stage}{share}: {self._text(told, now)}", "dim"))
        if not self.live:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=None, text="")
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, description=stage, completed=told.done, total=told.total, text=self._text(told, now))

    def reading(self, source: str, done: int, total: int | None) -> None:
        """Show how much has been read, where nothing is tokenised yet."""
        self.update(_Reading(source, done, total))

    def _text(self, told: Any, now: float) -> str:
        if told.waiting:
            return f"waiting for {told.waiting}"
        if told.unit == "characters" and not told.rows:
            return f"{told.done:,} characters read"
        seconds = now - self._started
        rate = (told.bytes - self._first) / seconds / 1e6 if seconds > SHOWN_EVERY else 0.0
        return f"{told.rows:,} document{'s' * (told.rows != 1)}, {told.tokens:,} tokens" + (f", {rate:.1f} MB/s" if rate else "")


def say(*parts: str | tuple[str, str]) -> None:
    """One line for the user, on standard output: plain text, and (text, style) pairs. Brackets in a text are only brackets."""
    console.print(Text.assemble(*parts))


def complain(text: str) -> None:
    """One line about something wrong, on standard error."""
    print(text, file=sys.stderr)
