"""What a completion is worth, and what a reward that fails says."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import build, component
from gptlab.data import reasoning_gym
from gptlab.data.reasoning_gym import ReasoningGym
from gptlab.objective.reward import Reward, Sample, scored


def reward(name: str, **options: Any) -> Reward:
    made: Reward = build(component("objective/reward", name).options(**options))
    return made


def said(completion: str, reference: str = "", **more: Any) -> Sample:
    return Sample("prompt", completion, reference, **more)


@pytest.mark.parametrize(
    ("compare", "completion", "reference", "expected"),
    [
        ("text", " 231\n", "231", 1),
        ("text", "231 ", "132", 0),
        ("text", "so 231", "231", 0),
        ("number", "so it is 41, no, 42.", "6 * 7 = 42\n#### 42", 1),
        ("number", "$1,234.50", "1234.5", 1),
        ("number", "42 or 43", "42", 0),
        ("number", "-3", "3", 0),
        ("number", "from 5-10", "10", 1),
        ("number", "5 - 3", "3", 1),
        ("number", "1,2,3", "3", 1),
        ("number", "-1,234,567.5", "-1234567.5", 1),
        ("number", ".5", "0.5", 1),
        ("number", "no idea", "3", 0),
    ],
)
def test_the_right_answer(compare: str, completion: str, reference: str, expected: float) -> None:
    assert reward("exact_answer", compare=compare)(said(completion, reference)) == expected


def test_characters_count_where_they_stand() -> None:
    found = [reward("characters")(said(text, "0231")) for text in ("0231", "0230", "231", "02311", "", "x" * 8)]
    assert found == [1, 0.75, 0, 0.8, 0, 0]
    assert reward("characters")(said("", "")) == 0


def test_a_pattern_is_found_or_is_all_of_it() -> None:
    assert [reward("regex", pattern="[0-9]+")(said(text)) for text in ("a 12", "a")] == [1, 0]
    assert [reward("regex", pattern="a.b", whole=True)(said(text)) for text in ("a\nb", "a b ")] == [1, 0]
    with pytest.raises(ConfigError, match=r"reward=regex: pattern='\(' is no regular expression"):
        reward("regex", pattern="(")


def test_lengths_within_bounds_are_worth_one_and_fall_off_outside() -> None:
    hard, soft = reward("length", least=3, most=5), reward("length", least=3, most=5, slope=4)
    assert [hard(said("", tokens=n)) for n in (2, 3, 5, 6)] == [0, 1, 1, 0]
    assert [soft(said("", tokens=n)) for n in (1, 3, 6, 9, 20)] == [0.5, 1, 0.75, 0, 0]
    with pytest.raises(ConfigError, match="reward=length: least=9 must be from 0 to most=5"):
        reward("length", least=9, most=5)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a < b\n</think> <answer>42</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<answer>42</answer><think>a</think>", 0),
        ("<think>a</think><answer>42</answer> so", 0),
        ("<think>a<think>b</think></think><answer>42</answer>", 0),
        ("<think>a</think><answer>4</answer><answer>2</answer>", 0),
        ("42", 0),
    ],
)
def test_the_format_is_kept_or_not(completion: str, expected: float) -> None:
    assert reward("format")(said(completion)) == expected
    assert reward("format")(said(completion, ended=False)) == 0
    assert reward("format", ended=False)(said(completion, ended=False)) == expected


def test_a_format_without_tags_is_refused() -> None:
    with pytest.raises(ConfigError, match="reward=format: tags is empty"):
        reward("format", tags=[])


def test_a_reward_that_raises_or_is_no_number_names_itself_and_the_sample() -> None:
    def fails(sample: Sample) -> float:
        raise KeyError(sample.completion)

    with pytest.raises(DataError, match=r"objective\.rewards\.mine raised KeyError: 'bad' for the completion 'bad' of the prompt 'prompt'"):
        scored("mine", fails, [said("bad")])
    with pytest.raises(
        DataError, match=r"objective\.rewards\.mine is nan for the completion 'x+ … x+' of the prompt 'prompt'; a reward is"
    ):
        scored("mine", lambda s: float("nan"), [said("x" * 500)])
    with pytest.raises(DataError, match="raised TypeError"):
        scored("mine", lambda s: None, [said("")])  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match="the reference 'none' holds no number"):
        scored("exact", reward("exact_answer", compare="number"), [said("3", "none")])


@dataclass
class Config:
    seed: int
    size: int
    most: int = 9


class Doubles:
    """A task with the interface of reasoning-gym's: half a point for an answer that is one off."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __getitem__(self, number: int) -> dict[str, Any]:
        assert 0 <= number < self.config.size
        n = (self.config.seed + number) % (self.config.most + 1)
        return {"question": f"twice {n}?", "answer": str(2 * n), "metadata": {"n": n}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        away = abs(int(answer) - 2 * entry["metadata"]["n"])
        return max(0.0, 1 - away / 2)


@pytest.fixture
def gym(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library in reasoning-gym's place."""
    factory = types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"doubles": (Doubles, Config)}  # type: ignore[attr-defined]
    factory.create_dataset = lambda name, **kwargs: Doubles(Config(**kwargs))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.ModuleType("reasoning_gym"))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    reasoning_gym.dataset.cache_clear()
    yield
    reasoning_gym.dataset.cache_clear()


