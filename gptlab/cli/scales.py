"""`gptlab ablate --scales`: the same arms at smaller sizes too, and whether a difference survives the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich import box
from rich.table import Table

from gptlab.cli.train import train
from gptlab.config.arms import with_overrides
from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.sweeper import Study
from gptlab.study.compare import Comparison, Row, compare
from gptlab.study.report import difference
from gptlab.tracker.console import console, say

DECIDED = ("better", "worse")


@dataclass(frozen=True)
class Size:
    """One of the sizes: heads keep their width, and so does the depth."""

    width: int
    heads: int
    study: str


def sizes(study: Study, name: str, count: int | None) -> list[Size]:
    """The sizes, the smallest first and the configured one last; each is half as wide as the next. Raises ConfigError."""
    if count is None:
        return []
    if count < 2:
        raise ConfigError(f"--scales {count}: at least 2 sizes are needed to say anything about them")
    for arm in study.arms:
        for override in arm.overrides:
            key = override.lstrip("+~").partition("=")[0]
            if key in ("model", "model.width", "model.heads", "model.depth"):
                raise ConfigError(f"--scales changes model.width and model.heads, and the arm {arm.label!r} sets {key} itself")
    models = [compose(study.job(arm, study.seeds[0])).model for arm in study.arms]
    width, heads = models[0].width, models[0].heads
    if model := next((m for m in models if (m.width, m.heads) != (width, heads)), None):
        raise ConfigError(f"--scales wants arms of one size, and there are widths {width} and {model.width}")
    halvings = [2**k for k in reversed(range(count))]
    if width % halvings[0] or heads % halvings[0]:
        most = max(k for k in range(1, 32) if width % 2 ** (k - 1) == 0 and heads % 2 ** (k - 1) == 0)
        raise ConfigError(
            f"--scales {count} halves model.width={width} and model.heads={heads} {count - 1} times, "
            f"which does not divide: at most {most} here"
        )
    return [Size(width // h, heads // h, name if h == 1 else f"{name}-w{width // h}") for h in halvings]


def at_scales(study: Study, found: Sequence[Size]) -> int:
    """Train what is missing of every size but the last, which is the study itself, and show what becomes of each difference.

    Returns the exit code.
    """
    code = 0
    for size in found[:-1]:
        say(f"\nwidth {size.width}, {size.heads} head{'s' * (size.heads > 1)}")
        overrides = [f"model.width={size.width}", f"model.heads={size.heads}"]
        arms = [replace(arm, overrides=with_overrides(arm.overrides, overrides)) for arm in study.arms]
        code = max(code, train(study.arguments(size.study, arms=arms), conclude=False))
    _show(found, [compare(size.study) for size in found])
    return code


def survives(rows: Sequence[Row]) -> str:
    """What becomes of an arm's difference over the sizes, the smallest first."""
    verdicts = [row.verdict for row in rows if row.verdict is not None and row.verdict.interval is not None]
    signs = {v.kind for v in verdicts if v.kind in DECIDED}
    if len(signs) > 1:
        return "its sign changes with the size"
    open_ = sum(v.kind in ("undecided", "none") for v in verdicts)
    if not signs:
        return "no difference at any size" if not open_ else f"undecided at {open_} of {len(verdicts)} sizes"
    size = _trend(rows)
    if all(v.kind in DECIDED for v in verdicts):
        return f"{signs.pop()} at every size{size}"
    return f"{signs.pop()} at {sum(v.kind in DECIDED for v in verdicts)} of {len(verdicts)} sizes, open at the others{size}"


def _trend(rows: Sequence[Row]) -> str:
    """Whether the difference grows or shrinks beyond its intervals, from the smallest to the largest size."""
    first, last = rows[0].difference, rows[-1].difference
    if first is None or last is None or first.half is None or last.half is None:
        return ""
    change = abs(last.mean) - abs(first.mean)
    if abs(change) <= math.hypot(first.half, last.half):
        return ", as large within its intervals"
    return f", and {'grows' if change > 0 else 'shrinks'} from {first.mean:+.4f} to {last.mean:+.4f}"


def scaling_line(parameters: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """(exponent, loss at ten times the largest size) of loss = a · parameters^-exponent, fitted straight in both logarithms."""
    slope, offset = np.polyfit(np.log(parameters), np.log(losses), 1)
    return -float(slope), float(np.exp(offset + slope * np.log(10 * max(parameters))))


def _show(found: Sequence[Size], comparisons: Sequence[Comparison]) -> None:
    last = comparisons[-1]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{last.study}: difference of val/loss by size", title_justify="left")
    shown.add_column("arm")
    for size, comparison in zip(found, comparisons, strict=True):
        shown.add_column(f"width {size.width}\n{comparison.rows[0].parameters:,}", justify="right", no_wrap=True)
    shown.add_column("loss falls as\nparameters to the", justify="right", no_wrap=True)
    told = []
    for row in last.rows:
        rows = [r for c in comparisons for r in c.rows if r.label == row.label]
        if len(rows) < len(comparisons):
            continue
        exponent, _ = scaling_line([r.parameters for r in rows], [r.loss.mean for r in rows])
        shown.add_row(row.label, *(f"{r.loss.mean:.4f}" if r.baseline else difference(r.difference) for r in rows), f"-{exponent:.3f}")
        if not row.baseline:
            told.append(f"{row.label}: {survives(rows)}")
    console.print(shown)
    for line in told:
        say((f"  {line}", "dim"))
