"""Stages: runs one after another, each beginning with the one before it, and the chain that they make."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.cli.lineage import chain, lineage
from gptlab.cli.train import ExitWith
from gptlab.cli.train import train as command
from gptlab.config.errors import ConfigError
from gptlab.config.explain import references_as_text
from gptlab.config.sweep import points
from gptlab.runner.run import find_run, remove_run
from tests.tiny import tiny

SMALL = "model.width=16 model.heads=2 model.depth=1 model.context_length=192 trainer.batch_tokens=384"
STAGES = {
    "text": f"data/corpus=text data/tokenizer=byte {SMALL}",
    "chats": "data=drills data.corpus.chats=80 objective=sft trainer.batch_tokens=384",
    "preferences": "data=drills_preferences data.corpus.chats=80 objective=dpo trainer.batch_tokens=384 data.corpus.skills=[upper]",
}


def arguments(corpus: Path, **stages: str) -> list[str]:
    told = {**STAGES, **stages}
    told["text"] += f" data.corpus.path={corpus}"
    given = [f"+hydra.sweeper.stages.{name}='{text}'" for name, text in told.items()]
    common = ["trainer.budget=2steps", "tracker=none", "callbacks.samples.tokens=2", "study=staged"]
    return ["-m", "hydra/sweeper=stages", *given, *common]


def test_each_stage_begins_with_the_one_before_it(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(arguments(corpus_file)) == 0
    told = capsys.readouterr().out
    runs = [find_run(f"staged/{name}") for name in STAGES]
    for before, after in itertools.pairwise(runs):
        assert (after.read("parent.json") or {})["run"] == before.identity
    assert f"gptlab chat {runs[-1].identity}" in told
    stages = chain(runs[-1])
    assert [stage.name for stage in stages] == list(STAGES)
    assert [stage.objective for stage in stages] == ["lm", "sft", "dpo"]
    assert [stage.began for stage in stages] == ["nothing", "text@2", "chats@2"]
    assert all(stage.tokens == 768 and stage.seconds > 0 and stage.loss for stage in stages)
    lineage(runs[-1].identity, price=3600.0, as_json=True)
    assert [one["run"] for one in json.loads(capsys.readouterr().out)] == [run.identity for run in runs]
    lineage(runs[-1].identity, price=3600.0, as_json=False)
    assert "at $3600 an hour" in capsys.readouterr().out
    assert command(arguments(corpus_file)) == 0
    assert capsys.readouterr().out.count("skipped") >= 3
    remove_run(runs[0])
    assert [stage.missing for stage in chain(runs[-1])] == [True, False, False]


def test_after_a_stage_that_failed_none_is_begun(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExitWith):
        command(arguments(corpus_file, chats=STAGES["chats"] + " data.too_long=keep"))
    shown = capsys.readouterr()
    assert "failed: chats: " in shown.out + shown.err
    assert "data.too_long=keep is not one of cut, drop, refuse" in shown.out + shown.err
    assert "the stages after it were not begun" in shown.out + shown.err
    with pytest.raises(ConfigError):
        find_run("staged/preferences")


def test_what_stages_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.stages is empty"):
        command(["-m", "hydra/sweeper=stages", "tracker=none"])
    with pytest.raises(ConfigError, match="runs its stages once; give one value"):
        command(["-m", "hydra/sweeper=stages", "+hydra.sweeper.stages.a='seed=0'", "seed=0,1"])
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate=1e-3,1e-2: hydra/sweeper=stages runs its stages once; give one value"):
        command(["-m", "hydra/sweeper=stages", "+hydra.sweeper.stages.a='optimizer.learning_rate=1e-3,1e-2'"])
    with pytest.raises(ConfigError, match="--price -1"):
        lineage("latest", price=-1, as_json=False)


def test_of_stages_the_first_can_be_planned_alone() -> None:
    with pytest.raises(ConfigError, match="each stage after the first begins with the run before it; give the values of one: ") as refused:
        points(["experiment=chatbot", "seed=3"], what="plan")
    one = shlex.split(str(refused.value).partition("of one: ")[2])
    assert one[-1] == "hydra.mode=RUN"
    assert [point.overrides for point in points(one, what="plan")] == [one]
    config = compose(one)
    assert (config.name, config.seed, config.study) == ("text", 3, "chatbot")


def test_a_run_whose_name_looks_like_a_number_is_a_run(corpus_file: Path) -> None:
    given = ["trainer.init_from=13e0957672", "+trainer.start=1234567890", "trainer.init_from=13e0957672@12", "seed=3"]
    assert references_as_text(given) == ["trainer.init_from='13e0957672'", "+trainer.start='1234567890'", *given[2:]]
    named = "trainer.init_from=numbers/position=rotary"
    assert references_as_text([named, f"{named},numbers/a=b", f"{named}@12"]) == [
        "trainer.init_from='numbers/position=rotary'", f"{named},numbers/a=b", "trainer.init_from='numbers/position=rotary@12'",
    ]  # fmt: skip
    config = compose([*tiny(corpus_file), "study=numbers"])
    train(config)
    with pytest.raises(ConfigError, match="no run matches '13e0957672'"):
        compose(["trainer.init_from=13e0957672"])
