"""What a profile found: spans of time and the memory held, and a picture of the memory over time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKWARD, OPTIMIZER = "autograd::engine::evaluate_function", "Optimizer.step"
_SHADES = {"backward": "#4c72b0", "update": "#dd8452"}


@dataclass(frozen=True)
class Span:
    """Something that took time: its name and its thread or stream, microseconds of its beginning and length."""

    name: str
    place: tuple[Any, Any]
    start: float
    length: float

    @property
    def end(self) -> float:
        return self.start + self.length


@dataclass(frozen=True)
class Held:
    """Memory at a moment: microseconds, bytes by which it changed, and bytes held afterwards."""

    time: float
    change: int
    total: int


def draw(file: Path, held: list[Held], steps: list[Span], host: list[Span], *, absolute: bool) -> None:
    """Megabytes over milliseconds, with the steps, their backward passes and their updates marked. `absolute`: all that is held."""
    from matplotlib.figure import Figure  # not pyplot: a notebook's own pictures stay as they are

    start = steps[0].start
    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    marks, gap = {"backward": BACKWARD, "update": OPTIMIZER}, steps[0].length / 50
    phases = {name: _joined((s for s in host if s.name.startswith(mark)), gap) for name, mark in marks.items()}
    for name, found in phases.items():
        for number, (a, b) in enumerate(found):
            label = name if number == 0 else None
            axes.axvspan((a - start) / 1000, (b - start) / 1000, color=_SHADES[name], alpha=0.18, linewidth=0, label=label)
    for step in steps:
        axes.axvline((step.start - start) / 1000, color="0.6", linewidth=0.6)
        place = ((step.start + step.length / 2 - start) / 1000, 1.0)
        axes.annotate(step.name, place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7, color="0.3")
    axes.step([(h.time - start) / 1000 for h in held], [h.total / 1e6 for h in held], where="post", color="0.15", linewidth=0.9)
    axes.set_xlim(0, (max(held[-1].time, steps[-1].end) - start) / 1000)
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("MB held" if absolute else f"MB more than before {steps[0].name}")
    axes.set_title(f"memory, at most {max(h.total for h in held) / 1e6:,.1f} MB", loc="left", fontsize=10, pad=14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    if any(phases.values()):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    figure.savefig(file)


def _joined(found: Iterable[Span], gap: float) -> list[tuple[float, float]]:
    """Spans as stretches of time: two that are less than `gap` apart are one."""
    stretches: list[tuple[float, float]] = []
    for span in sorted(found, key=lambda s: s.start):
        if stretches and span.start - stretches[-1][1] < gap:
            stretches[-1] = (stretches[-1][0], max(stretches[-1][1], span.end))
        else:
            stretches.append((span.start, span.end))
    return stretches
