"""Intervals against published tables."""

from __future__ import annotations

import pytest

from gptlab.study.statistics import deviation, mean_interval, p_at_most, seeds_to_settle, t_distribution, t_quantile


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.975, 4, 2.7764),
        (0.975, 10, 2.2281),
        (0.95, 7, 1.8946),
        (0.995, 30, 2.75),
    ],
)
def test_t_quantiles_are_those_of_the_tables(p: float, df: int, expected: float) -> None:
    assert t_quantile(p, df) == pytest.approx(expected, abs=5e-5)


def test_the_distribution_rises_from_a_half_to_one() -> None:
    for df in (1, 2, 3, 8, 9):
        assert t_distribution(0.0, df) == pytest.approx(0.5)
        assert t_distribution(1e6, df) == pytest.approx(1.0, abs=1e-5)


def test_an_interval_is_mean_and_t_times_the_standard_error() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert not mean_interval([-1.0, 1.0]).excludes_zero
    assert mean_interval([1.0, 1.1, 0.9]).excludes_zero
    assert mean_interval([1.0]).half is None


def test_the_number_of_seeds_that_would_settle_it_settles_it() -> None:
    differences = [0.03, -0.01, 0.02]
    n = seeds_to_settle(differences)
    assert n is not None
    mean, spread = sum(differences) / 3, deviation(differences)
    assert t_quantile(0.975, n - 1) * spread / n**0.5 < mean
    assert t_quantile(0.975, n - 2) * spread / (n - 1) ** 0.5 >= mean
    assert seeds_to_settle([0.0, 0.0]) is None
    assert seeds_to_settle([0.1]) is None


def test_the_one_sided_p_of_a_mean_above_a_target() -> None:
    values = [1.0, 2.0, 3.0]  # mean 2, standard error 1/sqrt(3)
    se = 3**-0.5
    assert p_at_most(values, 2 + 2.9200 * se) == pytest.approx(0.05, abs=1e-4)  # the 0.95 quantile of t with 2 degrees of freedom
    assert p_at_most(values, 2 - 2.9200 * se) == pytest.approx(0.95, abs=1e-4)
    assert p_at_most(values, 2.0) == pytest.approx(0.5)
    assert p_at_most([1.0], 2.0) is None
    assert p_at_most([1.0, 1.0], 2.0) is None
