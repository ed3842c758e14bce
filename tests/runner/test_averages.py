"""Averages of the weights: what they are, what uses them, and that training does not notice them."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptlab import compose, load, train
from gptlab.config.errors import CheckpointError, ConfigError, Stopped
from gptlab.config.registry import register
from gptlab.data.prepare import prepare
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.export import export
from gptlab.runner.load import Loaded
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from gptlab.runner.validation import measure
from tests.faulty import faults
from tests.ranks import Job, trained
from tests.signals import SignalAt
from tests.tiny import tiny

EMA = ("+callback@callbacks.ema=ema", "callbacks.ema.decay=0.6")
FREE = ("optimizer=schedule_free", "schedule=constant", "schedule.warmup=3")
OFTEN = ("callbacks.evaluation.every=1", "callbacks.checkpoint.every=4", "callbacks.checkpoint.keep=9")
NOTED: list[dict[str, Tensor]] = []  # the weights before the first step and after each


@register("callback", "note_weights")
class NoteWeights(Callback):
    """Keeps a copy of the weights after each step."""

    def on_start(self, trainer: Trainer) -> None:
        NOTED[:] = [self._copy(trainer)]

    def on_step(self, trainer: Trainer) -> None:
        NOTED.append(self._copy(trainer))

    def _copy(self, trainer: Trainer) -> dict[str, Tensor]:
        return {path: p.detach().clone() for path, p in trainer.model.named_parameters()}


@pytest.fixture(autouse=True)
def _fresh_signal() -> None:
    SignalAt.fired = False


def done(file: Path, *more: str, steps: int = 12) -> Run:
    return train(compose(tiny(file, *more, steps=steps))).run


def parameters(loaded: Loaded) -> dict[str, Tensor]:
    return {path: p.detach() for path, p in loaded.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def saved(run: Run) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    model, others = checkpoint.load_tensors(checkpoint.require_good(run.checkpoints))
    return {name: tensor.clone() for name, tensor in (model | others).items()}


def column(run: Run, name: str) -> list[float]:
    return [m[name] for m in run.metrics() if name in m]


def held_out(loaded: Loaded) -> float:
    with contextlib.closing(prepare(loaded.config.data)) as data:
        return float(measure(loaded.model, data, loaded.config)["val/loss"])


@pytest.mark.parametrize(("every", "warm"), [(1, True), (3, True), (1, False)])
def test_ema_is_its_formula_in_every_checkpoint(corpus_file: Path, every: int, warm: bool) -> None:
    settings = (f"callbacks.ema.every={every}", f"callbacks.ema.warm={str(warm).lower()}", "+callback@callbacks.note=note_weights")
    run = done(corpus_file, *EMA, *OFTEN, *settings)
    mean = NOTED[0]
    for step, weights in enumerate(NOTED[1:], 1):
        if step % every == 0:
            decay = (min(0.6, (1 + step) / (10 + step)) if warm else 0.6) ** every
            mean = {path: decay * mean[path] + (1 - decay) * value for path, value in weights.items()}
        if step % 4 == 0:
            found = parameters(load(run, checkpoint=str(step), weights="average"))
            for path, value in found.items():
                torch.testing.assert_close(value, mean[path], rtol=0, atol=1e-6, msg=f"{path} at step {step}")
            assert same(parameters(load(run, checkpoint=str(step))), weights), "the default of a run with an ema is what was trained"


def test_training_does_not_notice_an_ema(corpus_file: Path) -> None:
    plain, with_ema = done(corpus_file), done(corpus_file, *EMA, *OFTEN)
    assert plain.identity != with_ema.identity, "a run without an average is not the one that was asked for"
    assert column(plain, "train/loss") == column(with_ema, "train/loss")
    assert column(plain, "val/loss")[-1] == column(with_ema, "val/loss")[-1]
    assert same(parameters(load(plain)), parameters(load(with_ema)))


def test_ema_is_measured_beside_the_weights_on_every_set(corpus_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(reversed(corpus_file.read_text(encoding="utf-8"))), encoding="utf-8")
    run = done(corpus_file, *EMA, f"+data.validation.other={other}")
    (last,) = [m for m in run.metrics() if m["step"] == 12 and "val/loss" in m]
    assert {"val_ema/loss", "val_ema/bits_per_byte", "val_ema/other/loss"} <= last.keys()
    trained, average = load(run), load(run, weights="average")
    assert (trained.weights, average.weights) == ("trained", "average")
    assert held_out(trained) == pytest.approx(last["val/loss"], abs=1e-6)
    assert held_out(average) == pytest.approx(last["val_ema/loss"], abs=1e-6)
    assert abs(last["val/loss"] - last["val_ema/loss"]) > 1e-4


@pytest.mark.parametrize("kind", [EMA, FREE], ids=["ema", "schedule_free"])
def test_resume_is_bit_exact_with_an_average(
    corpus_file: Path, kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = tiny(corpus_file, "model.dropout=0.2", *kind)
    whole = train(compose(overrides)).run
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "other"))
    interrupted = [*overrides, "+callback@callbacks.stop=signal_at"]
    with pytest.raises(Stopped):
        train(compose(interrupted))
    second = train(compose(interrupted))
    assert second.state == "done"
    assert second.run.identity == whole.identity
    assert same(saved(whole), saved(second.run)), "weights, optimizer and average"
    for name in ("train/loss", "val/loss", "val_ema/loss"):
        assert column(whole, name) == column(second.run, name)


def test_a_resume_replays_the_average_from_its_checkpoint(corpus_file: Path) -> None:
    run = done(corpus_file, *EMA, *OFTEN)
    whole = saved(run)
    for newer in checkpoint.checkpoints(run.checkpoints)[:-1]:  # all but step 4
        shutil.rmtree(newer)
    (run.directory / "done.json").unlink()
    assert same(saved(done(corpus_file, *EMA, *OFTEN)), whole)


def test_a_roll_back_takes_the_average_back_too(corpus_file: Path) -> None:
    poisoned = tiny(corpus_file, *EMA, *OFTEN, "+callback@callbacks.fault=poison", "callbacks.fault.batches=[6]")
    with faults():
        passed = train(compose([*poisoned, "trainer.on_nonfinite=skip"])).run
        expected = saved(passed)
        back = train(compose([*poisoned, "trainer.on_nonfinite=rollback"]), rerun=True).run
    assert same(saved(back), expected)
    assert int(expected["callbacks.ema.steps"]) == 12


def test_a_checkpoint_without_the_average_does_not_fit(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("gptlab.runner.averages.EMA.tensors", lambda self, trainer: {})
        patch.setattr("gptlab.runner.averages.EMA.after_update", lambda self, trainer: None)
        patch.setattr("gptlab.runner.averages.EMA.makes_average", False)
        run = done(corpus_file, *EMA, *OFTEN)
    (run.directory / "done.json").unlink()
    with pytest.raises(CheckpointError, match=r"does not fit this run: it has no callbacks\.ema\.average\."):
        done(corpus_file, *EMA, *OFTEN)


def test_schedule_free_is_used_with_its_average(corpus_file: Path) -> None:
    run = done(corpus_file, *FREE)
    assert load(run).weights == "average"
    assert held_out(load(run)) == pytest.approx(column(run, "val/loss")[-1], abs=1e-6)
    assert abs(held_out(load(run, weights="trained")) - column(run, "val/loss")[-1]) > 1e-5
    assert not column(run, "val_ema/loss")


def test_schedule_free_does_not_depend_on_how_often_it_is_measured(corpus_file: Path) -> None:
    seldom, often = done(corpus_file, *FREE), train(compose(tiny(corpus_file, *FREE, *OFTEN)), rerun=True).run
    assert seldom.identity == often.identity
    assert column(seldom, "train/loss") == column(often, "train/loss")


def test_the_weights_are_back_bit_for_bit_however_the_uses_are_nested(corpus_file: Path) -> None:
    seen: list[bool] = []

    def on_end(self: NoteWeights, trainer: Trainer) -> None:
        now, average = self._copy(trainer), trainer.averages._current()
        average = {path: value.clone() for path, value in average.items()}
        with trainer.averages.using("average"), trainer.averages.using("average"):
            seen.append(same(self._copy(trainer), average))
            with trainer.averages.using("trained"):
                seen.append(same(self._copy(trainer), now))
            seen.append(same(self._copy(trainer), average))
            with pytest.raises(AssertionError):
                trainer.save_checkpoint()
        with pytest.raises(ZeroDivisionError), trainer.averages.using("average"):
            1 / 0  # noqa: B018
        seen.append(same(self._copy(trainer), now))
        seen.append(same(trainer.averages._current(), average))

    for kind in (EMA, FREE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NoteWeights, "on_end", on_end, raising=False)
            done(corpus_file, *kind, "+callback@callbacks.note=note_weights", steps=3)
    assert seen == [True] * 10


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((*EMA, "+callback@callbacks.slow=ema"), r"^callbacks\.slow: .* one average .* callbacks\.ema makes it"),
        ((*EMA, *FREE), r"^callbacks\.ema: .* one average .* optimizer=schedule_free makes it"),
        (("optimizer=schedule_free",), r"^optimizer=schedule_free averages .* schedule=cosine ends at 0\.1 .* use schedule=constant$"),
        (("optimizer=schedule_free", "schedule=inverse_sqrt"), r"use schedule=constant$"),
        (("callbacks.samples.weights=average",), r"^weights=average: this run keeps no average"),
        ((*EMA, "callbacks.ema.decay=1"), r"^callbacks\.ema: decay=1"),
        ((*EMA, "callbacks.ema.every=0"), r"every=0"),
    ],
)
def test_what_cannot_be_averaged_is_refused_before_the_first_step(corpus_file: Path, more: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        done(corpus_file, *more)
    assert error.value.code == 2
    assert not list(Path(os.environ["GPTLAB_RUNS"]).glob("*/*/checkpoints/*"))


def test_a_run_without_an_average_has_none_to_load_or_export(finished_run: Run, tmp_path: Path) -> None:
    for use in (lambda: load(finished_run, weights="average"), lambda: export(finished_run, tmp_path / "x.safetensors", weights="average")):
        with pytest.raises(ConfigError, match=r"weights=average: .*step-000000012 keeps no average .*callbacks\.ema=ema or ") as error:
            use()
        assert error.value.code == 2
    with pytest.raises(ConfigError, match=r"weights=averag is not one of default, trained, average \(did you mean average\?\)"):
        load(finished_run, weights="averag")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("kind", [EMA, FREE], ids=["ema", "schedule_free"])
def test_an_exported_average_is_the_average_and_says_so(corpus_file: Path, tmp_path: Path, kind: tuple[str, ...]) -> None:
    run = done(corpus_file, *kind)
    name = "val_ema/loss" if kind is EMA else "val/loss"
    for which in ("trained", "average"):
        made = export(run, tmp_path / f"{which}.safetensors", weights=which)
        expected = column(run, "val/loss" if which == "trained" else name)[-1]
        assert made.loss == (None if kind is FREE and which == "trained" else expected)
        opened = load(str(made.file))
        assert opened.weights == which == load(str(made.file), weights=which).weights
        assert same(parameters(opened), parameters(load(run, weights=which)))
        other = "average" if which == "trained" else "trained"
        with pytest.raises(ConfigError, match=rf"weights={other}: .* holds its {which} weights alone"):
            load(str(made.file), weights=other)
    assert not same(parameters(load(str(tmp_path / "trained.safetensors"))), parameters(opened))


def test_samples_are_written_by_the_weights_that_were_asked_for(corpus_file: Path) -> None:
    texts = {}
    for which in ("trained", "average"):
        settings = ("optimizer.learning_rate=0.1", "callbacks.samples.tokens=60", f"callbacks.samples.weights={which}")
        run = train(compose(tiny(corpus_file, *EMA, *settings)), rerun=True).run
        texts[which] = (run.directory / "samples" / "step-000000012.txt").read_text()
        loaded = load(run, weights=which)
        assert texts[which].strip("\n") == loaded.sample("\n", max_tokens=60).strip("\n")
    assert texts["trained"] != texts["average"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EMA, FREE], ids=["ema", "schedule_free"])
def test_averages_of_a_sharded_run_are_those_of_a_whole_one(corpus_file: Path, tmp_path: Path, kind: tuple[str, ...]) -> None:
    overrides = tiny(corpus_file, *kind, "callbacks.checkpoint.every=4", "callbacks.checkpoint.keep=9", "hardware.micro_batch=2")
    jobs = [Job(tmp_path / "fsdp", [*overrides, "hardware/strategy=fsdp"])]
    gathered = Job(tmp_path / "gathered", [*overrides, "hardware/strategy=fsdp", "hardware.strategy.reshard=false"])
    outcomes = trained(tmp_path, [*jobs, gathered])
    assert [o["state"] for ranks in outcomes for o in ranks] == ["done"] * 4, outcomes
    kept = Run(gathered.directory)
    for name in ("train/loss", "val/loss", "val_ema/loss"):
        assert column(kept, name) == column(Run(jobs[0].directory), name), "parameters that stay gathered are as those that do not"
    whole, parts = done(corpus_file, *kind), Run(jobs[0].directory)
    for which in ("trained", "average"):
        one, other = parameters(load(whole, weights=which)), parameters(load(parts, weights=which))
        for path, value in one.items():
            torch.testing.assert_close(other[path], value, rtol=0, atol=1e-5, msg=path)
    for name in ("val/loss", "val_ema/loss"):
        assert column(parts, name) == pytest.approx(column(whole, name), abs=1e-5)
    before = saved(parts)
    (parts.directory / "done.json").unlink()
    for newer in checkpoint.checkpoints(parts.checkpoints)[:-1]:  # all but step 4
        shutil.rmtree(newer)
    (outcome,) = trained(tmp_path, jobs)
    assert [o["state"] for o in outcome] == ["done", "done"], outcome
    assert same(before, saved(parts)), "resumed at step 4, bit for bit"
