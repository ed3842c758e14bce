"""A run that stops goes on as if it had not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gptlab import compose, train
from gptlab.config.errors import CheckpointError, DivergedError, GptlabError, Stopped
from gptlab.config.registry import register
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.run import Run, locked
from gptlab.runner.trainer import Trainer
from tests.signals import SignalAt
from tests.tiny import tiny


@register("callback", "poison_at")
class PoisonAt(Callback):
    """Makes a weight NaN after a step."""

    def __init__(self, *, step: int = 6) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            with torch.no_grad():
                trainer.model.embedding.weight[0, 0] = float("nan")


@pytest.fixture(autouse=True)
def _fresh_signal() -> None:
    SignalAt.fired = False


WIDTH = 16  # of a tiny model


def weights(run: Run) -> dict[str, torch.Tensor]:
    # copies: what is loaded is a view of the file, which a test may damage
    return {k: v.clone() for k, v in checkpoint.load_model(checkpoint.require_good(run.checkpoints)).items()}


def test_resume_is_bit_exact(corpus_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    overrides = tiny(corpus_file, "model.dropout=0.2")
    whole = train(compose(overrides)).run
    assert whole is not None
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "other"))
    interrupted = [*overrides, "+callback@callbacks.stop=signal_at"]
    with pytest.raises(Stopped) as stopped:
        train(compose(interrupted))
    assert stopped.value.code == 75
    second = train(compose(interrupted))
    assert second.state == "done"
    assert second.run is not None
    assert second.run.identity == whole.identity, "a callback that changes no number is no part of the identity"
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second.run)[name]), name
    one, two = ([(m["step"], m.get("train/loss"), m.get("val/loss")) for m in r.metrics()] for r in (whole, second.run))
    assert one == two


def test_a_resume_replays_and_replaces_what_came_after_its_checkpoint(corpus_file: Path) -> None:
    overrides = tiny(corpus_file, "callbacks.checkpoint.every=4")
    with pytest.raises(DivergedError):
        train(compose([*overrides, "+callback@callbacks.poison=poison_at"]))
    again = train(compose(overrides))
    assert again.state == "done"
    assert again.run is not None
    steps = [m["step"] for m in again.run.metrics() if "train/loss" in m]
    assert steps == list(range(1, 13))


def test_divergence_is_seen_before_the_update_and_keeps_the_last_good_checkpoint(corpus_file: Path) -> None:
    with pytest.raises(DivergedError) as error:
        train(compose([*tiny(corpus_file, "callbacks.checkpoint.every=3"), "+callback@callbacks.poison=poison_at"]))
    assert error.value.code == 4
    assert "step 7" in str(error.value)
    run = Run(next(Path(os.environ["GPTLAB_RUNS"]).glob("*/*/config.json")).parent)
    assert run.state == "failed"
    failed = run.read("failed.json")
    assert failed is not None
    assert failed["code"] == 4
    assert "Traceback" in (run.directory / "log.txt").read_text()
    # step 6's checkpoint was saved before the weight was poisoned: callbacks run in the order of the config
    assert all(torch.isfinite(v).all() for v in weights(run).values())


def test_the_same_command_again_is_skipped_and_rerun_starts_over(corpus_file: Path) -> None:
    first = train(compose(tiny(corpus_file)))
    assert first.state == "done"
    assert train(compose(tiny(corpus_file))).state == "skipped"
    assert train(compose(tiny(corpus_file, "study=another"))).state == "skipped", "found by identity across studies"
    assert train(compose(tiny(corpus_file)), rerun=True).state == "done"


def test_a_second_process_on_a_run_is_refused_with_the_holder(corpus_file: Path) -> None:
    run = train(compose(tiny(corpus_file))).run
    assert run is not None
    with locked(run):
        assert run.read("done.json") is not None
        with pytest.raises(GptlabError, match=rf"is being trained by process {os.getpid()} on "):
            train(compose(tiny(corpus_file)), rerun=True)
    assert train(compose(tiny(corpus_file)), rerun=True).state == "done", "a lock that nobody holds is free"


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_falls_back_to_the_newest_good_checkpoint(corpus_file: Path) -> None:
    overrides = tiny(corpus_file, "callbacks.checkpoint.every=4", "callbacks.checkpoint.keep=3")
    run = train(compose(overrides)).run
    assert run is not None
    good = weights(run)
    (run.directory / "done.json").unlink()
    newest = checkpoint.checkpoints(run.checkpoints)[0]
    _damage(newest / "model.safetensors")
    assert "sha256" in (checkpoint.problem(newest) or "")
    again = train(compose(overrides))
    assert again.state == "done"
    for name, value in weights(run).items():
        assert torch.equal(value, good[name]), name


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json", "manifest.json"])
def test_any_damaged_file_of_a_checkpoint_is_noticed(corpus_file: Path, file: str) -> None:
    run = train(compose(tiny(corpus_file, steps=2))).run
    assert run is not None
    newest = checkpoint.checkpoints(run.checkpoints)[0]
    (newest / file).write_bytes((newest / file).read_bytes()[:-3])
    for checkpoint_folder in checkpoint.checkpoints(run.checkpoints)[1:]:
        checkpoint_folder.rename(run.directory / checkpoint_folder.name)
    with pytest.raises(CheckpointError, match=file if file != "manifest.json" else "manifest"):
        checkpoint.require_good(run.checkpoints)


def test_an_accumulated_step_is_the_step_of_the_whole_batch(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(compose(tiny(corpus_file))).run
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "other"))
    split = train(compose(tiny(corpus_file, "hardware.micro_batch=1"))).run
    assert whole is not None
    assert split is not None
    assert whole.identity == split.identity
    for name, value in weights(whole).items():
        one, two = value, weights(split)[name]
        if name.endswith("qkv.bias"):  # no loss depends on the keys' bias: Adam makes steps of the rounding of a gradient of zero
            one, two = (torch.cat([t[:WIDTH], t[2 * WIDTH :]]) for t in (one, two))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}")


def test_a_time_budget_ends_and_cools_down(corpus_file: Path) -> None:
    run = train(compose(tiny(corpus_file, "trainer.budget=0.01min", "schedule.warmup=2"))).run
    assert run is not None
    done = run.read("done.json")
    assert done is not None
    assert 0.6 <= done["summary"]["seconds"] < 3
    rates = [m["train/learning_rate"] for m in run.metrics() if "train/learning_rate" in m]
    assert rates[-1] < 0.15 * max(rates)


@pytest.mark.parametrize("precision", ["bf16"])
def test_bf16_trains_to_about_the_same_loss(corpus_file: Path, precision: str) -> None:
    exact = train(compose(tiny(corpus_file, "hardware.precision=fp32"))).run
    rough = train(compose(tiny(corpus_file, f"hardware.precision={precision}"))).run
    assert exact is not None
    assert rough is not None
    assert exact.identity != rough.identity
    a, b = ((r.read("done.json") or {})["summary"]["val/loss"] for r in (exact, rough))
    assert abs(a - b) < 0.02
    assert a != b
