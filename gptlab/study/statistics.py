"""Means, paired and blocked differences, their intervals, how many seeds a difference takes, and what looking repeatedly costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

CONFIDENCE = 0.95
MOST_SEEDS = 1000  # beyond which nobody trains on
LIKELY = 0.67  # the chance that the variance is below the one that is planned with: more than half, so that the power is right on average
POWER = 0.8  # with which a number of seeds is to find a difference
RESAMPLES = 10_000  # of a bootstrap
_SHARES = (np.arange(400) + 0.5) / 400  # of a distribution, by which a mean over it is taken
PATHS = 200_000  # simulated studies without a difference, whose smallest p tells what looking repeatedly costs


@dataclass(frozen=True)
class Interval:
    """A mean with the half-width of its confidence interval (None: too few values for one)."""

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class Estimate:
    """A difference of two arms over `n` common seeds: its standard error, on `df` degrees of freedom (None: no spread is known)."""

    difference: float
    error: float | None
    df: int
    n: int
    method: str

    @property
    def p(self) -> float | None:
        """Two-sided p of Student's t that there is no difference."""
        if self.error is None:
            return None
        if self.error == 0:
            return 1.0 if self.difference == 0 else 0.0
        return float(2 * special.stdtr(self.df, -abs(self.difference) / self.error))

    def interval(self, level: float = 1 - CONFIDENCE) -> Interval:
        """The interval that an error rate of `level` leaves."""
        half = None if self.error is None else t_quantile(1 - level / 2, self.df) * self.error
        return Interval(self.difference, half, self.n)

    @property
    def variance(self) -> float:
        """Of the difference in one seed."""
        return 0.0 if self.error is None else self.error**2 * self.n


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval for the mean of independent values."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n)
    return Interval(mean, t_quantile(0.5 + confidence / 2, n - 1) * deviation(values) / math.sqrt(n), n)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1)."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def t_quantile(p: float, df: float) -> float:
    """The p-quantile of Student's t with df degrees of freedom."""
    return float(special.stdtrit(df, p))


def p_at_most(values: Sequence[float], target: float) -> float | None:
    """One-sided p of Student's t that the values' true mean is above `target`; None where there are too few values to say."""
    if len(values) < 2:
        return None
    spread, below = deviation(values) / math.sqrt(len(values)), target - math.fsum(values) / len(values)
    if spread == 0:
        return None
    return float(special.stdtr(len(values) - 1, -below / spread))


def paired(arm: Mapping[int, float], base: Mapping[int, float]) -> Estimate | None:
    """The mean difference over the seeds that both have; None where there is none."""
    differences = [arm[seed] - base[seed] for seed in sorted(arm.keys() & base.keys())]
    if not differences:
        return None
    n, mean = len(differences), math.fsum(differences) / len(differences)
    return Estimate(mean, deviation(differences) / math.sqrt(n) if n > 1 else None, n - 1, n, "paired t")


def blocked(arms: Mapping[str, Mapping[int, float]], base: str) -> dict[str, Estimate]:
    """Each arm's difference from the base by the block model loss ~ arm + seed, with one residual for all of them.

    Few seeds tell little of one arm's spread, and all arms together more. Empty where no degree of freedom is left.
    """
    names = [base, *(name for name in arms if name != base)]
    if len(names) > 1 and len(arms[base]) > 1 and all(values.keys() == arms[base].keys() for values in arms.values()):
        return _blocked_whole(names, np.array([[arms[name][s] for s in sorted(arms[base])] for name in names]))
    seeds = sorted({s for values in arms.values() for s in values if sum(s in v for v in arms.values()) > 1})
    cells = [(i, j) for i, name in enumerate(names) for j, seed in enumerate(seeds) if seed in arms[name]]
    design = np.zeros((len(cells), len(names) + len(seeds)))
    for row, (i, j) in enumerate(cells):
        design[row, i] = design[row, len(names) + j] = 1.0
    values = np.array([arms[names[i]][seeds[j]] for i, j in cells])
    df = len(cells) - int(np.linalg.matrix_rank(design)) if cells else 0
    if df < 1:
        return {}
    inverse = np.linalg.pinv(design.T @ design)
    fitted = inverse @ design.T @ values
    residual = float(((values - design @ fitted) ** 2).sum()) / df
    found: dict[str, Estimate] = {}
    for i, name in enumerate(names[1:], 1):
        contrast = np.zeros(design.shape[1])
        contrast[i], contrast[0] = 1.0, -1.0
        n = len(arms[name].keys() & arms[base].keys())
        if n:
            variance = float(contrast @ inverse @ contrast) * residual
            found[name] = Estimate(float(contrast @ fitted), math.sqrt(max(variance, 0.0)), df, n, "block model")
    return found


