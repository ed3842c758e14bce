"""W&B through its real client: what arrives online, what stays offline, and what a dead server costs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from gptlab import compose, train
from gptlab.config.errors import DivergedError, Stopped
from gptlab.config.registry import register
from gptlab.runner.callback import Callback
from gptlab.runner.tracked import add_figures
from gptlab.runner.trainer import Trainer
from gptlab.tracker import wandb as tracker_wandb
from tests.stand_ins.wandb_server import Server, wandb_server
from tests.tiny import tiny

PULL: list[Server] = []


@register("callback", "pull_server")
class PullServer(Callback):
    """Takes the server away after a step."""

    def __init__(self, *, step: int = 4) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            for server in PULL:
                server.shutdown()
                server.server_close()


@register("callback", "stop_once")
class StopOnce(Callback):
    """Asks for a stop after a step, once."""

    fired = False

    def __init__(self, *, step: int = 5) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step and not StopOnce.fired:
            StopOnce.fired = True
            trainer.stop.ask(15)


@pytest.fixture(autouse=True)
def _fresh_client() -> Iterator[None]:
    """The client's service process remembers the server it first met: each test gets its own."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"):
            monkeypatch.delenv(name, raising=False)
        yield server


def test_config_group_name_history_and_summary_arrive(corpus_file: Path, online: Server) -> None:
    overrides = ["model/norm=rmsnorm", "seed=1", "study=online"]
    outcome = train(compose(tiny(corpus_file, *overrides, "tracker=wandb"), name="rmsnorm seed 1"), title="3/4 rmsnorm seed 1")
    assert outcome.run is not None
    run = online.runs[f"online-{outcome.run.identity}"]
    assert run.settings["groupName"] == "online"
    assert run.settings["displayName"] == "rmsnorm seed 1"
    assert run.config["model/norm"]["value"] == "rmsnorm"
    assert run.config["model.width"]["value"] == 16
    assert run.config["parameters"]["value"] > 0
    losses = {h["step"]: h["train/loss"] for h in run.history if "train/loss" in h}
    written = {m["step"]: m["train/loss"] for m in outcome.run.metrics() if "train/loss" in m}
    assert losses == pytest.approx(written)
    assert list(losses) == list(range(1, 13))
    assert run.summary["val/loss"] == pytest.approx(outcome.run.metrics()[-1]["val/loss"])
    assert run.exit_code == 0
    environment = " ".join(str(v) for v in run.config.values())
    assert "0" * 40 not in environment


def test_rollouts_arrive_in_one_table_at_the_end(online: Server) -> None:
    overrides = [
        "data=addition", "data.corpus.digits=1", "objective=grpo", "objective.group=2", "objective.checked=2", "objective.shown=1",
        "model.width=8", "model.depth=1", "model.heads=1", "model.context_length=5", "trainer.batch_tokens=20", "trainer.budget=3steps",
        "data.validation_tokens=5", "study=rolled", "tracker=wandb",
    ]  # fmt: skip
    outcome = train(compose(overrides))
    tables = [h["rollouts"] for h in online.runs[f"rolled-{outcome.run.identity}"].history if "rollouts" in h]
    assert [(t["nrows"], t["ncols"]) for t in tables] == [(3 * 4, 8)]


def test_arms_samples_histograms_and_the_last_checkpoint_arrive(corpus_file: Path, online: Server) -> None:
    overrides = ["study=shown", "arm='rmsnorm wide'", "seed=3", "tracker=wandb", "tracker.checkpoints=true", "callbacks.samples.every=6"]
    outcome = train(compose(tiny(corpus_file, *overrides, "+callback@callbacks.histograms=histograms", "callbacks.histograms.every=5")))
    run = online.runs[f"shown-{outcome.run.identity}"]
    assert run.settings["jobType"] == "rmsnorm wide"
    assert run.settings["tags"] == ["shown", "seed 3"]
    tables = [h["samples"] for h in run.history if "samples" in h]
    assert [t["nrows"] for t in tables] == [3]  # at 6, at 12 and at the end
    pages = [(h["step"], h["sample"]["_type"]) for h in run.history if "sample" in h]
    assert pages == [(6, "html-file"), (12, "html-file"), (12, "html-file")]
    name = "gradients/blocks.0.attention.query_key_value.weight"
    histograms = {h["step"]: value for h in run.history for key, value in h.items() if key.startswith("gradients/blocks.0.attention")}
    assert list(histograms) == [5, 10], name
    assert all(h["_type"] == "histogram" and sum(h["values"]) > 0 for h in histograms.values())
    kept = [a["input"] for a in online.artifacts if a["input"]["artifactTypeName"] == "model"]
    assert [a["artifactCollectionName"] for a in kept] == [f"checkpoint-shown-{outcome.run.identity}"]
    assert '"step":12' in kept[0]["metadata"]
    assert run.summary["parameters"] > 0
    assert run.summary["train/tokens_per_second"] > 0


