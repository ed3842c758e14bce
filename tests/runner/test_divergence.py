"""A loss or gradient that is not finite never touches the weights; a batch that is passed over is as if the data lacked it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptlab import compose, train
from gptlab.config.errors import DivergedError, Stopped
from gptlab.config.registry import register
from gptlab.data.loader import Batch, Loader
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.guard import BATCHES
from gptlab.runner.passed import passed_batches
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from tests.faulty import faults, losses, only_run, weights, weights_hash
from tests.tiny import tiny

POISON = "+callback@callbacks.fault=poison"
EVERY = ("callbacks.checkpoint.every=3", "callbacks.checkpoint.keep=9", "callbacks.evaluation.every=1000")
TRAINERS: list[Trainer] = []


@register("callback", "remember_trainer")
class RememberTrainer(Callback):
    """Keeps hold of the trainer, to look at what a failure leaves in memory."""

    def on_start(self, trainer: Trainer) -> None:
        TRAINERS.append(trainer)


@register("callback", "lose_checkpoints")
class LoseCheckpoints(Callback):
    """Deletes all of a run's checkpoints after a step."""

    def __init__(self, *, step: int = 5) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            trainer.writer.wait()
            shutil.rmtree(trainer.run.checkpoints)


@pytest.fixture(autouse=True)
def _faults() -> Iterator[None]:
    with faults():
        yield
    TRAINERS.clear()


