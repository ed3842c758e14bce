"""Verdicts are right as often as they say: on simulated studies, whose truth is known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from gptlab.study import statistics
from gptlab.study.statistics import (
    blocked,
    bootstrap,
    holm,
    mean_interval,
    paired,
    power,
    repeated_level,
    repeated_p,
    seeds_for,
    variance_bounds,
)
from gptlab.study.verdict import judge

Study = dict[str, dict[int, float]]
FALSE = ("better", "worse")
LOOKS = (4, 6, 9, 13, 20)


def study(generator: np.random.Generator, arms: int, seeds: int, *, spread: Sequence[float] = (1.0,), effect: float = 0.0) -> Study:
    """Losses of arms "0", "1", … on common seeds, whose own effect is larger than the arms' spread; the last arm is `effect` away."""
    common = generator.normal(0, 2, seeds)
    made: Study = {}
    for i in range(arms):
        own = generator.normal(0, spread[i % len(spread)], seeds) + (effect if i == arms - 1 else 0.0)
        made[str(i)] = dict(enumerate((common + own).tolist()))
    return made


def until(made: Study, n: int) -> Study:
    return {name: {s: v for s, v in losses.items() if s < n} for name, losses in made.items()}


def false_rate(arms: int, seeds: int, count: int = 2000, **options: object) -> float:
    generator = np.random.default_rng(7)
    studies = (study(generator, arms, seeds, **options) for _ in range(count))  # type: ignore[arg-type]
    return sum(any(v.kind in FALSE for v in judge(made, "0").values()) for made in studies) / count


