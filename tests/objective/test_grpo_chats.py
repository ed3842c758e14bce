"""Reinforcement of a chatbot: its chats' questions are the prompts, and the right answer is the last message."""

from __future__ import annotations

import json

import pytest

from gptlab import compose, train
from gptlab.cli.data_show import show
from gptlab.config.errors import ConfigError

SMALL = ["model.width=16", "model.heads=2", "model.depth=1", "model.context_length=96", "tracker=none", "callbacks.samples.tokens=2"]


def test_few_problems_are_answered_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    chats = ["data=drills_sums", "data.corpus.chats=40"]
    more = ["objective=grpo", "objective.group=4", "objective.max_tokens=4", "objective.checked=4", "objective.shown=0"]
    made = train(compose([*SMALL, *chats, *more, "trainer.batch_tokens=6144", "trainer.budget=2steps"]))
    assert made.state == "done", "a batch has 64 rows, and the data 9"
    assert "padding" not in capsys.readouterr().out, "no row of the data is trained on"


def test_a_chatbot_is_rewarded_for_right_answers() -> None:
    chats = ["data=drills_sums", "data.corpus.chats=200"]
    base = train(compose([*SMALL, *chats, "objective=sft", "trainer.batch_tokens=768", "trainer.budget=3steps"])).run
    more = ["objective=grpo", "objective.group=4", "objective.max_tokens=12", "objective.checked=8", "objective.shown=1"]
    reward = ["+objective/reward@objective.rewards.right=characters"]
    rest = ["trainer.batch_tokens=768", "trainer.budget=2steps", "tracker=none", f"trainer.init_from={base.identity}@latest"]
    made = train(compose([*chats, *more, *reward, *rest])).run
    lines = [m for m in made.metrics() if "train/reward" in m]
    assert lines
    assert {"val/solved", "val/reward", "val/ended"} <= made.metrics()[-1].keys()
    with pytest.raises(ConfigError, match="learned from what the model itself answered"):
        show(made.identity, step=1, batch=None, rows=None, tokens=False, as_json=False)
    shown = sorted((made.directory / "samples").glob("*.jsonl"))
    assert shown
    rollout = json.loads(shown[0].read_text().splitlines()[0])
    assert "user:" in rollout["prompt"]
    assert "plus" in rollout["reference"]