def _blocked_whole(names: Sequence[str], table: npt.NDArray[np.float64]) -> dict[str, Estimate]:
    """The block model of a whole table (arms, seeds), the base first: what `blocked` solves for, in closed form."""
    count, n = table.shape
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    df = (count - 1) * (n - 1)
    error = math.sqrt(2 * float((residual**2).sum()) / df / n)
    means = table.mean(1)
    return {name: Estimate(float(means[i] - means[0]), error, df, n, "block model") for i, name in enumerate(names) if i}


def variance_ratio_tails(ratio: float, df_above: float, df_below: float) -> tuple[float, float]:
    """The chance of a ratio of two samples' variances at least, and at most, this large where the true ones are the same (F-test)."""
    return float(special.fdtrc(df_above, df_below, ratio)), float(special.fdtr(df_above, df_below, ratio))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm, 1979): at most one study in twenty has any false finding."""
    found: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        found[name] = largest
    return found


def bootstrap(differences: Sequence[float], level: float = 1 - CONFIDENCE, seed: int = 0) -> tuple[float, float]:
    """The bootstrap-t interval of a mean (Efron & Tibshirani, 1993, section 12.5): no shape of the differences is assumed."""
    values = np.asarray(differences)
    n, mean = len(values), float(values.mean())
    drawn = values[np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    t = (drawn.mean(axis=1)[errors > 0] - mean) / errors[errors > 0]
    if not len(t):
        return mean, mean
    low, high = np.quantile(t, [level / 2, 1 - level / 2])
    error = float(values.std(ddof=1)) / math.sqrt(n)
    return mean - float(high) * error, mean - float(low) * error


def power(effect: float, variance: float, n: int, df: int, level: float = 1 - CONFIDENCE) -> float:
    """The chance that n seeds find a true difference of `effect`, where one seed's difference has this variance."""
    if variance == 0:
        return 1.0
    critical, shift = t_quantile(1 - level / 2, df), effect / math.sqrt(variance / n)
    # The noncentral t as a mean over the spread that a sample may have: scipy's own gives NaN far out.
    spreads = critical * np.sqrt(special.chdtri(df, _SHARES) / df)
    return float((special.ndtr(shift - spreads) + special.ndtr(-shift - spreads)).mean())


def seeds_for(effect: float, variance: float, df: Callable[[int], int], level: float = 1 - CONFIDENCE) -> int | None:
    """The fewest seeds that find a difference of `effect` with a chance of POWER; None above MOST_SEEDS. `df`: of a number of seeds."""
    low, high = 2, MOST_SEEDS
    if effect <= 0 or power(effect, variance, high, df(high), level) < POWER:
        return None
    while low < high:  # more seeds never find less
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, variance, middle, df(middle), level) >= POWER else (middle + 1, high)
    return low


def variance_bounds(variance: float, df: int, confidence: float = 0.8) -> tuple[float, float, float]:
    """One that is likely, the lowest and the highest variance that a sample's on df degrees of freedom leaves open."""
    tail = (1 - confidence) / 2
    low, middle, high = (variance * df / float(special.chdtri(df, p)) for p in (tail, LIKELY, 1 - tail))
    return middle, low, high


@functools.lru_cache(maxsize=8)
def _smallest_p(looks: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """(PATHS,), sorted: the smallest p that a study without a difference shows at any of its looks."""
    generator = np.random.default_rng(0)
    found = []
    chunk = max(1, 2_000_000 // looks[-1])
    for first in range(0, PATHS, chunk):
        values = generator.standard_normal((min(chunk, PATHS - first), looks[-1]))
        sums, squares = values.cumsum(1), (values**2).cumsum(1)
        smallest = np.ones(len(values))
        for n in looks:
            total, square = sums[:, n - 1], squares[:, n - 1]
            t = total / np.sqrt(n * (square - total**2 / n) / (n - 1))
            smallest = np.minimum(smallest, 2 * special.stdtr(n - 1, -np.abs(t)))
        found.append(smallest)
    return np.sort(np.concatenate(found))


def repeated_p(p: float, looks: Sequence[int]) -> float:
    """What the smallest p so far is worth in a plan of looks at so many seeds each: the share of studies without a difference that
    show one as small at any of its looks (repeated significance tests with equal levels: Pocock, 1977, of t at each look)."""
    smallest = _smallest_p(tuple(looks))
    return (int(np.searchsorted(smallest, p, side="right")) + 1) / (len(smallest) + 1)


def repeated_level(looks: Sequence[int], level: float = 1 - CONFIDENCE) -> float:
    """The level of each look that leaves a false finding at any of them a chance of `level`."""
    smallest = _smallest_p(tuple(looks))  # sorted
    return float(smallest[int(level * len(smallest))])
