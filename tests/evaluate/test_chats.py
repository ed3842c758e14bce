"""A chatbot's answers: shares by hand, what no context holds passed over and counted, and a duel that counts what only one got right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptlab import compose, load, train
from gptlab.cli import app
from gptlab.config.errors import ConfigError, DataError
from gptlab.data.prepare import prepare
from gptlab.evaluate.chats import Answers, Duel, answers, duel, questions_of
from gptlab.evaluate.losses import of_set
from gptlab.objective.reward import Sample
from gptlab.runner.run import Run
from tests.data.test_conversations import chats, written
from tests.tiny import tiny


def sample(said: str, right: str, *, ended: bool = True, prompt: str = "") -> Sample:
    return Sample(prompt or right, said, right, ended, len(said))


def test_shares_are_those_by_hand() -> None:
    found = Answers(
        [sample("It is 4.", "It is 4."), sample("It's 4", "It is 4."), sample("no", "yes", ended=False), sample("yes ", "yes")], 2
    )
    shares = found.shares()
    assert shares["exact"] == (0.5, 0.25)
    assert shares["number"] == (1.0, 0.0), "of the two whose answer has one"
    assert shares["ended"][0] == 0.75
    told = found.to_json()
    assert Answers([sample("x", "x²"), sample("①", "①")], 0).shares()["exact"] == (0.5, pytest.approx(0.35, abs=0.01)), "no numbers"
    assert (told["answers"], told["passed_over"]) == (4, 2)


def test_a_duel_counts_what_one_alone_has_right() -> None:
    one = Answers([sample("a", "a"), sample("b", "b"), sample("c", "c"), sample("x", "d")], 0)
    other = Answers([sample("a", "a"), sample("x", "b"), sample("x", "c"), sample("d", "d")], 0)
    assert duel(one, other) == Duel(2, 1, 1)
    assert duel(one, other).rate == 0.625
    assert duel(one, other).p == 1.0
    assert Duel(6, 0, 10).p == pytest.approx(2 / 64)
    assert duel(one, Answers([], 4)) == Duel(0, 0, 0)
    by_number = [Answers([sample(said, "6 * 7 = 42\n#### 42")], 0) for said in ("It is 42.", "It is 41.")]
    assert duel(*by_number) == Duel(1, 0, 0), "a right number is a right answer"


@pytest.fixture
def talker(tmp_path: Path) -> Run:
    """A model that has learned one answer by heart."""
    file = written(tmp_path, [{"prompt": f"{i}?", "completion": "ja"} for i in range(60)])
    small = ["model.width=32", "model.heads=2", "model.depth=1", "model.context_length=32", "trainer.batch_tokens=512", "tracker=none"]
    more = ["data/corpus=chat", "data/tokenizer=chat", f"data.corpus.path={file}", "objective=sft", "trainer.budget=80steps", "study=talk"]
    return train(compose([*small, *more, "optimizer.learning_rate=0.01", "name=talker"])).run


def test_a_talker_is_asked_and_its_answers_counted(talker: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "3?", "completion": "ja"}, {"prompt": "4?", "completion": "nein"}, {"prompt": "x" * 50, "completion": "ja"}]
    file = written(tmp_path, rows, "asked.jsonl")
    found = answers(load(talker), questions_of(str(file), 0), 8)
    assert [s.completion for s in found.samples] == ["ja", "ja"]
    assert found.passed_over == 1
    assert found.shares()["exact"][0] == 0.5
    assert found.shares()["ended"][0] == 1.0
    told = CliRunner().invoke(app, ["evaluate", talker.identity, "--chats", str(file), "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["runs"][0]["exact"]["share"] == 0.5
    shown = CliRunner().invoke(app, ["evaluate", talker.identity, talker.identity, "--chats", str(file)])
    assert "50.0% ± 35.4%" in shown.output
    assert "win rate 50.0%" in shown.output


def test_what_cannot_be_asked_is_refused(talker: Run, tmp_path: Path, corpus_file: Path) -> None:
    file = written(tmp_path, chats(3, turns=1), "asked.jsonl")
    base = train(compose(tiny(corpus_file))).run
    with pytest.raises(ConfigError, match="has no tokens of a chat"):
        answers(load(base), questions_of(str(file), 0), 8)
    with pytest.raises(ConfigError, match="none fits the context of 32 tokens"):
        answers(load(talker), questions_of(str(written(tmp_path, [{"prompt": "x" * 99, "completion": "y"}])), 0), 8)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="it holds no chat"):
        questions_of(str(empty), 0)


def test_a_fine_tuned_run_is_measured_on_its_answers_each_by_its_place_in_its_own_chat(talker: Run) -> None:
    loaded = load(talker)
    data = prepare(loaded.config.data)
    found = of_set(loaded.model, data, "val")
    assert found.nats.mean() == pytest.approx(talker.metrics()[-1]["val/loss"], abs=1e-6)
    assert len(set(found.document.tolist())) == data.manifest["splits"]["val"]["documents"]
    assert set(found.place.tolist()) == {5, 6, 7, 8}, "a chat has eight or nine tokens, whatever stands before it in its row"
    told = CliRunner().invoke(app, ["evaluate", talker.identity, "--json"])
    assert json.loads(told.stdout)[0]["loss"] == pytest.approx(found.nats.mean())


def test_options_of_another_measure_are_refused(talker: Run, tmp_path: Path) -> None:
    file = written(tmp_path, chats(3, turns=1), "asked.jsonl")
    for more, said in (
        (["--answer-tokens", "5"], "--answer-tokens goes with --chats"),
        (["--chats", str(file), "--limit", "-1"], "--limit -1"),
    ):
        refused = CliRunner().invoke(app, ["evaluate", talker.identity, *more])
        assert said in str(refused.exception)