@pytest.mark.usefixtures("gym")
def test_a_gym_task_is_scored_by_its_own_scorer() -> None:
    corpus = ReasoningGym(task="doubles", settings={"most": "4"})
    (problem,) = corpus.problems([3], 0)
    assert (problem.prompt, problem.answer) == ("twice 3?\n", "6")
    sample = Sample(problem.text, " 7 ", problem.answer, entry=problem.entry)
    assert reward("reasoning_gym")(sample) == 0.5
    tagged = Sample(problem.text, "is it <a>9</a>? <a> 6</a>", problem.answer, entry=problem.entry)
    assert reward("reasoning_gym", tag="a")(tagged) == 1
    assert reward("reasoning_gym", tag="b")(tagged) == 0
    with pytest.raises(ConfigError, match="reward=reasoning_gym scores the tasks of data/corpus=reasoning_gym"):
        scored("gym", reward("reasoning_gym"), [said("6")])


@pytest.mark.usefixtures("gym")
def test_gym_problems_are_told_by_number_and_the_held_out_ones_have_seeds_of_their_own() -> None:
    corpus = ReasoningGym(task="doubles", documents=3)
    assert corpus.problems([7, 2], 5) == [*corpus.problems([7], 5), *corpus.problems([2], 5)]
    assert [p.answer for p in corpus.problems([0, 1], 5, held_out=True)] == [str(2 * ((1 << 30) + n) % 20) for n in (0, 1)]
    assert corpus.problems([10_000], 0)[0].answer == corpus.problems([0], 1)[0].answer, "the next ten thousand have the next seed"
    assert list(corpus.pieces()) == [("twice 0?\n0", True), ("twice 1?\n2", True), ("twice 2?\n4", True)]
    with pytest.raises(ConfigError, match=r"data\.corpus\.task=dubles is no task of reasoning-gym's \(did you mean doubles\?\)"):
        ReasoningGym(task="dubles").problems([0], 0)
    with pytest.raises(ConfigError, match=r"data\.corpus\.settings: reasoning-gym's doubles does not take them"):
        ReasoningGym(task="doubles", settings={"least": "4"}).problems([0], 0)


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    reasoning_gym.dataset.cache_clear()
    with pytest.raises(ConfigError, match=r"data/corpus=reasoning_gym needs the library reasoning-gym: run `pip install 'gptlab\[rl\]'`"):
        ReasoningGym().problems([0], 0)


def test_the_librarys_own_tasks_score_their_own_answers() -> None:
    pytest.importorskip("reasoning_gym")
    for task in ("leg_counting", "basic_arithmetic", "countdown"):
        corpus = ReasoningGym(task=task)
        problems = corpus.problems(range(3), 1)
        assert problems == corpus.problems(range(3), 1)
        for problem in problems:
            right = Sample(problem.text, problem.answer, problem.answer, entry=problem.entry)
            wrong = Sample(problem.text, "no", problem.answer, entry=problem.entry)
            assert reward("reasoning_gym")(right) == 1
            assert reward("reasoning_gym")(wrong) < 1
