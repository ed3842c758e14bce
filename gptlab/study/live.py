"""A table of all arms of a study while they train, whoever trains them: it looks only at what the runs write."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.live import Live
from rich.table import Table

from gptlab.config.folders import runs_root
from gptlab.config.resolve import parse_budget
from gptlab.runner.run import MEMBERS, Run, all_runs
from gptlab.tracker.console import console
from gptlab.tracker.jsonl import read_metrics

REFRESH = 2.0  # times a second
_TAIL = 4096  # bytes at the end of a metrics file that are looked at
_QUIET = "GPTLAB_QUIET"


@dataclass
class _Seen:
    """What is known of one run."""

    directory: Path
    steps: int | None = None
    state: str = "waiting"
    step: int = 0
    loss: float | None = None
    seconds: float = 0.0


class LiveTable:
    """On a terminal: a row an arm, how many seeds are done, the step and loss of what trains, the time left. Elsewhere nothing."""

    def __init__(self, study: str, labels: Sequence[str], seeds: Sequence[int]) -> None:
        self.study, self.labels, self.seeds = study, list(labels), list(seeds)
        self._live: Live | None = None
        self._seen: dict[tuple[str, int], _Seen] = {}
        self._members = 0.0

    def __enter__(self) -> LiveTable:
        if console.is_terminal and not console.quiet and not os.environ.get(_QUIET):
            os.environ[_QUIET] = "1"  # one table instead of a line a run
            self._live = Live(get_renderable=self.render, console=console, refresh_per_second=REFRESH, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            os.environ.pop(_QUIET, None)

    def render(self) -> Table:
        """The table as it is now."""
        self._look()
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{self.study}: {self._left()}", title_justify="left")
        shown.add_column("arm")
        for name in ("done", "now", "val/loss"):
            shown.add_column(name, justify="right" if name != "now" else "left", no_wrap=True)
        for label in self.labels:
            runs = [(seed, self._seen.get((label, seed))) for seed in self.seeds]
            done = [s for _, s in runs if s and s.state == "done"]
            losses = [s.loss for s in done if s.loss is not None]
            now = "; ".join(_now(seed, s) for seed, s in runs if s and s.state in ("running", "failed"))
            mean = f"{sum(losses) / len(losses):.4f}" if losses else ""
            shown.add_row(label, f"{len(done)}/{len(self.seeds)}", now or ("" if len(done) == len(runs) else "waiting"), mean)
        return shown

    def _look(self) -> None:
        file = runs_root() / self.study / MEMBERS
        stamp = file.stat().st_mtime if file.exists() else 0.0
        if stamp != self._members:
            self._members = stamp
            where = {r.identity: r.directory for r in all_runs()}
            for line in read_metrics(file):
                key = (str(line.get("label")), int(line["seed"]))
                if line["identity"] in where and (key not in self._seen or self._seen[key].directory != where[line["identity"]]):
                    self._seen[key] = _Seen(where[line["identity"]])
        for seen in self._seen.values():
            if seen.state != "done":
                _read(seen)

    def _left(self) -> str:
        """How many runs are done, and about how long the rest takes by those that were trained."""
        total = len(self.labels) * len(self.seeds)
        own = [s for (label, seed), s in self._seen.items() if label in self.labels and seed in self.seeds]
        done = [s for s in own if s.state == "done"]
        text = f"{len(done)} of {total} runs done"
        took = [s.seconds for s in done if s.seconds]
        begun = sum(min(1.0, s.step / s.steps) for s in own if s.state == "running" and s.steps)
        if took and len(done) < total:
            left = (total - len(done) - begun) * sum(took) / len(took)
            text += f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
        return text


def _now(seed: int, seen: _Seen) -> str:
    if seen.state == "failed":
        return f"seed {seed} failed"
    loss = f", loss {seen.loss:.3f}" if seen.loss is not None else ""
    return f"seed {seed}: step {seen.step:,}{f'/{seen.steps:,}' if seen.steps else ''}{loss}"


def _read(seen: _Seen) -> None:
    run = Run(seen.directory)
    done = run.read("done.json")
    if done is not None:
        summary: dict[str, Any] = done["summary"]
        seen.state, seen.loss, seen.seconds = "done", summary.get("val/loss"), float(summary.get("wall", 0.0))
        return
    if run.read("failed.json"):
        seen.state = "failed"
        return
    if seen.steps is None:
        config = (run.read("config.json") or {}).get("config", {})
        if config:
            seen.state = "running"
            budget = parse_budget(str(config["trainer"]["budget"]))
            seen.steps = int(budget.amount) if budget.unit == "steps" and not budget.beyond else 0
    newest = _newest(run.metrics_file)
    if newest:
        seen.state, seen.step, seen.loss = "running", int(newest.get("step", 0)), newest.get("train/loss", seen.loss)


def _newest(file: Path) -> dict[str, Any]:
    """The newest value of everything that the end of a metrics file tells."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - _TAIL))
            lines = opened.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # cut off, at the beginning or while it is written
            told = json.loads(line)
            found |= told if isinstance(told, dict) else {}
    return found
