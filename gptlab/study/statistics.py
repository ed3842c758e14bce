"""Means, paired differences and their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean with the half-width of its confidence interval (None: too few values for one)."""

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def mean_interval(values: list[float], confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent values."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n)
    return Interval(mean, t_quantile(0.5 + confidence / 2, n - 1) * deviation(values) / math.sqrt(n), n)


def deviation(values: list[float]) -> float:
    """Sample standard deviation (n - 1)."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def t_quantile(p: float, df: int) -> float:
    """The p-quantile of Student's t with df degrees of freedom, by bisection of its distribution."""
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_distribution(t: float, df: int) -> float:
    """P(T <= t) for t >= 0: closed form in the angle (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, cosine) if df % 2 else (1.0, 1.0)
    for k in range(2 + df % 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if df == 1:
        within = 2 * angle / math.pi
    elif df % 2:
        within = 2 / math.pi * (angle + sine * total)
    else:
        within = sine * total
    return 0.5 + within / 2


def p_at_most(values: list[float], target: float) -> float | None:
    """One-sided p of Student's t that the values' true mean is above `target`; None where there are too few values to say."""
    if len(values) < 2:
        return None
    spread, below = deviation(values) / math.sqrt(len(values)), target - math.fsum(values) / len(values)
    if spread == 0:
        return None
    tail = 1 - t_distribution(abs(below) / spread, len(values) - 1)
    return tail if below >= 0 else 1 - tail


def seeds_to_settle(differences: list[float]) -> int | None:
    """How many paired seeds would make this mean difference's 95 % interval leave out zero; None if not under 1,000."""
    if len(differences) < 2:
        return None
    mean, spread = abs(math.fsum(differences) / len(differences)), deviation(differences)
    if mean == 0:
        return None
    for n in range(2, 1000):
        if t_quantile(0.975, n - 1) * spread / math.sqrt(n) < mean:
            return n
    return None