def without(batches: set[int], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run on data that simply lack some batches, in a folder of its own."""
    kept = [n for n in range(1000) if n not in batches]
    plain = Loader.batch

    def lacking(loader: Loader, number: int) -> Batch:
        return plain(loader, kept[number])

    with monkeypatch.context() as changed:
        changed.setattr(Loader, "batch", lacking)
        changed.setenv("GPTLAB_RUNS", str(tmp_path / "lacking"))
        return train(compose(overrides)).run


def logged(run: Run) -> list[tuple[int, object]]:
    """Step and training loss of each line that has one."""
    return [(m["step"], m["train/loss"]) for m in run.metrics() if "train/loss" in m]


def losses_state(run: Run) -> dict[str, Any]:
    """The running statistics in the newest checkpoint."""
    found: dict[str, Any] = checkpoint.load_state(checkpoint.require_good(run.checkpoints))["state"]["losses"]
    return found


@pytest.mark.parametrize("micro", [None, 2], ids=["whole", "accumulated"])
@pytest.mark.parametrize(("what", "factor"), [("loss", "nan"), ("loss", "inf"), ("gradient", "nan"), ("gradient", "inf")])
def test_stop_ends_the_run_before_the_update_and_says_where(corpus_file: Path, what: str, factor: str, micro: int | None) -> None:
    own = tiny(corpus_file, *EVERY, POISON, f"callbacks.fault.what={what}", f"callbacks.fault.factor={factor}")
    own += ["+callback@callbacks.remember=remember_trainer"]
    if micro is not None:  # the third of four micro-batches
        own += ["hardware.micro_batch=1", f"callbacks.fault.micro={micro}"]
    with pytest.raises(DivergedError) as error:
        train(compose(own))
    said = str(error.value)
    assert error.value.code == 4
    assert f"the {'loss' if what == 'loss' else 'gradient norm'} is " in said
    for part in ("at step 7 ", "rows 24 to 27", "batch 6 ", "step-000000006 is kept", "trainer.on_nonfinite=skip"):
        assert part in said
    run = only_run()
    kept = weights(run, "6")
    assert checkpoint.checkpoints(run.checkpoints)[0].name == "step-000000006"
    for name, value in TRAINERS[0].model.state_dict().items():
        assert torch.equal(value, kept[name]), f"{name} is as it was after step 6"
        assert torch.isfinite(value).all()
    assert [s for s, _ in logged(run)] == [1, 2, 3, 4, 5, 6]
    assert (run.read("failed.json") or {})["code"] == 4


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skip_trains_as_if_the_data_lacked_the_batch(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    plain = tiny(corpus_file, *EVERY)
    run = train(compose([*plain, POISON, f"callbacks.fault.what={what}", "trainer.on_nonfinite=skip"])).run
    lacking = without({6}, plain, tmp_path, monkeypatch)
    assert run.identity == lacking.identity
    assert weights_hash(run) == weights_hash(lacking)
    assert logged(run) == logged(lacking)
    assert passed_batches(run) == [6]


def test_a_batch_in_passed_jsonl_is_passed_over_from_the_beginning(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny(corpus_file, *EVERY, "model.dropout=0.2")
    skipping = train(compose([*plain, POISON, "trainer.on_nonfinite=skip"])).run
    known = skipping.directory / "passed.jsonl"
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "known"))
    there = tmp_path / "known" / skipping.study / skipping.directory.name
    there.mkdir(parents=True)
    shutil.copy(known, there)
    other = train(compose(plain)).run
    assert weights_hash(skipping) == weights_hash(other), "dropout is drawn by the batch's number"


def test_a_run_that_stopped_goes_on_by_skipping_as_the_same_run(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny(corpus_file, *EVERY)
    with pytest.raises(DivergedError):
        train(compose([*plain, POISON]))
    failed = only_run()
    assert failed.state == "failed"
    run = train(compose([*plain, POISON, "trainer.on_nonfinite=skip"])).run
    assert run.directory == failed.directory
    assert run.state == "done"
    assert weights_hash(run) == weights_hash(without({6}, plain, tmp_path, monkeypatch))


@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_too_many_batches_passed_over_end_the_run(corpus_file: Path, mode: str) -> None:
    own = tiny(corpus_file, *EVERY, POISON, "callbacks.fault.batches=[3,5,6]", f"trainer.on_nonfinite={mode}", "trainer.max_passed=2")
    with pytest.raises(DivergedError, match="2 batches have been passed over already") as error:
        train(compose(own))
    assert "trainer.max_passed=2" in str(error.value)
    assert passed_batches(only_run()) == [3, 5]


@pytest.mark.parametrize("every", [3, 0], ids=["from a checkpoint", "from the beginning"])
def test_rollback_goes_back_passes_over_and_tells_each_step_once(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    plain = tiny(corpus_file, f"callbacks.checkpoint.every={every}", "callbacks.evaluation.every=1000")
    run = train(compose([*plain, POISON, "callbacks.fault.batches=[7]", "trainer.on_nonfinite=rollback"])).run
    assert passed_batches(run) == [7]
    assert [s for s, _ in logged(run)] == list(range(1, 13))
    lacking = without({7}, plain, tmp_path, monkeypatch)
    assert weights_hash(run) == weights_hash(lacking)
    assert losses(run) == losses(lacking)
    state, expected = (checkpoint.load_state(checkpoint.require_good(r.checkpoints)) for r in (run, lacking))
    assert state["state"]["step"] == 12
    assert state["state"]["tokens"] == expected["state"]["tokens"]
    assert state["state"]["batch"] == 13, "twelve steps and one batch passed over"
    assert state["optimizer"] == expected["optimizer"]


def test_rollback_with_no_checkpoint_left_says_so(corpus_file: Path) -> None:
    own = tiny(corpus_file, *EVERY, POISON, "trainer.on_nonfinite=rollback", "callbacks.checkpoint.every=5")
    with pytest.raises(DivergedError, match="none to go back to") as error:
        train(compose([*own, "+callback@callbacks.lose=lose_checkpoints", "callbacks.lose.step=6"]))
    assert error.value.code == 4


# Spikes

SPIKE = (POISON, "callbacks.fault.batches=[30]", "callbacks.fault.factor=50")


def test_a_spike_is_told_and_its_batch_kept(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(compose(tiny(corpus_file, *EVERY, *SPIKE, "+callback@callbacks.remember=remember_trainer", steps=40))).run
    told = [m for m in run.metrics() if "train/spike" in m]
    assert [m["step"] for m in told] == [31]
    assert told[0]["train/spike"] > 6
    assert "step 31: the loss" in " ".join(capsys.readouterr().out.split())
    (kept,) = (run.directory / BATCHES).iterdir()
    saved, whole = load_file(kept), TRAINERS[0].loader.whole(30)
    assert kept.name == "batch-000000030.safetensors"
    assert torch.equal(saved["inputs"], whole.inputs)
    assert torch.equal(saved["targets"], whole.targets)
    assert passed_batches(run) == []


def test_a_spike_between_two_lines_of_metrics_is_told_all_the_same(corpus_file: Path) -> None:
    run = train(compose(tiny(corpus_file, *EVERY, *SPIKE, "trainer.log_every=20", steps=40))).run
    assert [m["step"] for m in run.metrics() if "train/spike" in m] == [31]


def test_a_spike_can_be_passed_over(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny(corpus_file, *EVERY, "trainer.skip_spikes=6", steps=40)
    run = train(compose([*plain, *SPIKE])).run
    assert passed_batches(run) == [30]
    lacking = without({30}, plain, tmp_path, monkeypatch)
    assert weights_hash(run) == weights_hash(lacking)
    assert losses_state(run) == losses_state(lacking), "its loss is no part of the statistics"


def test_what_is_taken_for_a_spike_survives_a_resume(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiny(corpus_file, *SPIKE, "trainer.skip_spikes=6", steps=40)
    whole = train(compose(own)).run
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "resumed"))
    with pytest.raises(Stopped):
        train(compose([*own, "+callback@callbacks.stop=signal_at", "callbacks.stop.step=25"]))
    run = train(compose(own)).run
    assert passed_batches(run) == passed_batches(whole) == [30], "25 losses before the resume were not forgotten"
    assert losses_state(run) == losses_state(whole)
    assert weights_hash(run) == weights_hash(whole)


def test_a_loss_that_is_not_finite_stands_in_no_line_and_no_statistics(corpus_file: Path) -> None:
    run = train(compose(tiny(corpus_file, *EVERY, POISON, "trainer.on_nonfinite=skip"))).run
    numbers: list[Any] = [v for line in run.metrics() for v in line.values()]
    assert all(isinstance(v, int | float) and math.isfinite(v) for v in numbers)
    assert math.isfinite(losses_state(run)["mean"])
    lines = [json.loads(line) for line in (run.directory / "passed.jsonl").read_text().splitlines()]
    assert [(m["batch"], m["step"]) for m in lines] == [(6, 7)]
    assert "nan" in lines[0]["reason"]
    saved: dict[str, Tensor] = load_file(run.directory / BATCHES / "batch-000000006.safetensors")
    assert saved["inputs"].shape == (4, 16)


@pytest.mark.parametrize("mode", ["stop", "skip", "rollback"])
def test_a_last_update_that_spoils_the_weights_ends_as_a_divergence(corpus_file: Path, mode: str) -> None:
    overrides = [*tiny(corpus_file, steps=1), "optimizer.learning_rate=1e30", f"trainer.on_nonfinite={mode}", "callbacks.checkpoint.keep=9"]
    with pytest.raises(
        DivergedError,
        match=r"the held-out loss is (nan|inf) at step 1, whose update spoilt the weights; .*a lower optimizer\.learning_rate",
    ):
        train(compose(overrides))
    run = only_run()
    assert run.state == "failed"
    assert not [c for c in checkpoint.checkpoints(run.checkpoints) if checkpoint.step_of(c) == 1], "what is spoilt is not kept"


def test_a_model_that_is_spoilt_says_so_when_it_is_to_speak(corpus_file: Path) -> None:
    spoilt = [*tiny(corpus_file, steps=1), "optimizer.learning_rate=1e30", "~callbacks.evaluation"]
    with pytest.raises(DivergedError, match="what the model says of the next token is not a number"):
        train(compose(spoilt))
