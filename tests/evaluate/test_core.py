"""CORE is the mean of 22 centred accuracies; what each task is asked in is what DCLM's and nanochat's evaluation asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.config.errors import ConfigError, DataError
from gptlab.evaluate import core as core_module
from gptlab.evaluate.core import ANSWER, TASKS, centred, core
from gptlab.evaluate.harness import HarnessModel
from gptlab.evaluate.results import Score
from tests.evaluate.test_losses import model, tokenizer


def row(kind: str, i: int) -> dict[str, Any]:
    if kind == "choice":
        return {"query": f"Q{i}", "choices": ["bad", "good", "worse yet"], "gold": 1}
    if kind == "schema":
        return {"context_options": [f"the good {i}", f"the bad {i}"], "continuation": "it is so", "gold": 0}
    return {"context": f"C{i} ", "continuation": "good"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The files of all tasks, twelve rows each."""
    for task in TASKS:
        file = tmp_path / "eval_data" / "some_kind" / task.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row(task.kind, i)) + "\n" for i in range(12)))
    return tmp_path


def score(name: str, value: float, error: float = 0.0) -> Score:
    return Score(f"core/{name}", "acc", value, error, 10, 0)


def test_the_number_is_the_mean_of_centred_accuracies() -> None:
    assert len(TASKS) == len({task.name for task in TASKS}) == 22
    by_chance = [score(task.name, task.chance) for task in TASKS]
    assert centred(by_chance).value == pytest.approx(0)
    assert centred([score(task.name, 1.0) for task in TASKS]).value == pytest.approx(1)
    worked = {"hellaswag": 0.625, "boolq": 0.43, "jeopardy": 0.11, "copa": 0.75}  # by hand: 0.5, -0.5, 0.11 and 0.5 above chance
    found = centred([score(task.name, worked.get(task.name, task.chance), 0.03 if task.name == "copa" else 0.0) for task in TASKS])
    assert found.value == pytest.approx((0.5 - 0.5 + 0.11 + 0.5) / 22)
    assert found.error == pytest.approx(0.06 / 22)
    assert found.examples == 220


def by_rule(asked: list[tuple[str, str]], by_byte: Any, right: bool) -> Any:
    """In the place of a model: good is likely, or it is not."""

    def found(_: Any, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        told = [(by_byte.decode(context), by_byte.decode(continuation)) for _, context, continuation in requests]
        asked.extend(told)
        return [((0.0 if ("good" in "".join(one).rpartition("\n\n")[2]) == right else -9.0), right) for one in told]

    return found


@pytest.mark.parametrize("right", [True, False])
def test_every_task_is_asked_as_it_is_meant(bundle: Path, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    by_byte = tokenizer("byte")
    monkeypatch.setattr(HarnessModel, "_loglikelihood_tokens", by_rule(asked, by_byte, right))
    found = {s.task: s for s in core(model(257), by_byte, bundle, limit=3)}
    expected = 1.0 if right else sum(-task.chance / (1 - task.chance) for task in TASKS) / 22
    assert found["core"].value == pytest.approx(expected)
    assert (found["core/piqa"].examples, found["core/piqa"].shots, found["core/piqa"].chance) == (3, 10, 0.5)
    whole = {context + continuation for context, continuation in asked}
    with_shots = [text for text in whole if text.count(ANSWER) == 11 and text.endswith("worse yet")]
    assert with_shots, "ten examples, each with its right answer, and the question"
    assert all(text.count(f"{ANSWER}good\n\n") == 10 and text.startswith("Q") for text in with_shots)
    schema = [continuation for context, continuation in asked if context.startswith(("the goo", "the ba"))]
    assert schema
    assert all(continuation.endswith(" it is so") for continuation in schema), "what comes after either context is the same"


def test_the_mean_of_an_answers_tokens_decides(bundle: Path) -> None:
    by_byte, made = tokenizer("byte"), model(257, "model.context_length=64")
    task = next(task for task in TASKS if task.name == "copa")
    rows = [row("choice", i) for i in range(12)]
    harness = HarnessModel(made, by_byte)
    by_sum = []
    for i in range(12):
        likely = []
        for choice in rows[i]["choices"]:
            ids = torch.tensor([[256, *by_byte.encode(f"Q{i} {choice}").tolist()]])
            with torch.inference_mode():
                told = made(ids[:, :-1]).log_softmax(-1)[0].gather(-1, ids[0, 1:, None])[:, 0]
            likely.append(told[-len(choice) :])
        means, sums = [float(one.mean()) for one in likely], [float(one.sum()) for one in likely]
        rows[i]["gold"] = means.index(max(means))
        assert core_module._right(task, rows, i, harness)
        by_sum.append(sums.index(max(sums)) == rows[i]["gold"])
    assert not all(by_sum), "a longer answer is not held against itself"


def test_what_is_missing_is_told(bundle: Path) -> None:
    by_byte = tokenizer("byte")
    made = model(257)
    with pytest.raises(ConfigError, match=r"--tasks core needs --task-folder FOLDER .*eval_bundle.zip"):
        core(made, by_byte, None)
    file = bundle / "eval_data" / "some_kind" / "squad.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], json.dumps({"context": "c"}), *lines[2:]]))
    with pytest.raises(DataError, match=r"squad.jsonl, line 2: core/squad asks for the field 'continuation'; there are context"):
        core(made, by_byte, bundle)
    file.write_text("\n".join(lines[:4]))
    with pytest.raises(DataError, match=r"squad.jsonl has 4 rows; core/squad shows 10"):
        core(made, by_byte, bundle)
    file.unlink()
    with pytest.raises(ConfigError, match=r"there is no squad.jsonl in --task-folder .*eval_bundle.zip"):
        core(made, by_byte, bundle)
