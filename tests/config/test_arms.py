"""Arms: what a design expands to, how they are called, and what is refused."""

from __future__ import annotations

import pytest

from gptlab.config.arms import axis, expand, named, with_overrides
from gptlab.config.errors import ConfigError
from gptlab.config.sweep import sweep
from tests.tiny import tiny

VARY = {"model/norm": ["layernorm", "rmsnorm"], "model.width": ["16", "32", "48"]}


def test_a_grid_is_every_combination_the_first_of_each_axis_the_baseline() -> None:
    made = expand(VARY, {"muon": ["optimizer=muon"]})
    assert [a.label for a in made][:3] == ["layernorm width=16", "layernorm width=32", "layernorm width=48"]
    assert len(made) == 7
    assert made[5].overrides == ("model/norm=rmsnorm", "model.width=48")
    assert made[6].overrides == ("model/norm=layernorm", "model.width=16", "optimizer=muon")


def test_single_changes_one_thing_at_a_time() -> None:
    made = expand(VARY, {"muon": ["optimizer=muon"]}, "single")
    assert [a.label for a in made] == ["base", "rmsnorm", "width=32", "width=48", "muon"]
    assert set(made[2].overrides) == {"model/norm=layernorm", "model.width=32"}


def test_a_ladder_adds_each_change_to_those_before() -> None:
    made = expand({"model/norm": ["layernorm", "rmsnorm"], "model/position": ["learned", "rotary"]}, {"muon": ["optimizer=muon"]}, "ladder")
    assert [a.label for a in made] == ["base", "+ rmsnorm", "+ rotary", "+ muon"]
    assert set(made[3].overrides) == {"model/norm=rmsnorm", "model/position=rotary", "optimizer=muon"}


def test_a_later_override_takes_the_place_of_an_earlier_one() -> None:
    assert with_overrides(["a=1", "+b=2", "c=3"], ["b=4"]) == ("a=1", "c=3", "b=4")


def test_axes_and_arms_are_read_in_hydras_and_the_shells_grammar() -> None:
    assert axis("seeds.data=range(0,3)") == ("seeds.data", ["0", "1", "2"])
    assert axis("a.b='x,y',z")[1] == ["'x,y'", "z"]
    assert named("modern=model/norm=rmsnorm optimizer=muon") == ("modern", ["model/norm=rmsnorm", "optimizer=muon"])
    assert named("words=a.b='two words'")[1] == ["a.b=two words"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: axis("model/norm"), "has no values"),
        (lambda: axis("model/norm=rmsnorm"), "has one value"),
        (lambda: axis("model/norm=rmsnorm,rmsnorm"), "gives rmsnorm twice"),
        (lambda: axis("model.width=interval(1,2)"), "takes values one by one"),
        (lambda: named("model/norm=rmsnorm"), "give NAME="),
        (lambda: named("modern=rmsnorm"), "'rmsnorm' is no override"),
        (lambda: named("modern='"), "cannot be split"),
        (lambda: expand(VARY, {}, "latter"), r"--design latter is not one of grid, single, ladder \(did you mean ladder\?\)"),
        (lambda: expand({}, {}), "nothing is varied"),
        (lambda: expand({"a": ["1", "2"]}, {"a=2": ["b=1"]}), "two arms are called 'a=2'"),
    ],
)
def test_what_makes_no_arms_is_refused(made, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=said):
        made()


def test_the_sweeper_crosses_arms_and_seeds_seed_by_seed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    overrides = [*tiny(tmp_path), "hydra/sweeper=arms", "++hydra.sweeper.vary={model/norm: 'layernorm,rmsnorm'}", "hydra.sweeper.seeds=2"]
    found = sweep(overrides, multirun=True)
    assert found.points is not None
    assert [p.chosen for p in found.points] == [
        ["model/norm=layernorm", "seed=0"],
        ["model/norm=rmsnorm", "seed=0"],
        ["model/norm=layernorm", "seed=1"],
        ["model/norm=rmsnorm", "seed=1"],
    ]
    assert "arm='rmsnorm'" in found.points[1].overrides
    more = sweep([*overrides, "seed=4,7,9", "model.depth=1,2"], multirun=True)
    assert more.study is not None
    assert more.study.seeds == [4, 7, 9]
    assert len(more.study.arms) == 4, "a list on the command line is one more axis"


def test_a_plain_sweep_of_an_experiment_can_be_ablated() -> None:
    found = sweep(["experiment=norm", "hydra/sweeper=arms", "hydra.sweeper.seeds=2"], multirun=True)
    assert found.study is not None
    assert [a.label for a in found.study.arms] == ["layernorm", "rmsnorm", "none"]
    assert found.study.seeds == [0, 1]
    assert sweep(["experiment=norm", "hydra/sweeper=arms"], multirun=True).study.seeds == [0, 1, 2, 3, 4]  # type: ignore[union-attr]
    assert found.name == "norm"
    with pytest.raises(ConfigError, match=r"--baseline 'rmsnrm' is not an arm \(did you mean rmsnorm\?\)"):
        sweep(["experiment=norm", "hydra/sweeper=arms", "hydra.sweeper.baseline=rmsnrm"], multirun=True)
