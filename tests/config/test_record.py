"""`record`: a component's scalars stand in the step's line of metrics.jsonl, and cost nothing where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptlab import compose, record, train
from gptlab.config import record as recording
from gptlab.config.errors import ConfigError
from gptlab.config.record import Recording
from gptlab.config.registry import register
from gptlab.objective.lm import next_token_loss
from gptlab.runner.callback import Callback
from tests.faulty import weights_hash
from tests.tiny import tiny

CALLS: list[bool] = []  # of the objective: whether anything was collected then


@register("objective", "telling")
def telling(*, label: str = "model/loss", size: int = 1) -> Any:
    """The plain loss, which tells each micro-batch's number twice, the second time one higher."""

    def loss(model: Any, batch: Any) -> Tensor:
        found = next_token_loss(model, batch)
        CALLS.append(recording._current is not None)
        record(label, torch.full((size,), float(len(CALLS))))
        record(label, len(CALLS) + 1)
        return found

    return loss


@register("callback", "telling")
class Telling(Callback):
    """Tells a weight before the update, and what `before_update` finds there."""

    def before_update(self, trainer: Any) -> None:
        record("telling/step", trainer.state.step)
        record("telling/weight", next(trainer.model.parameters()).view(-1)[0])
        record("telling/gradient", torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm())

    def on_step(self, trainer: Any) -> None:
        record("telling/outside", 1.0)


@pytest.fixture(autouse=True)
def _calls() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


def test_a_line_holds_the_mean_of_what_was_recorded_in_its_step_alone(corpus_file: Path) -> None:
    own = tiny(corpus_file, "objective=telling", "hardware.micro_batch=1", "trainer.log_every=3", steps=7)
    run = train(compose(own)).run
    told = {m["step"]: m["model/loss"] for m in run.metrics() if "model/loss" in m}
    # four micro-batches a step: those of the third are numbers 9 to 12
    assert told == {3: 10.5 + 0.5, 6: 22.5 + 0.5, 7: 26.5 + 0.5}
    assert [number // 4 + 1 for number, collected in enumerate(CALLS) if collected and number % 4 == 0] == [1, 3, 6, 7]


def test_recording_changes_no_number_of_the_training(corpus_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tiny(corpus_file, "model.dropout=0.2")
    plain = train(compose(own)).run
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "told"))
    told = train(compose([*own, "objective=telling", "+callback@callbacks.telling=telling"])).run
    assert weights_hash(told) == weights_hash(plain)


def test_a_callback_sees_the_clipped_gradients_and_the_weights_before_the_update(corpus_file: Path) -> None:
    own = tiny(corpus_file, "+callback@callbacks.telling=telling", "trainer.gradient_clip=0.25", steps=5)
    lines = [m for m in train(compose(own)).run.metrics() if "telling/step" in m]
    assert [m["telling/step"] for m in lines] == [0, 1, 2, 3, 4]
    for line in lines:
        assert line["train/gradient_norm"] > 0.25
        assert line["telling/gradient"] == pytest.approx(0.25, rel=1e-4)
        assert "telling/outside" not in line, "on_step is outside of the step"


def test_outside_of_a_step_and_without_a_line_nothing_is_done() -> None:
    record("anything goes: it is not even looked at", torch.zeros(2, 2))
    with Recording(False) as made:
        record("Not A Name", torch.zeros(2, 2))
    assert made.metrics({"train/loss": 1.0}) == {"train/loss": 1.0}


def test_a_tensor_becomes_a_number_only_when_the_line_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []

    def refuse(tensor: Tensor) -> float:
        asked.append(tensor)
        return 0.5

    weight = torch.nn.Parameter(torch.tensor([2.0]))
    with Recording(True) as made:
        record("a/weight", weight)
        record("a/product", weight * 3)
        with torch.no_grad():
            weight += 1  # the update
        with monkeypatch.context() as changed:
            changed.setattr(Tensor, "__float__", refuse)
            changed.setattr(Tensor, "item", refuse)
            record("a/other", weight[0])
        assert not asked
    assert made._found is not None
    assert not any(isinstance(v, Tensor) and v.requires_grad for values in made._found.values() for v in values), "no graph is kept"
    assert made.metrics({}) == {"a/weight": 2.0, "a/product": 6.0, "a/other": 3.0}


def test_numbers_of_every_kind_are_taken() -> None:
    with Recording(True) as made:
        for value in (1, 2.5, True, torch.tensor(3), torch.tensor([[4.0]], dtype=torch.bfloat16)):
            record("a/b", value)
        record("a/nan", float("nan"))
        record("a/inf", float("inf"))
        record("a/inf", float("-inf"))
    found = made.metrics({})
    assert found["a/b"] == pytest.approx((1 + 2.5 + 1 + 3 + 4) / 5)
    assert str(found["a/nan"]) == "nan"
    assert str(found["a/inf"]) == "nan"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("Loss", 1.0, "a name is made of a-z"),
        ("a b", 1.0, "a name is made of a-z"),
        ("", 1.0, "a name is made of a-z"),
        ("step", 1.0, "has a step of its own"),
        ("a/b", torch.zeros(2), "takes one real number, not a torch.float32 tensor of shape (2,)"),
        ("a/b", torch.zeros((), dtype=torch.complex64), "takes one real number"),
        ("a/b", "3", "not str"),
        ("a/b", None, "not NoneType"),
    ],
)
def test_what_is_no_name_or_no_scalar_is_refused(name: str, value: Any, said: str) -> None:
    with Recording(True), pytest.raises(ConfigError) as error:
        record(name, value)
    assert said in str(error.value)
    assert error.value.code == 2
    record("no longer", value)  # the recording is over, an error or not


@pytest.mark.parametrize(
    ("options", "said", "steps"),
    [
        (["objective.label=train/loss"], "has a train/loss of its own", 10),
        (["objective.size=3"], "not a torch.float32 tensor of shape (3,)", 1),
        (["objective.label=Loss"], "a name is made of a-z", 1),
    ],
    ids=["taken", "not a scalar", "no name"],
)
def test_a_run_is_told_at_once_where_it_can_be(corpus_file: Path, options: list[str], said: str, steps: int) -> None:
    own = tiny(corpus_file, "objective=telling", *options, "trainer.log_every=10")
    with pytest.raises(ConfigError) as error:
        train(compose(own))
    assert said in str(error.value)
    assert len(CALLS) == steps, "a first step refuses a wrong call, whether or not it has a line"


def test_compiled_code_is_neither_broken_nor_compiled_anew() -> None:
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    def work(x: Tensor) -> Tensor:
        record("a/mean", x.mean())
        return x * 2

    compiled_work = torch.compile(work, backend=backend, fullgraph=True)
    compiled_work(torch.ones(3))
    with Recording(True) as made:
        compiled_work(torch.ones(3))
    with Recording(False):
        compiled_work(torch.ones(3))
    assert len(compiled) == 1
    assert made.metrics({}) == {}
