"""`trainer.profile=20-25`: these steps of a session under torch.profiler, written down as a trace, a table and a memory timeline."""

from __future__ import annotations

import bisect
import contextlib
import csv
import gzip
import json
import os
import shutil
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptlab.config.errors import ConfigError
from gptlab.config.resolve import parse_profile
from gptlab.runner.timeline import Held, Span, draw
from gptlab.tracker.console import say

PLAIN_BYTES = 10_000_000  # of a trace that is left uncompressed
ROWS = 40  # of the table of operators
COMPARED = 50  # steps before the recorded ones, whose median they are compared with
STEP = "step "  # and its number: what a recorded step is called in the trace
BETWEEN = "(Python between operators)"
_HOST = ("cpu_op", "user_annotation")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Profile:
    """A context manager around each training step, which records those that are asked for. `total`: steps of the run, where known.

    `folder` then holds trace.json (or trace.json.gz, for chrome://tracing and ui.perfetto.dev), operators.txt, memory.png and
    memory.csv. Raises ConfigError for steps that the run has not.
    """

    def __init__(self, asked: str, folder: Path, device: torch.device, total: int | None) -> None:
        self.steps = parse_profile(asked)
        if self.steps and total is not None and self.steps[-1] > total:
            raise ConfigError(f"trainer.profile={asked}: the run has {total} step{'s' * (total != 1)}")
        self.folder, self.device = folder, device
        self._profiler: torch.profiler.profile | None = None
        self._label: Any = None
        self._step, self._started = 0, 0.0
        self._before, self._recorded = deque[float](maxlen=COMPARED), list[float]()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Around a session's steps: one that ends among those to be recorded writes what there is, one that ends before says so."""
        try:
            yield
        finally:
            if self._profiler is not None:
                self._write()
            elif self._step < self.steps.start:
                say((f"  profile: nothing was recorded; the session ended after its step {self._step}", "yellow"))

    def __enter__(self) -> Profile:
        self._step += 1
        if self._step in self.steps:
            if self._profiler is None:
                self._profiler = self._start()
            self._label = torch.profiler.record_function(f"{STEP}{self._step}")
            self._label.__enter__()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._step >= self.steps.stop:
            return
        seconds = time.perf_counter() - self._started
        if self._step not in self.steps:
            self._before.append(seconds)
            return
        self._label.__exit__(*error)
        self._recorded.append(seconds)
        if self._step == self.steps[-1]:
            self._write()

    def _start(self) -> torch.profiler.profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell the terminal when it starts and stops
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        made = torch.profiler.profile(activities=activities, profile_memory=True)
        made.start()
        return made

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        _compress(trace)
        steps = [s for s in spans(events, ("user_annotation",)) if s.name.startswith(STEP)]
        whole = sum(s.length for s in steps)
        host, device = (_within(spans(events, kinds), steps) for kinds in (_HOST, _DEVICE))
        first, count = self.steps[0], len(self._recorded)
        which = f"step {first}" if count == 1 else f"steps {first} to {first + count - 1}"
        cost = f"{1000 * statistics.median(self._recorded):.1f} ms a step while recording"
        if self._before:
            cost += f", {1000 * statistics.median(self._before):.1f} ms before"
        if device:
            cost += f"; the GPU busy in {_covered(device) / whole:.0%} of it"
        kinds = [("kernels on the GPU", device)] * bool(device) + [("operators on the CPU", host)]
        parts = [f"{which} of a session: {cost}", *(table(title, own_time(found), steps) for title, found in kinds)]
        (self.folder / "operators.txt").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        held = memory(events, 1 if self.device.type == "cuda" else 0)
        if held:
            write_memory(self.folder / "memory.csv", held, steps[0].start)
            draw(self.folder / "memory.png", held, steps, host, absolute=self.device.type == "cuda")
        most = ", ".join(f"{name[:60]} {spent / whole:.0%}" for name, (spent, _) in ranked(own_time(device or host))[:3])
        say((f"  profile: {which} in {self.folder}; {cost}; most of it in {most}", "dim"))


