"""Power by resampling: what a first look asks for is enough, and the figure would tell if it were not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gptlab.study import power, verdict
from gptlab.study.power import _resampled, _share_found, markdown
from gptlab.study.statistics import seeds_for


@pytest.mark.parametrize("effect", [0.3, 0.6, 1.2])
def test_what_a_first_look_asks_for_finds_the_effect(effect: float) -> None:
    """On average over samples of 24 seeds, each with its luck; wherever their mean is, it is moved to the effect."""
    samples = [np.random.default_rng(i).normal(5.0, 1.0, 24) for i in range(6)]
    found = [_resampled("arm", differences, effect) for differences in samples]
    assert np.mean([f.power for f in found]) >= 0.75
    assert all(f.needed_least <= f.needed <= f.needed_most for f in found)
    assert [(f.seeds, f.spread) for f in found] == [(24, pytest.approx(d.std(ddof=1))) for d in samples]


def test_a_forecast_of_too_few_seeds_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(3).normal(0.0, 1.0, 24)
    monkeypatch.setattr(verdict, "seeds_for", lambda *given: None if (n := seeds_for(*given)) is None else n // 3)
    assert _resampled("arm", differences, 0.3).power < 0.6


def test_the_share_found_is_the_power_of_the_t_test() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 4000)
    noise = (noise - noise.mean()) / noise.std()
    share = np.mean([_share_found(noise, 0.5, 34, np.random.default_rng(i)) for i in range(50)])
    shift = 0.5 * 34**0.5
    true = stats.nct.sf(stats.t.ppf(0.975, 33), 33, shift)
    assert share == pytest.approx(true, abs=0.015)


def test_arms_that_are_equal_are_found_at_once() -> None:
    found = _resampled("same", np.zeros(12), 0.01)
    assert (found.needed, found.power) == (power.PILOT, 1.0)
    assert "| same | 12 | 0.0000 | 5 (5 to 5) | 100% |" in markdown([found])
