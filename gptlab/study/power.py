"""Whether the number of seeds that a verdict asks for is enough, by resampling a study that has many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table

from gptlab.config.errors import ConfigError
from gptlab.runner.run import read_ablation
from gptlab.study import tables
from gptlab.study.compare import METRIC, base_of, collect
from gptlab.study.statistics import CONFIDENCE, MOST_SEEDS, POWER, t_quantile
from gptlab.study.verdict import EFFECT, judge

FEWEST_SEEDS = 12  # below, the resampled studies are too much the same
PILOT, RESAMPLINGS, STUDIES = 5, 200, 200  # seeds of the first look, how often that is taken, and studies of the size it asks for


@dataclass(frozen=True)
class Power:
    """Of one arm: the seeds that a first look at PILOT of them asks for (median, and what nine looks in ten stay within), and the share of
    studies of that many that find `effect`."""

    label: str
    effect: float
    seeds: int
    spread: float  # standard deviation of one seed's difference
    needed: int
    needed_least: int
    needed_most: int
    power: float


def power_of(study: str, *, baseline: str | None = None, effect: float | None = None) -> list[Power]:
    """How often each arm's differences, moved so that their mean is the effect, would be found with the seeds that a verdict asks for.

    A first look takes PILOT of the study's seeds; where its verdict is not one yet, the study goes on with as many as that asks for,
    drawn from the study's with replacement. The mean over RESAMPLINGS looks.

    Raises ConfigError where an arm and the baseline have fewer than FEWEST_SEEDS seeds in common.
    """
    arms, _ = collect(study)
    if not arms:
        raise ConfigError(f"study {study!r} has no finished run yet")
    base = base_of(study, arms, baseline)
    size = effect if effect is not None else float(read_ablation(study).get("effect", EFFECT))
    losses = {arm.key: {seed: float(s[METRIC]) for seed, s in arm.summaries.items() if METRIC in s} for arm in arms}
    found = []
    for arm in (a for a in arms if a is not base):
        common = sorted(losses[arm.key].keys() & losses[base.key].keys())
        if len(common) < FEWEST_SEEDS:
            raise ConfigError(f"--power needs at least {FEWEST_SEEDS} seeds that {arm.label!r} and {base.label!r} both have: {len(common)}")
        found.append(_resampled(arm.label, np.array([losses[arm.key][s] - losses[base.key][s] for s in common]), size))
    return found


def _resampled(label: str, differences: npt.NDArray[np.float64], effect: float) -> Power:
    n, spread = len(differences), float(differences.std(ddof=1))
    noise = (differences - differences.mean()) * math.sqrt(n / (n - 1))  # drawn with replacement it spreads as the sample does
    generator = np.random.default_rng(0)
    needed, shares = [], []
    for _ in range(RESAMPLINGS):
        look = effect + generator.choice(noise, PILOT, replace=False)
        verdict = judge({"base": dict.fromkeys(range(PILOT), 0.0), "arm": dict(enumerate(look.tolist()))}, "base", effect=effect)["arm"]
        count = PILOT
        if verdict.kind == "undecided":
            count = MOST_SEEDS if verdict.more is None else PILOT + verdict.more
        needed.append(count)
        shares.append(1.0 if verdict.kind in ("better", "worse") else _share_found(noise, effect, count, generator))
    least, middle, most = (int(q) for q in np.quantile(needed, [0.05, 0.5, 0.95], method="nearest"))
    return Power(label, effect, n, spread, middle, least, most, float(np.mean(shares)))


def _share_found(noise: npt.NDArray[np.float64], effect: float, count: int, generator: np.random.Generator) -> float:
    """The share of studies with so many seeds whose paired t says that there is a difference."""
    drawn = effect + noise[generator.integers(len(noise), size=(STUDIES, count))]
    error = drawn.std(axis=1, ddof=1) / math.sqrt(count)
    return float((np.abs(drawn.mean(axis=1)) > t_quantile(0.5 + CONFIDENCE / 2, count - 1) * error).mean())


def _cells(found: Sequence[Power]) -> tuple[list[str], list[list[str]]]:
    head = ["arm", "seeds", "spread", "asked for (90 % of looks)", "found"]
    rows = []
    for p in found:
        needed = f"{p.needed:,} ({p.needed_least:,} to {p.needed_most:,})"
        rows.append([p.label, str(p.seeds), f"{p.spread:.4f}", needed, f"{p.power:.0%}"])
    mean = sum(p.power for p in found) / len(found)
    return head, [*rows, ["mean", "", "", "", f"{mean:.0%}"]] if len(found) > 1 else rows


def _title(found: Sequence[Power]) -> str:
    looks = f"first looked at with {PILOT} seeds, {RESAMPLINGS} resamplings"
    return f"power: a true difference of {found[0].effect:g}, {looks} (aim: {POWER:.0%})"


def table(found: Sequence[Power]) -> Table:
    """For a terminal."""
    return tables.table(_title(found), *_cells(found))


def markdown(found: Sequence[Power]) -> str:
    """The same in markdown, with its title above it."""
    return tables.markdown(_title(found), *_cells(found))
