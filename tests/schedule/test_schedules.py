"""Schedules: what the rate is at the places that matter."""

import math
from itertools import pairwise

import pytest

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, components, load_components
from gptlab.schedule.protocol import Schedule

load_components()
TOTAL, WARMUP = 1000, 50
NAMES = [c.name for c in components("schedule") if hasattr(c.options(), "warmup")]


def schedule(name: str, **options: float) -> Schedule:
    """A schedule of a run whose length is not known beforehand."""
    return build(component("schedule", name).options(**options), batch_tokens=768, steps=None, start=0)


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


@pytest.mark.parametrize("name", NAMES)
def test_the_full_rate_is_reached_when_the_warm_up_ends(name: str) -> None:
    factor = schedule(name, warmup=WARMUP)
    values = [factor(step, TOTAL) for step in range(WARMUP + 1)]
    assert values[0] == pytest.approx(1 / (WARMUP + 1))
    assert values[WARMUP] == 1.0
    assert all(b - a == pytest.approx(1 / (WARMUP + 1)) for a, b in pairwise(values))


@pytest.mark.parametrize("name", NAMES)
def test_without_warm_up_the_first_step_has_the_full_rate(name: str) -> None:
    assert schedule(name, warmup=0)(0, TOTAL) == 1.0


@pytest.mark.parametrize("name", NAMES)
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
    factor = schedule("wsd", warmup=400, decay=0.8)
    assert factor(400, TOTAL) == 1.0
    assert factor(700, TOTAL) == pytest.approx(0.5)


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


def known(name: str, steps: int | None, **options: float | str) -> Schedule:
    """A schedule of a run whose length is known, with 64 tokens a step."""
    return build(component("schedule", name).options(**options), batch_tokens=64, steps=steps, start=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["100steps", "6400tokens", "6.36ktokens", "10%", "100"])
def test_a_warm_up_in_any_unit_is_that_many_steps(name: str, text: str) -> None:
    one, other = known(name, 1000, warmup=100), known(name, 1000, warmup=text)
    assert [one(step, 1000) for step in range(1000)] == [other(step, 1000) for step in range(1000)]


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_that_nobody_chose_is_a_hundred_steps_and_half_of_a_shorter_run(name: str) -> None:
    for steps, length in ((1, 0), (12, 6), (150, 75), (200, 100), (5000, 100), (None, 100)):
        total = steps or 5000
        auto, chosen = known(name, steps), known(name, steps, warmup=length)
        assert [auto(step, total) for step in range(length + 1)] == [chosen(step, total) for step in range(length + 1)], steps


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_longer_than_the_run_is_refused_and_one_as_long_is_not(name: str) -> None:
    if name != "wsd":
        known(name, 50, warmup=50)
        known(name, 50, warmup="3200tokens")
    for text, told in ((51, "51"), ("2Mtokens", r"2Mtokens \(31,250 steps\)"), ("51steps", "51steps")):
        refused = rf"^schedule\.warmup={told} .*exceeds? the run's 50 steps; a warm-up of at most \d+ steps fits$"
        with pytest.raises(ConfigError, match=refused):
            known(name, 50, warmup=text)


def test_wsds_phases_together_must_fit_the_run() -> None:
    known("wsd", 1000, warmup=800, decay=0.2)
    with pytest.raises(ConfigError, match=r"warmup=801 and schedule\.decay=0\.2 \(200 steps\) exceed the run's 1,000 steps; .* 800 "):
        known("wsd", 1000, warmup=801, decay=0.2)
    assert known("wsd", 1000, decay=1.0)(100, 1000) == 1.0, "one that nobody chose delays the decay, as it always has"


@pytest.mark.parametrize("text", ["", "2.5steps", "10min", "3epochs", "-5steps", "0steps", "+5steps", "2 %%", "steps", "1e99flops"])
def test_what_is_no_length_of_a_warm_up_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no length of a warm-up: auto, 100, 100steps, 2Mtokens or 2%$"):
        known("cosine", 50, warmup=text)


def test_a_share_needs_a_run_whose_steps_are_known() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup=2%: the steps of a run that ends by the clock are not known"):
        known("cosine", None, warmup="2%")
    with pytest.raises(ConfigError, match=r"schedule\.warmup=101% is more than the run"):
        known("cosine", 50, warmup="101%")


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_run_that_the_clock_ends_within_its_warm_up_still_cools_down(name: str) -> None:
    factor = known(name, None, warmup=1000, final=0.0)
    values = [factor(step, 400) for step in range(400)]
    peak = values.index(max(values))
    assert 200 <= peak < 390
    assert all(value <= (step + 1) / 1001 for step, value in enumerate(values)), "it never rises faster than it was asked to"
    assert values[-1] < 0.02
