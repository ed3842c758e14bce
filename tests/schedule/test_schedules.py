"""Schedules: what the rate is at the places that matter."""

import math
from itertools import pairwise

import pytest

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, components, load_components
from gptlab.schedule.protocol import Schedule

load_components()
TOTAL, WARMUP = 1000, 50


def schedule(name: str, **options: float) -> Schedule:
    return build(component("schedule", name).options(**options))


def nanogpt(step: int, warmup: int, total: int, least: float) -> float:
    """nanoGPT's rule, for a learning rate of 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step > total:
        return least
    return least + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * (1 - least)


@pytest.mark.parametrize(("warmup", "least"), [(0, 0.1), (1, 0.0), (100, 0.1), (2000, 1 / 6)])
def test_cosine_is_nanogpts(warmup: int, least: float) -> None:
    factor = schedule("cosine", warmup=warmup, final=least)
    for step in range(5010):
        assert factor(step, 5000) == pytest.approx(nanogpt(step, warmup, 5000, least), abs=1e-12)


@pytest.mark.parametrize("name", [c.name for c in components("schedule")])
def test_the_full_rate_is_reached_when_the_warm_up_ends(name: str) -> None:
    factor = schedule(name, warmup=WARMUP)
    values = [factor(step, TOTAL) for step in range(WARMUP + 1)]
    assert values[0] == pytest.approx(1 / (WARMUP + 1))
    assert values[WARMUP] == 1.0
    assert all(b - a == pytest.approx(1 / (WARMUP + 1)) for a, b in pairwise(values))


@pytest.mark.parametrize("name", [c.name for c in components("schedule")])
def test_without_warm_up_the_first_step_has_the_full_rate(name: str) -> None:
    assert schedule(name, warmup=0)(0, TOTAL) == 1.0


@pytest.mark.parametrize("name", [c.name for c in components("schedule")])
def test_the_rate_never_rises_after_the_warm_up(name: str) -> None:
    factor = schedule(name, warmup=WARMUP)
    assert all(a >= b for a, b in pairwise(factor(step, TOTAL) for step in range(WARMUP, TOTAL + 20)))


def test_inverse_sqrt_halves_when_the_steps_are_four_times_the_warm_ups() -> None:
    factor = schedule("inverse_sqrt", warmup=99)
    assert factor(399, TOTAL) == pytest.approx(0.5)
    assert factor(399, TOTAL) == factor(399, 100 * TOTAL), "it does not know where the run ends"


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.1), ("linear", 0.0), ("wsd", 0.0), ("constant", 1.0)])
def test_the_rate_at_the_end_and_beyond(name: str, end: float) -> None:
    factor = schedule(name)
    assert factor(TOTAL, TOTAL) == pytest.approx(end, abs=1e-12)
    assert factor(3 * TOTAL, TOTAL) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_final_is_the_share_that_is_left(name: str) -> None:
    assert schedule(name, final=0.25)(TOTAL, TOTAL) == pytest.approx(0.25)


def test_linear_is_half_way_at_half_time() -> None:
    assert schedule("linear", warmup=200)(600, 1000) == pytest.approx(0.5)


def test_wsd_is_flat_until_its_decay() -> None:
    factor = schedule("wsd", warmup=WARMUP, decay=0.2)
    assert {factor(step, TOTAL) for step in range(WARMUP, 801)} == {1.0}
    assert factor(900, TOTAL) == pytest.approx(0.5)


def test_wsd_decays_after_a_warm_up_that_reaches_into_its_decay() -> None:
    factor = schedule("wsd", warmup=900, decay=0.5)
    assert factor(900, TOTAL) == 1.0
    assert factor(950, TOTAL) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("cosine", {"warmup": -1}, "schedule.warmup=-1"),
        ("cosine", {"final": 1.5}, "schedule.final=1.5"),
        ("linear", {"final": -0.1}, "schedule.final=-0.1"),
        ("wsd", {"decay": 2.0}, "schedule.decay=2.0"),
        ("constant", {"warmup": -5}, "schedule.warmup=-5"),
    ],
)
def test_an_impossible_schedule_is_refused(name: str, options: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        schedule(name, **options)
