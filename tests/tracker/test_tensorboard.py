"""TensorBoard's own reader finds in a run's event files what its metrics.jsonl says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.config.errors import ConfigError, Stopped
from gptlab.runner.run import Run, all_runs
from gptlab.tracker.protocol import RunInfo
from gptlab.tracker.tensorboard import TensorBoard
from tests.faulty import faults
from tests.tiny import tiny

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(run: Run) -> dict[str, dict[int, float]]:
    reader = event_accumulator.EventAccumulator(str(run.directory / "tensorboard"))
    reader.Reload()
    return {name: {event.step: event.value for event in reader.Scalars(name)} for name in reader.Tags()["scalars"]}


def written(run: Run, name: str) -> dict[int, float]:
    return {m["step"]: m[name] for m in run.metrics() if name in m}


def test_every_metric_is_there_at_its_step(corpus_file: Path) -> None:
    run = train(compose([*tiny(corpus_file, "callbacks.evaluation.every=3", steps=6), "tracker=tensorboard"])).run
    found = scalars(run)
    for name in ("train/loss", "val/loss", "train/gradient_norm"):
        assert found[name] == pytest.approx(written(run, name), rel=1e-6)
    assert not {"step", "tokens", "wall"} & found.keys()
    config = event_accumulator.EventAccumulator(str(run.directory / "tensorboard"))
    config.Reload()
    assert config.Tags()["tensors"] == ["config/text_summary", "sample/text_summary"]


def test_histograms_are_there_at_their_steps(corpus_file: Path) -> None:
    histograms = ["+callback@callbacks.histograms=histograms", "callbacks.histograms.every=3"]
    run = train(compose([*tiny(corpus_file, *histograms, steps=6), "tracker=tensorboard"])).run
    events = event_accumulator.EventAccumulator(str(run.directory / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    gradients = [name for name in events.Tags()["histograms"] if name.startswith("gradients/blocks.0")]
    assert gradients
    assert [h.step for h in events.Histograms(gradients[0])] == [3, 6]
    assert events.Histograms(gradients[0])[0].histogram_value.num > 0


def test_a_table_is_there_as_text(corpus_file: Path) -> None:
    tracker = TensorBoard()
    folder = corpus_file.parent / "tabled"
    tracker.start(RunInfo("x", "study", "name", folder, {}, -1))
    tracker.table(7, "rollouts", ["prompt", "reward"], [["1|2\n", 0.5], ["=", 1]])
    tracker.finish({}, 0)
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("rollouts/text_summary")
    assert event.step == 7
    assert event.tensor_proto.string_val[0].decode() == "| prompt | reward |\n| --- | --- |\n| 1\\|2\\n | 0.5 |\n| = | 1 |"


def test_a_resumed_run_goes_on_in_the_same_curves(corpus_file: Path) -> None:
    overrides = [*tiny(corpus_file, steps=8), "tracker=tensorboard", "callbacks.checkpoint.every=2"]
    with faults():
        with pytest.raises(Stopped):
            train(compose([*overrides, "+callback@callbacks.stop=signal_at", "callbacks.stop.step=5"]))
        train(compose(overrides))
    (run,) = all_runs()
    assert scalars(run)["train/loss"] == pytest.approx(written(run, "train/loss"), rel=1e-6)
    assert list(scalars(run)["train/loss"]) == list(range(1, 9))


def test_without_the_library_its_extra_is_named(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"tracker=tensorboard needs the library tensorboard: run `pip install 'gptlab\[tensorboard\]'`"):
        train(compose([*tiny(corpus_file), "tracker=tensorboard"]))
    assert not all_runs()
