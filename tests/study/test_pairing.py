"""What pairing gains: the ratio of two spreads, from the readings of real runs, with an interval that holds what it should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptlab.study.pairing import Gain, gain, text
from gptlab.study.statistics import deviation


def test_the_ratio_is_that_of_the_two_spreads() -> None:
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 1, 12)
    arm, base = ((shared + generator.normal(0, 0.5, 12)).tolist() for _ in range(2))
    ratio, low, high = gain(arm, base)
    unpaired = math.sqrt(deviation(arm) ** 2 + deviation(base) ** 2)
    assert ratio == pytest.approx(unpaired / deviation([a - b for a, b in zip(arm, base, strict=True)]))
    assert low < ratio < high


def test_arms_that_are_equal_in_every_seed_gain_without_bound() -> None:
    assert gain([1.0, 2.0, 3.0, 4.5], [1.0, 2.0, 3.0, 4.5]) == (math.inf, math.inf, math.inf)
    ratio, low, _ = gain([1.0, 2.0, 3.0, 4.5], [4.5, 3.0, 2.0, 1.0])
    assert low < ratio < 1, "seeds that pull apart: pairing costs"


def test_nineteen_intervals_in_twenty_hold_the_true_ratio() -> None:
    generator = np.random.default_rng(1)
    correlation, n = 0.8, 12
    true = 1 / math.sqrt(1 - correlation)
    pairs = generator.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], size=(2000, n))
    intervals = [gain(pair[:, 0].tolist(), pair[:, 1].tolist()) for pair in pairs]
    assert 0.93 < np.mean([low <= true <= high for _, low, high in intervals]) < 0.97


def test_a_ratio_that_is_rounding_is_told_as_large() -> None:
    assert text(Gain("nudged", 50, 12, 4e5, 2e5, 7e5)) == "over 1,000"
    assert text(Gain("rmsnorm", 50, 12, 10.24, 5.4, 19.1)) == "10.2 (5.4 to 19.1)"
