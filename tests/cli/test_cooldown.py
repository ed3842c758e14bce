"""`gptlab cooldown`: one run at a constant rate, and a finished model from each of its checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.cli.lineage import chain
from gptlab.config.compose import settings
from gptlab.config.errors import ConfigError
from gptlab.runner.run import Run, members
from tests.cli.conftest import Command
from tests.tiny import tiny

MORE = ("model.dropout=0.1", "seed=2", "schedule=constant", "schedule.warmup=3", "callbacks.checkpoint.best=false")


@pytest.fixture(scope="module")
def trunk(home_folder: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one of twelve steps at a constant rate, and its checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("trunk") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_HOME", str(home_folder))
        patch.setenv("GPTLAB_RUNS", str(folder))
        overrides = tiny(corpus_file, *MORE, "callbacks.checkpoint.keep_every=4", "study=curve")
        train(compose(overrides), settings=settings(overrides))
    return folder


@pytest.fixture
def parent(trunk: Path, tmp_path: Path) -> Run:
    """A copy of it among this test's own runs."""
    shutil.copytree(trunk, tmp_path / "runs")
    return Run(next((tmp_path / "runs" / "curve").glob("*/config.json")).parent)


def cooled(study: str = "curve") -> list[Run]:
    found = [Run(f.parent) for f in Path(os.environ["GPTLAB_RUNS"], study).glob("*/start.json")]
    return sorted(found, key=lambda r: (r.read("start.json") or {})["step"])


def test_a_curve_of_finished_budgets_is_two_commands(gptlab: Command, parent: Run) -> None:
    first = gptlab("cooldown", "latest", "--at", "8,4", "--length", "50%")
    assert first.code == 0, first.err
    assert "1/2 cooldown from step 4" in first.out
    assert f"from {parent.identity}@8" in first.out
    assert "2 runs: 2 trained, 0 skipped, 0 failed" in first.out
    assert re.search("seeds +steps", first.out)
    assert "start=4" in first.out
    assert "constant" in first.out, "the parent stands in the same table"
    ends = [(r.read("done.json") or {})["summary"]["step"] for r in cooled()]
    assert ends == [6, 12]
    for run in cooled():
        config = run.config()
        assert config.schedule == type(config.schedule)()
        assert (config.seed, config.model, config.optimizer) == (2, parent.config().model, parent.config().optimizer)
        assert config.trainer.start.startswith(f"{parent.identity}@")
    again = gptlab("cooldown", "latest", "--at", "4,8", "--length", "50%")
    assert "2 runs: 0 trained, 2 skipped, 0 failed" in again.out, "latest is no cooldown, however new"
    assert gptlab("cooldown", parent.identity[:4], "--at", "4", "--length", "2steps").out.count("skipped") == 1


def test_all_kept_steps_are_cooled_unless_some_are_named(gptlab: Command, parent: Run) -> None:
    assert gptlab("cooldown", parent.identity, "--at", "all").code == 0
    assert [(r.read("done.json") or {})["summary"]["step"] for r in cooled()] == [5, 10, 15], "a fifth, rounded up"
    assert gptlab("cooldown", parent.identity).code == 0
    assert len(cooled()) == 3, "the newest by default"


def test_what_is_to_differ_is_named_as_for_train(gptlab: Command, parent: Run) -> None:
    own = ["study=root", "schedule.shape=sqrt", "trainer.log_every=2", "tracker=offline", "+callback@callbacks.more=throughput"]
    result = gptlab("cooldown", parent.identity, "--at", "8", "--length", "4steps", *own)
    assert result.code == 0, result.err
    (run,) = cooled("root")
    config = (run.read("config.json") or {})["config"]
    assert config["schedule"] == {"name": "cooldown", "shape": "sqrt", "final": 0.0}
    assert config["trainer"]["log_every"] == 2
    assert config["tracker"]["name"] == "offline"
    assert config["callbacks"]["more"] == {"name": "throughput"}
    assert [m["step"] for m in run.metrics() if "train/loss" in m][-2:] == [10, 12]
    assert members("root")[0]["settings"]["schedule.shape"] == "sqrt"


def test_a_branch_tells_where_it_began(gptlab: Command, parent: Run) -> None:
    gptlab("cooldown", parent.identity, "--at", "8", "--length", "4steps")
    (run,) = cooled()
    shown = gptlab("runs", "show", run.identity).out
    assert f"began at step 8 of {parent.identity} (curve/{parent.name})" in shown
    assert gptlab("runs", "verify", run.identity).code == 0
    rows = [json.loads(gptlab("data", "show", r, "--step", "10", "--json").out)["rows"] for r in (run.identity, parent.identity)]
    assert rows[0] == rows[1]
    trunk, branch = chain(run)
    assert trunk.tokens == next(m["tokens"] for m in parent.metrics() if m["step"] == 8), "as far as the branch went on from it"
    assert branch.tokens == trunk.tokens // 2, "four steps of its own behind the eight"
    assert 0 < branch.flops < trunk.flops
    shutil.rmtree(parent.directory)
    assert f"began at step 8 of {parent.identity}" in gptlab("runs", "show", run.identity).out
    assert gptlab("compare", "curve").code == 0


