"""What pairing by seed gains: how much less the difference of two arms spreads than it would with seeds of their own, along training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from scipy import special

from gptlab.config.errors import ConfigError
from gptlab.study import tables
from gptlab.study.compare import METRIC, Arm, base_of, collect
from gptlab.study.statistics import CONFIDENCE, deviation
from gptlab.tracker.jsonl import curve

MOST = 1000  # beyond which a ratio says no more than that
FEWEST_SEEDS = 4  # with which the correlation of two arms has an interval


@dataclass(frozen=True)
class Gain:
    """Of one arm at one step: the unpaired over the paired standard deviation of its difference from the baseline, with its interval.

    `high` is infinite where the differences may not spread at all.
    """

    label: str
    step: int
    seeds: int
    gain: float
    low: float
    high: float


def gain(arm: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """The ratio for the losses of the same seeds, and its 95 % interval.

    sd(unpaired)² = va + vb and sd(paired)² = va + vb - 2 r √(va vb): the interval is that of the correlation r, by Fisher's z, with the
    two variances as they were found. Arms that are equal in every seed have an infinite gain.
    """
    first, second = deviation(arm) ** 2, deviation(base) ** 2
    unpaired = first + second
    if deviation([a - b for a, b in zip(arm, base, strict=True)]) ** 2 <= 1e-24 * unpaired:
        return math.inf, math.inf, math.inf
    shared = 2 * math.sqrt(first * second) / unpaired
    centre = sum(arm) / len(arm), sum(base) / len(base)
    product = math.fsum((a - centre[0]) * (b - centre[1]) for a, b in zip(arm, base, strict=True)) / (len(arm) - 1)
    correlation = product / math.sqrt(first * second) if shared else 0.0
    z = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, correlation)))
    half = float(special.ndtri(0.5 + CONFIDENCE / 2)) / math.sqrt(len(arm) - 3)
    found = [1 - shared * r for r in (correlation, math.tanh(z - half), math.tanh(z + half))]
    ratio, low, high = (1 / math.sqrt(left) if left > 0 else math.inf for left in found)
    return ratio, low, high


def pairing(study: str, *, baseline: str | None = None) -> list[Gain]:
    """The gain of every arm at every step at which all its runs, and the baseline's, measured the held-out loss.

    Raises ConfigError where an arm and the baseline have fewer than four seeds in common.
    """
    arms, _ = collect(study)
    if not arms:
        raise ConfigError(f"study {study!r} has no finished run yet")
    base = base_of(study, arms, baseline)
    readings = {arm.key: _readings(arm) for arm in arms}
    found: list[Gain] = []
    for arm in (a for a in arms if a is not base):
        seeds = sorted(arm.runs.keys() & base.runs.keys())
        if len(seeds) < FEWEST_SEEDS:
            raise ConfigError(
                f"--pairing needs at least {FEWEST_SEEDS} seeds that {arm.label!r} and {base.label!r} both have: {len(seeds)}"
            )
        theirs, ours = ([readings[a.key][seed] for seed in seeds] for a in (arm, base))
        for step in sorted(set.intersection(*(set(losses) for losses in (*theirs, *ours)))):
            found.append(Gain(arm.label, step, len(seeds), *gain([losses[step] for losses in theirs], [losses[step] for losses in ours])))
    return found


def _readings(arm: Arm) -> Mapping[int, Mapping[int, float]]:
    """By seed, the held-out loss at each step it was measured at."""
    return {seed: dict(zip(*curve(run.metrics(), METRIC), strict=True)) for seed, run in arm.runs.items()}


def _cells(gains: Sequence[Gain]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table: an arm a row, a step a column."""
    steps = sorted({found.step for found in gains})
    rows = []
    for label in dict.fromkeys(found.label for found in gains):
        own = {found.step: found for found in gains if found.label == label}
        rows.append([label, *(text(own[step]) if step in own else "" for step in steps)])
    return ["arm", *(f"step {step:,}" for step in steps)], rows


def _title(gains: Sequence[Gain]) -> str:
    seeds = sorted({found.seeds for found in gains})
    many = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"pairing by seed, {many} seeds: unpaired over paired spread of the difference"


def table(gains: Sequence[Gain]) -> Table:
    """For a terminal."""
    head, rows = _cells(gains)
    return tables.table(_title(gains), head, [[row[0], *(cell.replace(" (", "\n(") for cell in row[1:])] for row in rows])


def markdown(gains: Sequence[Gain]) -> str:
    """The same in markdown, with its title above it."""
    return tables.markdown(_title(gains), *_cells(gains))


def text(found: Gain) -> str:
    """`2.1 (1.6 to 3.0)`; of an arm that is the baseline but for rounding, that it is beyond `MOST`."""
    if found.low > MOST:
        return f"over {MOST:,}"
    return f"{_ratio(found.gain)} ({_ratio(found.low)} to {_ratio(found.high)})"


def _ratio(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
