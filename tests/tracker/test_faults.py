"""What a W&B server that is slow, down, forbidding or dying costs a run, through the real client: the fault table.

`GPTLAB_FAULT_STEPS=200 pytest tests/tracker/test_faults.py -m slow -s` prints it, of `nano`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import wandb

from gptlab import compose, train
from gptlab.config.registry import register
from gptlab.runner.callback import Callback
from gptlab.runner.trainer import Trainer
from gptlab.tracker import wandb as tracker_wandb
from gptlab.tracker.guard import Guarded
from gptlab.tracker.protocol import Metrics
from tests.stand_ins.wandb_server import Server, wandb_server
from tests.tiny import tiny

STEPS = int(os.environ.get("GPTLAB_FAULT_STEPS", "40"))
AT: dict[int, tuple[Server, str]] = {}  # after which step a server changes its manner


@register("callback", "server_manner")
class ServerManner(Callback):
    """Changes a server's manner after a step."""

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step in AT:
            server, manner = AT[trainer.state.step]
            server.manner = manner


class Case(NamedTuple):
    """What the server is like from the beginning on, and after some share of the steps."""

    manner: str
    later: str = ""
    share: float = 0.5
    warnings: int = 0


CASES = {
    "no tracker": Case("none"),
    "offline": Case("offline"),
    "up": Case("up"),
    "slow: a second an answer": Case("slow", warnings=1),
    "not there": Case("absent", warnings=1),
    "no answer at the start": Case("silent", warnings=1),
    "a proxy's HTML": Case("html", warnings=1),
    "no rights (403)": Case("forbidden", warnings=1),
    "gone mid-run": Case("up", "gone", warnings=1),
    "no answer from mid-run on": Case("up", "silent", warnings=1),
    "gone at the finish": Case("up", "gone", 1.0, warnings=1),
}


SPENT = {"log": 0.0}  # seconds in the tracker's calls while steps are made


class Timed(Guarded):
    """Says how long training waits for its tracker."""

    def log(self, metrics: Metrics) -> None:
        began = time.perf_counter()
        super().log(metrics)
        SPENT["log"] += time.perf_counter() - began


@pytest.fixture
def _fresh_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("gptlab.runner.train.Guarded", Timed)
    monkeypatch.setattr(tracker_wandb, "INIT_TIMEOUT", 4.0)
    monkeypatch.setattr(tracker_wandb, "FINISH_TIMEOUT", 4.0)
    yield
    AT.clear()
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_client")
def test_no_server_costs_a_run_more_than_a_warning(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, plain = [], 0.0
    for number, (name, case) in enumerate(CASES.items()):
        wandb.teardown()
        with wandb_server() as server:
            server.manner = case.manner
            monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9" if case.manner == "absent" else server.url)
            AT.clear()
            if case.later:
                AT[max(1, int(STEPS * case.share))] = (server, case.later)
            tracker = {"none": "none", "offline": "offline"}.get(case.manner, "wandb")
            own = ["model=nano", "data=text", f"data.corpus.path={corpus_file}", "data/tokenizer=char", "trainer.log_every=1"]
            own = [*own, f"trainer.budget={STEPS}steps", "hardware.threads=1"] if STEPS > 40 else tiny(corpus_file, steps=STEPS)
            capsys.readouterr()
            SPENT["log"] = 0.0
            began = time.monotonic()
            arguments = [*own, f"tracker={tracker}", "study=faults", f"seed={number}", "+callback@callbacks.manner=server_manner"]
            outcome = train(compose(arguments))
            waited = time.monotonic() - began
            shown = capsys.readouterr().out
            assert outcome.state == "done", name
            assert outcome.run is not None
            found = outcome.run.metrics()
            steps = [m["seconds"] for m in found if "train/loss" in m]
            assert len(steps) == STEPS, name
            step = statistics.median(b - a for a, b in pairwise(steps))
            plain = plain or step
            warned = shown.count("W&B ") + shown.count("the tracker failed")
            assert warned == case.warnings, f"{name}: {shown}"
            arrived = len(_steps(server, f"faults-{outcome.run.identity}"))
            rest, share = waited - steps[-1], SPENT["log"] / steps[-1]
            # Every step is logged here, ten times as often as by default: half a percent of a run's steps there.
            assert STEPS <= 40 or share < 0.05, f"{name}: {share:.1%} of the steps"
        synced = _synced(outcome.run.directory, f"faults-{outcome.run.identity}") if tracker != "none" else 0
        if tracker != "none":
            assert synced == STEPS, f"{name}: {synced} of {STEPS} steps after wandb sync"
        rows.append((name, step / plain, share, rest, warned, arrived, synced))
    with capsys.disabled():
        print("\n| server | step, to none | of it logging | start and finish, s | warnings | steps there | after `wandb sync` |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for row in rows:
            print("| {} | {:.2f} | {:.1%} | {:.1f} | {} | {} | {} |".format(*row))


def _steps(server: Server, run: str) -> set[int]:
    return {h["step"] for h in server.run(run).history if "train/loss" in h}


def _synced(directory: Path, run: str) -> int:
    """The steps that a server has once what lies in the run's folder was synced to it."""
    files = sorted(directory.glob("wandb/*run-*"))[0]  # "offline-run-" before "run-", which a start that failed leaves
    with wandb_server() as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.url}
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(files)]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return len(_steps(server, run))
