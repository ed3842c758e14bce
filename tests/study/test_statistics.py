"""Intervals against published tables."""

from __future__ import annotations

import pytest

from gptlab.study.statistics import mean_interval, p_at_most, t_quantile


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


def test_an_interval_is_mean_and_t_times_the_standard_error() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert not mean_interval([-1.0, 1.0]).excludes_zero
    assert mean_interval([1.0, 1.1, 0.9]).excludes_zero
    assert mean_interval([1.0]).half is None


def test_the_one_sided_p_of_a_mean_above_a_target() -> None:
    values = [1.0, 2.0, 3.0]  # mean 2, standard error 1/sqrt(3)
    se = 3**-0.5
    assert p_at_most(values, 2 + 2.9200 * se) == pytest.approx(0.05, abs=1e-4)  # the 0.95 quantile of t with 2 degrees of freedom
    assert p_at_most(values, 2 - 2.9200 * se) == pytest.approx(0.95, abs=1e-4)
    assert p_at_most(values, 2.0) == pytest.approx(0.5)
    assert p_at_most([1.0], 2.0) is None
    assert p_at_most([1.0, 1.0], 2.0) is None