def test_what_is_measured_afterwards_comes_to_its_summary(corpus_file: Path, online: Server) -> None:
    run = train(compose(tiny(corpus_file, "study=judged", "tracker=wandb"))).run
    there = online.runs[f"judged-{run.identity}"]
    before = len(there.history)
    add_figures(run, {"eval/english/acc": 0.61, "eval/english/acc_stderr": 0.02})
    assert (there.summary["eval"]["english"]["acc"] if "eval" in there.summary else there.summary["eval/english/acc"]) == 0.61
    assert there.summary["val/loss"] > 0, "what was there stays"
    assert there.settings["groupName"] == "judged"
    assert there.exit_code == 0
    assert len(there.history) == before, "no step of its own"


def test_offline_it_lies_in_files_for_the_same_run(corpus_file: Path) -> None:
    run = train(compose(tiny(corpus_file, "study=judged", "tracker=offline"))).run
    add_figures(run, {"eval/english/acc": 0.61})
    wandb.teardown()  # as a program's end does: the client's own process writes the last records, and `finish` does not wait for that
    files = sorted((run.directory / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-judged-{run.identity}.wandb"] * 2
    assert any(b"eval/english/acc" in file.read_bytes() for file in files)


def test_a_run_that_diverges_raises_an_alert(corpus_file: Path, online: Server) -> None:
    with pytest.raises(DivergedError):
        train(compose(tiny(corpus_file, "tracker=wandb", "study=lost", "optimizer.learning_rate=1e30")))
    assert [a["title"] for a in online.alerts] == ["The run diverged"]


def test_under_a_sweeps_agent_the_run_is_the_agents(corpus_file: Path, online: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")  # as the agent sets it for the program it starts
    monkeypatch.setenv("WANDB_RUN_ID", "agents1")
    outcome = train(compose(tiny(corpus_file, "tracker=wandb", "study=swept")))
    assert outcome.state == "done"
    run = online.runs["agents1"]
    assert run.summary["val/loss"] > 0
    assert list(online.runs) == ["agents1"]


def test_a_resumed_run_goes_on_in_the_same_place_without_repeating_steps(corpus_file: Path, online: Server) -> None:
    StopOnce.fired = False
    overrides = tiny(corpus_file, "tracker=wandb", "study=resumed", "+callback@callbacks.stop=stop_once")
    with pytest.raises(Stopped):
        train(compose(overrides))
    outcome = train(compose(overrides))
    assert outcome.run is not None
    steps = [h["step"] for h in online.runs[f"resumed-{outcome.run.identity}"].history if "train/loss" in h]
    assert steps == list(range(1, 13))


def test_a_server_that_dies_mid_run_costs_a_warning_and_never_the_run(
    corpus_file: Path, online: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_wandb, "FINISH_TIMEOUT", 2.0)
    PULL[:] = [online]
    started = time.monotonic()
    outcome = train(compose(tiny(corpus_file, "tracker=wandb", "study=pulled", "+callback@callbacks.pull=pull_server")))
    PULL.clear()
    assert outcome.state == "done"
    assert time.monotonic() - started < 30
    assert outcome.run is not None
    assert list(outcome.run.directory.glob("wandb/*/*.wandb")), "the data stays on disk for `wandb sync`"
    assert len([m for m in outcome.run.metrics() if "train/loss" in m]) == 12


def test_a_server_that_is_not_there_costs_one_warning(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker_wandb, "INIT_TIMEOUT", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    outcome = train(compose(tiny(corpus_file, "tracker=wandb", "study=absent")))
    assert outcome.state == "done"
    assert capsys.readouterr().out.count("could not be reached") == 1
    assert outcome.run is not None
    assert list(outcome.run.directory.glob("wandb/offline-run-*/*.wandb"))


def test_the_client_starts_without_its_launch_part_and_without_an_error(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb.sdk.launch")]:
        monkeypatch.delitem(sys.modules, name)
    train(compose(tiny(corpus_file, "tracker=offline")))
    assert not [name for name in sys.modules if name.startswith("wandb.sdk.launch")]
    # an error's traceback would keep the frames that called, and a run's model with them
    assert not [record.getMessage() for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_offline_files_lie_in_the_runs_folder(corpus_file: Path) -> None:
    outcome = train(compose(tiny(corpus_file, "tracker=offline")))
    assert outcome.run is not None
    files = list(outcome.run.directory.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    deadline = time.monotonic() + 30  # the client writes in a process of its own, and a run waits for it no longer than FINISH_TIMEOUT
    while files[0].stat().st_size <= 1000:
        assert time.monotonic() < deadline, f"{files[0]} has {files[0].stat().st_size} bytes"
        time.sleep(0.1)
    assert not (Path(os.environ["GPTLAB_RUNS"]).parent / "wandb").exists()
