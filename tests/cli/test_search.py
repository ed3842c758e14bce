"""Searches over settings: what optuna and halving launch, what they say, how they go on, and what they refuse."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import sqlite3
import time
from pathlib import Path

import optuna
import pytest

from gptlab.config.halving import HISTORY, HalvingConfig, ladder_of
from gptlab.config.search import STORAGE, OptunaConfig, found_trials, space_of
from gptlab.runner.run import all_runs, members
from tests.cli.conftest import Command, finish, start
from tests.tiny import tiny

RATE = "optimizer.learning_rate=tag(log,interval(1e-4,1e-1))"
OPTUNA = ("train", "-m", "hydra/sweeper=optuna", "study=rates")
HALVING = ("train", "-m", "hydra/sweeper=halving", "study=wide")


def test_a_search_begins_with_the_settings_as_configured_and_tells_what_it_found(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab(*OPTUNA, "hydra.sweeper.trials=4", *tiny(corpus_file), RATE, "model/norm=layernorm,rmsnorm")
    assert result.code == 0, result.err
    assert "4 runs: 4 trained, 0 skipped, 0 failed" in result.out
    trials = found_trials("rates")
    assert trials[0].params == {"optimizer.learning_rate": 0.001, "model/norm": "layernorm"}
    assert len({t.params["optimizer.learning_rate"] for t in trials}) == 4
    best = min(trials, key=lambda t: t.value)
    table = result.out[result.out.index("4 trials by val/loss") :].splitlines()
    shown = [
        line.split()[-1] for line in table if re.search(r"\b(layernorm|rmsnorm)\b", line) and "val" not in line and "ablate" not in line
    ]
    assert shown[0] == f"{best.value:.4f}" == min(shown)
    assert "(as configured)" in result.out
    assert f"optimizer.learning_rate={best.params['optimizer.learning_rate']:.6g}" in result.out
    runs = {run.config().optimizer.learning_rate for run in all_runs()}  # type: ignore[attr-defined]
    assert len(runs) == 4


def test_what_beat_nothing_is_not_recommended(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab(*OPTUNA, "hydra.sweeper.trials=2", *tiny(corpus_file), "optimizer.learning_rate=choice(1e-3,1e-9)")
    assert "nothing beat the settings as configured" in result.out
    assert "gptlab ablate" not in result.out


def test_a_search_goes_on_where_it_was_left(gptlab: Command, corpus_file: Path) -> None:
    gptlab(*OPTUNA, "hydra.sweeper.trials=2", *tiny(corpus_file), RATE)
    more = gptlab(*OPTUNA, "hydra.sweeper.trials=5", *tiny(corpus_file), RATE)
    assert "3 runs: 3 trained" in more.out
    assert len({t.params["optimizer.learning_rate"] for t in found_trials("rates")}) == 5  # no draw is made twice
    again = gptlab(*OPTUNA, "hydra.sweeper.trials=5", *tiny(corpus_file), RATE)
    assert again.code == 0
    assert "0 runs" in again.out
    assert "5 trials by val/loss" in again.out


@pytest.mark.slow
def test_a_search_that_was_killed_tries_what_was_under_way_again(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    long = [*tiny(corpus_file, steps=4000), "trainer.log_every=50", "hydra.sweeper.first=false", RATE]
    process = start(*OPTUNA, "hydra.sweeper.trials=2", *long, folder=tmp_path, GPTLAB_RUNS=os.environ["GPTLAB_RUNS"])
    deadline = time.monotonic() + 90
    while not any(run.metrics() for run in all_runs()):
        assert time.monotonic() < deadline, "no run began"
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    result = gptlab(*OPTUNA, "hydra.sweeper.trials=2", *long)
    assert result.code == 0, result.err
    assert "2 runs: 2 trained" in result.out
    assert len(all_runs()) == 2  # the run that was killed went on


def test_a_trial_is_given_up_by_its_curve_and_its_run_can_go_on(gptlab: Command, corpus_file: Path) -> None:
    own = [*tiny(corpus_file, steps=24), "callbacks.evaluation.every=4"]
    gptlab(*OPTUNA, "hydra.sweeper.trials=1", *own, RATE)
    study = optuna.load_study(study_name="rates", storage=f"sqlite:///{Path(os.environ['GPTLAB_RUNS']).absolute() / 'rates' / STORAGE}")
    known = found_trials("rates")[0]
    for _ in range(5):  # far better than anything that comes
        curve = dict.fromkeys(range(4, 24, 4), 0.1)
        study.add_trial(optuna.create_trial(params=known.params, distributions=known.distributions, value=0.1, intermediate_values=curve))
    result = gptlab(*OPTUNA, "hydra.sweeper.trials=7", "hydra.sweeper.pruner=median", *own, RATE)
    assert result.code == 0, result.err
    assert "1 runs: 0 trained, 0 skipped, 1 given up, 0 failed" in result.out
    assert "given up by their curves: 6 at step 4" in result.out
    trial = found_trials("rates")[6]
    assert (trial.state.name, list(trial.intermediate_values)) == ("PRUNED", [4])
    more = gptlab("train", *own, f"optimizer.learning_rate={trial.params['optimizer.learning_rate']:.6g}", "study=rates")
    assert "resumed at step 4" in more.out


@pytest.mark.slow
def test_trials_run_side_by_side_under_joblib(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    command = [*OPTUNA, "hydra.sweeper.trials=4", "hydra.sweeper.side_by_side=2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = finish(start(*command, *tiny(corpus_file), RATE, folder=tmp_path, GPTLAB_RUNS=os.environ["GPTLAB_RUNS"]))
    assert done.code == 0, done.err
    assert "4 runs: 4 trained" in done.out
    assert [t.state.name for t in found_trials("rates")] == ["COMPLETE"] * 4


def test_halving_keeps_the_better_settings_for_longer(gptlab: Command, corpus_file: Path) -> None:
    own = tiny(corpus_file, steps=18)
    asked = [*HALVING, *own, "optimizer.learning_rate=1e-6,1e-2,2e-2", "model/norm=layernorm,rmsnorm", "seed=0,1"]
    result = gptlab(*asked)
    assert result.code == 0, result.err
    rows = json.loads((Path(os.environ["GPTLAB_RUNS"]) / "wide" / HISTORY).read_text())
    rungs = [[row for row in rows if row["rung"] == rung] for rung in (1, 2, 3)]
    assert [len(rung) for rung in rungs] == [6, 2, 1]
    assert [rung[0]["budget"] for rung in rungs] == ["2steps", "6steps", "18steps"]
    assert {row["setting"] for row in rungs[1]} == {row["setting"] for row in rungs[0] if row["stays"]}
    assert all(a["loss"] <= b["loss"] for rung in rungs for a, b in itertools.pairwise(rung))
    assert "18 runs: 18 trained" in result.out
    assert len(members("wide")) == 2  # the last rung, both seeds
    assert rungs[2][0]["setting"] in result.out
    again = gptlab(*asked)
    assert "18 runs: 0 trained, 18 skipped" in again.out


def test_a_setting_that_fails_goes_no_further(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab(*HALVING, *tiny(corpus_file, steps=9), "optimizer.learning_rate=1e-2,1e30", "hydra.sweeper.rungs=2")
    assert result.code == 1
    assert "failed: learning_rate=1e+30" in result.err or "failed: learning_rate=1e30" in result.err
    rows = json.loads((Path(os.environ["GPTLAB_RUNS"]) / "wide" / HISTORY).read_text())
    assert next(row["stays"] for row in rows if "1e-2" in row["setting"] or "0.01" in row["setting"])
    assert [row["loss"] for row in rows if "1e30" in row["setting"] or "1e+30" in row["setting"]] == [None]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "nothing to search"),
        (["model/norm=choice(rmsnorm)"], "nothing to search, since model/norm has one value alone"),
        ([RATE, "hydra.sweeper.sampler=tpes"], "hydra.sweeper.sampler=tpes (did you mean tpe?); there are tpe, cmaes, random, grid"),
        ([RATE, "hydra.sweeper.sampler=grid"], "optimizer.learning_rate is an interval, which has no points"),
        ([RATE, "hydra.sweeper.pruner=medium"], "hydra.sweeper.pruner=medium (did you mean median?)"),
        ([RATE, "hydra.sweeper.trials=0"], "trials=0"),
        ([RATE, "seed=0,1"], "a seed is not searched"),
        ([RATE, "hydra.sweeper.storage='postgresql://me:secret@host/db'"], "leave the password out of the address"),
        (["optimizer.learning_rate=interval(2,1)"], "optimizer.learning_rate=interval(2,1)"),
    ],
)
def test_a_search_that_cannot_be_is_one_sentence(gptlab: Command, corpus_file: Path, overrides: list[str], said: str) -> None:
    result = gptlab(*OPTUNA, *tiny(corpus_file), *overrides)
    assert result.code == 2, result.out
    assert said in " ".join(result.err.split())
    assert not all_runs()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=0,1"], "nothing to choose from"),
        (["model/norm=layernorm,rmsnorm", "trainer.budget=auto"], "divides the budget among its rungs"),
        (["model/norm=layernorm,rmsnorm", "trainer.budget=2steps,4steps"], "trainer.budget is what its rungs divide"),
        (["model/norm=layernorm,rmsnorm", "hydra.sweeper.rungs=1"], "rungs=1 must be at least 2"),
    ],
)
def test_halving_that_cannot_be_is_one_sentence(gptlab: Command, corpus_file: Path, overrides: list[str], said: str) -> None:
    result = gptlab(*HALVING, *tiny(corpus_file), *overrides)
    assert result.code == 2, result.out
    assert said in " ".join(result.err.split())


def test_another_space_in_the_same_study_is_refused(gptlab: Command, corpus_file: Path) -> None:
    gptlab(*OPTUNA, "hydra.sweeper.trials=1", *tiny(corpus_file), RATE)
    result = gptlab(*OPTUNA, "hydra.sweeper.trials=2", *tiny(corpus_file), "optimizer.weight_decay=interval(0,0.3)")
    assert result.code == 2
    assert "its trials searched optimizer.learning_rate, and this search has optimizer.weight_decay" in " ".join(result.err.split())


def test_a_foreign_storage_and_a_locked_one_are_told(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not a database, and longer than its header would be " * 9)
    result = gptlab(*OPTUNA, *tiny(corpus_file), RATE, f"hydra.sweeper.storage=sqlite:///{foreign}")
    assert result.code == 74
    assert "cannot be used" in result.err
    gptlab(*OPTUNA, "hydra.sweeper.trials=1", *tiny(corpus_file), RATE)
    held = sqlite3.connect(Path(os.environ["GPTLAB_RUNS"]) / "rates" / STORAGE)
    held.execute("begin exclusive")
    try:
        address = f"sqlite:///{Path(os.environ['GPTLAB_RUNS']).absolute() / 'rates' / STORAGE}?timeout=1"
        result = gptlab(*OPTUNA, "hydra.sweeper.trials=2", *tiny(corpus_file), RATE, f"hydra.sweeper.storage='{address}'")
    finally:
        held.close()
    assert result.code == 74
    assert "is locked by another process" in " ".join(result.err.split())


def test_a_missing_extra_is_named(gptlab: Command, corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else real(name, *a))
    result = gptlab(*OPTUNA, *tiny(corpus_file), RATE)
    assert result.code == 2
    assert "pip install 'gptlab[sweep]'" in result.err


def test_the_rungs_of_every_unit_end_with_the_whole_budget() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for budget, rungs in {
        "1000steps": ["112steps", "334steps", "1000steps"],
        "9Mtokens": ["1000000tokens", "3000000tokens", "9000000tokens"],
        "3epochs": ["0.3333epochs", "1epochs", "3epochs"],
        "9min": ["1min", "3min", "9min"],
        "18x": ["2x", "6x", "18x"],
    }.items():
        assert ladder_of(HalvingConfig(), ["a=1,2"], budget, parser).budgets == rungs


def test_the_axes_are_hydras_grammar() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    asked = ["a=1,2", "b=range(1,9,2)", "c=interval(0,1)", "d=int(interval(1,8))", RATE, "e=3", "a.b=x"]
    space = space_of(OptunaConfig(params={"f": "u,v"}), asked, OverridesParser.create())
    assert space.common == ["e=3", "a.b=x"]
    found = {key: str(axis) for key, axis in space.axes.items()}
    assert found == {
        "f": "CategoricalDistribution(choices=('u', 'v'))",
        "a": "CategoricalDistribution(choices=('1', '2'))",
        "b": "IntDistribution(high=7, log=False, low=1, step=2)",
        "c": "FloatDistribution(high=1.0, log=False, low=0.0, step=None)",
        "d": "IntDistribution(high=8, log=False, low=1, step=1)",
        "optimizer.learning_rate": "FloatDistribution(high=0.1, log=True, low=0.0001, step=None)",
    }


def test_a_missing_part_of_the_extra_is_named(gptlab: Command, corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "cmaes" else real(name, *a))
    result = gptlab(*OPTUNA, *tiny(corpus_file), RATE, "hydra.sweeper.sampler=cmaes")
    assert result.code == 2
    assert "needs cmaes: pip install 'gptlab[sweep]'" in result.err


@pytest.mark.parametrize("sampler", ["cmaes", "random"])
def test_every_sampler_searches(gptlab: Command, corpus_file: Path, sampler: str) -> None:
    weight = "optimizer.weight_decay=interval(0,0.3)"
    result = gptlab(*OPTUNA, "hydra.sweeper.trials=4", f"hydra.sweeper.sampler={sampler}", *tiny(corpus_file), RATE, weight)
    assert result.code == 0, result.err
    assert "warning" not in (result.out + result.err).lower()
    assert len({t.params["optimizer.weight_decay"] for t in found_trials("rates")}) == 4