@pytest.fixture
def decisions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what decides nothing and takes its time: thousands of studies are judged."""
    monkeypatch.setattr("gptlab.study.verdict.bootstrap", lambda differences: (0.0, 0.0))
    monkeypatch.setattr("gptlab.study.verdict.seeds_for", lambda *_: None)


def test_the_block_model_of_two_arms_is_the_paired_t() -> None:
    made = study(np.random.default_rng(0), 2, 5)
    one, two = paired(made["1"], made["0"]), blocked(made, "0")["1"]
    assert one is not None
    assert (two.difference, two.error, two.df) == pytest.approx((one.difference, one.error, one.df))
    assert one.p == pytest.approx(stats.ttest_rel(list(made["1"].values()), list(made["0"].values())).pvalue)


def test_the_block_model_pools_the_residual_of_all_arms() -> None:
    made = study(np.random.default_rng(1), 4, 3)
    table = np.array([list(losses.values()) for losses in made.values()])  # arms x seeds
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    variance = (residual**2).sum() / 6  # (4 - 1)(3 - 1) degrees of freedom
    found = blocked(made, "0")["2"]
    assert found.df == 6
    assert found.difference == pytest.approx(table[2].mean() - table[0].mean())
    assert found.error == pytest.approx((2 * variance / 3) ** 0.5)


def test_a_missing_run_costs_its_cell_alone() -> None:
    made = study(np.random.default_rng(2), 3, 5)
    del made["1"][3]
    found = blocked(made, "0")
    assert (found["1"].n, found["2"].n) == (4, 5)
    assert found["1"].df == 14 - 3 - 4
    lone = {"0": {0: 1.0}, "1": {1: 2.0}}
    assert blocked(lone, "0") == {}
    assert paired(lone["1"], lone["0"]) is None


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (2, 5), (2, 8), (4, 5), (4, 8)])
def test_arms_without_a_difference_are_called_different_in_one_study_of_twenty(arms: int, seeds: int, decisions_alone: None) -> None:
    assert 0.04 <= false_rate(arms, seeds) <= 0.06


def test_an_arm_that_spreads_more_than_the_others_is_judged_by_its_own_spread(
    monkeypatch: pytest.MonkeyPatch, decisions_alone: None
) -> None:
    wide = (1.0, 1.0, 1.0, 8.0)
    careful = false_rate(4, 5, 500, spread=wide)
    monkeypatch.setattr("gptlab.study.verdict.WIDER", 1e-300)  # never left out
    assert careful <= 0.1 < false_rate(4, 5, 500, spread=wide)
    monkeypatch.undo()
    generator = np.random.default_rng(3)
    made = {name: {s: v * 1e-3 for s, v in losses.items()} for name, losses in study(generator, 4, 5, spread=(1, 1, 1, 40)).items()}
    alone = judge({n: made[n] for n in ("0", "1", "2")}, "0")
    assert judge(made, "0")["1"].interval == alone["1"].interval, "the noisy arm widened the others' intervals"


def test_two_kernels_are_the_same_beside_arms_that_are_not() -> None:
    made = study(np.random.default_rng(4), 3, 5)
    made["same"] = {s: v + 1e-9 * s for s, v in made["0"].items()}
    found = judge(made, "0")["same"]
    assert found.kind == "same"
    assert found.bound is not None
    assert found.bound < 1e-6
    assert judge({"0": {0: 1.0, 1: 2.0}, "twin": {0: 1.0, 1: 2.0}}, "0")["twin"].sentence == "no difference beyond ± 0.0000"


def test_looking_again_and_again_keeps_its_error_rate_and_would_not_without_correction(decisions_alone: None) -> None:
    generator, count, found, naive = np.random.default_rng(11), 2000, 0, 0
    for _ in range(count):
        made = study(generator, 2, LOOKS[-1])
        parts = [until(made, n) for n in LOOKS]
        found += any(judge(part, "0", looks=LOOKS)["1"].kind in FALSE for part in parts)
        naive += any(judge(part, "0")["1"].kind in FALSE for part in parts)
    assert 0.04 <= found / count <= 0.06
    assert naive / count > 0.12


def test_a_later_look_remembers_what_an_earlier_one_decided() -> None:
    base = dict.fromkeys(range(6), 0.0)
    clear = {0: 1.0, 1: 1.01, 2: 1.02, 3: 1.0}
    at_first = judge({"b": until({"b": base}, 4)["b"], "a": clear}, "b", looks=(4, 6))["a"]
    later = judge({"b": base, "a": clear | {4: -3.0, 5: 3.0}}, "b", looks=(4, 6))["a"]
    assert at_first.kind == "worse"
    assert later.p is not None
    assert later.p <= at_first.p if at_first.p is not None else False
    between = judge({"b": base, "a": clear | {4: -3.0}}, "b", looks=(4, 6))["a"]
    assert between == at_first, "five seeds are no look of this plan"
    assert judge({"b": {0: 0.0}, "a": {0: 1.0}}, "b", looks=(4, 6))["a"].kind == "none"


def test_a_plan_of_one_look_is_no_correction() -> None:
    assert repeated_level([8]) == pytest.approx(0.05, abs=0.002)
    assert repeated_p(0.01, [8]) == pytest.approx(0.01, abs=0.001)
    # Pocock's constant for five looks at equal distances and known variance is 0.0158
    assert repeated_level([20, 40, 60, 80, 100]) == pytest.approx(0.0158, abs=0.0015)


def test_holm_is_the_step_down_of_bonferroni() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({}) == {}


def test_power_and_the_seeds_for_it_are_those_of_the_tables() -> None:
    assert power(0.5, 1.0, 34, 33) == pytest.approx(0.8078, abs=1e-3)  # Cohen's d of 0.5: 34 pairs for 80 %
    assert seeds_for(0.5, 1.0, lambda n: n - 1) == 34
    assert seeds_for(0.0, 1.0, lambda n: n - 1) is None
    assert seeds_for(1e-6, 1.0, lambda n: n - 1) is None
    for variance in (1e-9, 1e-3, 1.0, 50.0):  # more seeds never find less, however clear the effect
        found = [power(0.1, variance, n, n - 1) for n in range(2, 200)]
        assert all(0 <= a <= b + 2e-3 for a, b in itertools.pairwise(found))
        assert max(found) <= 1
    low, high = (seeds_for(0.01, v, lambda n: n - 1) for v in (1.5e-5, 9e-5))
    assert low is not None
    assert high is not None
    assert low < high


def test_the_predicted_number_of_seeds_finds_the_effect_it_was_predicted_for() -> None:
    """A pilot of five seeds, and the power that its prediction has in truth: three quarters of the studies at least."""
    generator, effect, reached = np.random.default_rng(5), 0.5, []
    for _ in range(3000):
        differences = generator.normal(0.0, 1.0, 5)
        middle, low, high = variance_bounds(float(differences.var(ddof=1)), 4)
        assert low < middle < high
        n = seeds_for(effect, middle, lambda n: n - 1) or statistics.MOST_SEEDS
        reached.append(power(effect, 1.0, n, n - 1))
    assert np.mean(reached) >= 0.75


def test_the_bootstrap_covers_the_mean_of_a_lopsided_sample() -> None:
    generator = np.random.default_rng(6)
    covered = 0
    for i in range(200):
        low, high = bootstrap(generator.exponential(1.0, 12).tolist(), seed=i)
        covered += low <= 1.0 <= high
    assert covered / 200 >= 0.9  # Student's t covers less here
    assert bootstrap([0.5] * 12) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("effect", "kind", "said"),
    [
        (-3.0, "better", "better by "),
        (3.0, "worse", "worse by "),
    ],
)
def test_a_clear_difference_is_better_or_worse(effect: float, kind: str, said: str) -> None:
    made = study(np.random.default_rng(1), 3, 8, spread=(0.5,), effect=effect)
    found = judge(made, "0")
    assert found["2"].kind == kind
    assert found["2"].sentence.startswith(said)
    assert found["2"].method == "paired t"
    assert found["1"].kind == "undecided"


def test_a_small_difference_is_no_difference_where_the_interval_says_so() -> None:
    made = study(np.random.default_rng(9), 2, 12, spread=(0.01,))
    quiet = judge(made, "0", effect=0.1)["1"]
    assert quiet.kind == "same"
    assert quiet.bound is not None
    assert quiet.bound <= 0.1
    assert quiet.sentence.startswith("no difference beyond ± ")
    assert judge(made, "0", effect=1e-4)["1"].kind == "undecided"


def test_undecided_says_how_many_more_seeds_and_one_seed_says_nothing() -> None:
    made = study(np.random.default_rng(2), 2, 5)
    found = judge(made, "0", effect=0.5)["1"]
    assert found.kind == "undecided"
    assert found.more is not None
    assert found.more_least is not None
    assert found.more_least <= found.more <= (found.more_most or found.more)
    assert f"about {found.more:,} more seed" in found.sentence
    flat = {name: {s: v - np.mean(list(losses.values())) for s, v in losses.items()} for name, losses in made.items()}
    assert "takes over 1,000 more seeds" in judge(flat, "0", effect=1e-4)["1"].sentence
    one = judge(until(made, 1), "0")["1"]
    assert (one.kind, one.p) == ("none", None)
    assert "one seed: no verdict" in one.sentence
    assert judge({"0": {0: 1.0}, "1": {1: 1.0}}, "0")["1"].sentence == "no seed in common with the baseline"


def test_a_difference_that_holds_alone_but_not_among_many_arms_says_both() -> None:
    generator = np.random.default_rng(12)
    for _ in range(300):
        made = study(generator, 6, 8, spread=(1.0,), effect=1.2)
        found = judge(made, "0")["5"]
        if found.p is not None and found.p_holm is not None and found.p < 0.05 <= found.p_holm:
            assert found.kind == "undecided"
            assert "alone" in found.sentence
            return
    pytest.fail("no such study in 300")


def test_an_interval_of_means_is_unchanged() -> None:
    assert mean_interval([1.0, 2.0, 3.0]).half == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