def test_a_point_that_fails_leaves_the_others_alone_and_ends_with_1(gptlab: Command, parent: Run) -> None:
    gptlab("cooldown", parent.identity, "--at", "4", "--length", "2steps", "study=other")
    middle = parent.checkpoints / "step-000000008" / "model.safetensors"
    middle.write_bytes(middle.read_bytes()[:-1] + b"\x55")
    result = gptlab("cooldown", parent.identity, "--at", "4,8,12", "--length", "2steps")
    assert result.code == 1
    assert "3 runs: 1 trained, 1 skipped, 1 failed" in result.out
    assert "(exit 5)" in result.err
    alone = gptlab("cooldown", parent.identity, "--at", "8", "--length", "2steps")
    assert alone.code == 5
    assert "sha256" in alone.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--at", "7"], "keeps no checkpoint of step 7; there is 4, 8, 12: callbacks.checkpoint.keep_every"),
        (["--at", "4,7"], "keeps no checkpoint of step 7"),
        (["--at", "soon"], "soon is no checkpoint of run"),
        (["--at", "4,"], "nothing is no checkpoint of run"),
        (["--length", "20"], "--length 20 needs an amount and a unit: 20% (of the steps before), 100steps"),
        (["--length", "-5steps"], "--length -5steps needs an amount and a unit"),
        (["optimizer.learning_rate=1"], "optimizer.learning_rate=1.0 differs from 0.001"),
        (["seed=3"], "seed=3 differs from the 2 of run"),
        (["seeds.data=3"], "seeds.data=3 differs from 2"),
        (["model/norm=rmsnorm"], "model/norm=rmsnorm differs from layernorm"),
        (["model=char"], "model=char: gptlab cooldown takes single values and components"),
        (["schedule.final=0,0.1"], "gptlab cooldown takes single values"),
        (["schedule.shpe=sqrt"], "schedule.shpe is not a key of the config (did you mean schedule.shape?)"),
        (["schedule.shape=root"], "schedule.shape=root is not one of linear, sqrt"),
        (["trainer.log_every=often"], "trainer.log_every=often must be a whole number"),
        (["tracker=nonee"], "tracker=nonee is not registered (did you mean none?)"),
        (["study=${oc.env:HOME}"], "would write the environment into the run"),
        (["schedule=linear"], "schedule=linear would be at"),
    ],
)
def test_what_cannot_be_cooled_is_one_sentence_and_nothing_is_made(gptlab: Command, parent: Run, arguments: list[str], said: str) -> None:
    result = gptlab("cooldown", parent.identity, *arguments)
    assert result.code == 2, result.out + result.err
    assert said in result.err
    assert "Traceback" not in result.err
    assert result.err.count("\n") == 1
    assert not cooled()


def test_what_has_cooled_is_not_cooled(gptlab: Command, parent: Run) -> None:
    gptlab("cooldown", parent.identity, "--at", "8")
    result = gptlab("cooldown", cooled()[0].identity)
    assert result.code == 2
    assert "has begun to cool at step 10 (schedule=cooldown is at 0 of the full rate)" in result.err


def test_a_folder_under_another_name_is_refused(parent: Run) -> None:
    from gptlab.cli.cooldown import cooldown

    renamed = parent.directory.rename(parent.directory.with_name("mine-1234567890"))
    with pytest.raises(ConfigError, match="mine-1234567890 is not the run that its name ends with"):
        cooldown(str(renamed), at="8", length="20%", overrides=[], rerun=False)


def test_by_hand_it_is_a_sweep_over_trainer_start(gptlab: Command, parent: Run, corpus_file: Path) -> None:
    road = [o for o in tiny(corpus_file, *MORE) if not o.startswith(("schedule", "trainer.budget"))]
    starts = f"trainer.start={parent.identity}@4,{parent.identity}@8"
    result = gptlab("train", "-m", *road, "schedule=cooldown", starts, "trainer.budget=+50%", "study=curve")
    assert result.code == 0, result.err
    assert "2 runs: 2 trained" in result.out
    assert gptlab("cooldown", "latest", "--at", "4,8", "--length", "50%").out.count("skipped") == 3, "the same two runs"