def spans(events: list[dict[str, Any]], kinds: tuple[str, ...]) -> list[Span]:
    """What a Chrome trace says took time, of some categories."""
    return [
        Span(e["name"], (e["pid"], e["tid"]), float(e["ts"]), float(e["dur"]))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in kinds
    ]


def own_time(found: list[Span]) -> dict[str, tuple[float, int]]:
    """By name the microseconds spent in it and in nothing that it called, and how often it was called."""
    sums: dict[str, tuple[float, int]] = {}

    def add(name: str, microseconds: float, calls: int) -> None:
        spent, count = sums.get(name, (0.0, 0))
        sums[name] = (spent + microseconds, count + calls)

    open_: list[Span] = []
    for span in sorted(found, key=lambda s: (str(s.place), s.start, -s.length)):
        while open_ and (open_[-1].place != span.place or span.start >= open_[-1].end):
            open_.pop()
        if open_:
            add(_shown(open_[-1]), -span.length, 0)
        add(_shown(span), span.length, 1)
        open_.append(span)
    return sums


def ranked(own: dict[str, tuple[float, int]]) -> list[tuple[str, tuple[float, int]]]:
    """What `own_time` found, most first."""
    return sorted(own.items(), key=lambda item: -item[1][0])


def _shown(span: Span) -> str:
    return BETWEEN if span.name.startswith(STEP) else span.name


def _within(found: list[Span], steps: list[Span]) -> list[Span]:
    """What began in a recorded step: evaluation and checkpoints between two of them are in the trace, and not in the table."""
    starts = [step.start for step in steps]
    places = [bisect.bisect(starts, s.start) - 1 for s in found]
    return [s for s, place in zip(found, places, strict=True) if place >= 0 and s.start < steps[place].end]


def _covered(found: list[Span]) -> float:
    """Microseconds in which at least one of them ran."""
    covered, until = 0.0, float("-inf")
    for span in sorted(found, key=lambda s: s.start):
        covered += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return covered


def table(title: str, own: dict[str, tuple[float, int]], steps: list[Span]) -> str:
    """The names with most time of their own, as text: milliseconds and calls a step, and the share of the steps' time."""
    whole = sum(s.length for s in steps)
    lines = [f"{title}, by their own time", f"{'ms a step':>10}  {'share':>6}  {'calls a step':>12}  name"]
    first, others = ranked(own)[:ROWS], ranked(own)[ROWS:]
    for name, (spent, calls) in first:
        lines.append(f"{spent / len(steps) / 1000:>10.3f}  {spent / whole:>6.1%}  {calls / len(steps):>12.1f}  {name}")
    if others:
        spent = sum(spent for _, (spent, _) in others)
        lines.append(f"{spent / len(steps) / 1000:>10.3f}  {spent / whole:>6.1%}  {'':>12}  ({len(others)} others)")
    return "\n".join(lines)


def memory(events: list[dict[str, Any]], kind: int) -> list[Held]:
    """Memory over time of a kind of device (0: CPU, 1: CUDA), from a Chrome trace; of the CPU what came after the recording began."""
    found = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == kind]
    found.sort(key=lambda e: (float(e["ts"]), e["args"].get("Ev Idx", 0)))
    if not found:
        return []
    total = found[0]["args"]["Total Allocated"] - found[0]["args"]["Bytes"] if kind else 0
    held = []
    for event in found:
        change = int(event["args"]["Bytes"])
        total += change
        held.append(Held(float(event["ts"]), change, total))
    return held


def write_memory(file: Path, held: list[Held], start: float) -> None:
    """The timeline as a table; milliseconds count from the first recorded step."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(("milliseconds", "change_bytes", "held_bytes"))
        writer.writerows((f"{(h.time - start) / 1000:.4f}", h.change, h.total) for h in held)


def _compress(trace: Path) -> None:
    packed = trace.with_suffix(".json.gz")
    packed.unlink(missing_ok=True)  # of an earlier session
    if trace.stat().st_size > PLAIN_BYTES:
        with trace.open("rb") as plain, gzip.open(packed, "wb", compresslevel=5) as out:
            shutil.copyfileobj(plain, out)
        trace.unlink()
