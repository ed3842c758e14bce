"""A run that is longer than a cluster's session: it is put back into the queue, and ends as if it had never been stopped."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptlab import compose, train
from gptlab.runner import checkpoint
from gptlab.runner.run import Run
from tests.ranks import FAULTS, PATIENCE, ROOT, Session, gptlab, until
from tests.stand_ins import slurm
from tests.tiny import tiny

submitit = pytest.importorskip("submitit")
pytestmark = pytest.mark.slow

STEPS = 40
PLAIN = ["model.dropout=0.1", "hardware.precision=fp32"]
PACED = ["+callback@callbacks.pace=pace", "callbacks.pace.seconds=0.4"]  # 16 s: too long for one session of these tests


def our_runs() -> list[Run]:
    return [Run(f.parent) for f in Path(os.environ["GPTLAB_RUNS"]).glob("*/*/config.json")]


def same_as_uninterrupted(runs: list[Run], overrides: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the run of these overrides are those of one that nobody stopped."""
    monkeypatch.setenv("GPTLAB_RUNS", str(folder))
    whole = train(compose(overrides)).run
    (run,) = [r for r in runs if r.identity == whole.identity]
    ours, theirs = (checkpoint.load_model(checkpoint.require_good(r.checkpoints)) for r in (whole, run))
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
    assert [m["train/loss"] for m in run.metrics() if "train/loss" in m] == [m["train/loss"] for m in whole.metrics() if "train/loss" in m]


def test_a_run_longer_than_its_session_is_requeued_by_submitit_and_ends(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    overrides = tiny(corpus_file, *PLAIN, steps=STEPS)
    executor = submitit.LocalExecutor(tmp_path / "jobs", max_num_timeout=5)
    executor.update_parameters(timeout_min=0.5, signal_delay_s=16)  # its USR2 comes after 14 s
    job = executor.submit(Session([*overrides, *PACED]))
    try:
        until(lambda: job.paths.result_pickle.exists() or job.done(), "the job")
        told = job.stderr() or ""
        assert job.result() == "done", told
    finally:
        job.cancel()
    assert "Caught signal SIGUSR2" in told
    (run,) = our_runs()
    sessions = (job.stdout() or "").count("Requeued job")
    assert sessions > 0
    assert (run.directory / "log.txt").read_text().count("stopped; the launcher puts the job back into its queue") == sessions
    assert (job.stdout() or "").count("resumed at step") == sessions
    same_as_uninterrupted([run], overrides, tmp_path / "whole", monkeypatch)


def test_a_sweep_of_hydras_submitit_launcher_goes_on_in_its_next_session(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = ["+callback@callbacks.fault=signal_at", "callbacks.fault.step=13", "callbacks.fault.kind=SIGUSR2"]  # as submitit sends it
    overrides = tiny(corpus_file, *PLAIN, steps=STEPS)
    with gptlab(tmp_path, "-m", "hydra/launcher=submitit_local", *overrides, *struck, "seed=0,1", ranks=0) as sweep:
        assert sweep.wait() == 0, sweep.output
        assert "2 runs: 2 trained, 0 skipped, 0 failed" in sweep.output
    runs = our_runs()
    assert [r.state for r in runs] == ["done", "done"]
    for run in runs:
        assert (run.directory / "log.txt").read_text().count("puts the job back into its queue") == 1
    same_as_uninterrupted(runs, overrides, tmp_path / "whole", monkeypatch)


def test_a_sweep_on_slurm_goes_on_session_after_session(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of three sessions each, through submitit's own SLURM executor; what they leave is on the disk that the cluster shares."""
    monkeypatch.setenv("PATH", f"{slurm.install(tmp_path / 'slurm')}:{os.environ['PATH']}")
    monkeypatch.setenv("GPTLAB_SLURM", str(tmp_path / "state"))
    monkeypatch.setenv("GPTLAB_SLURM_SESSION", "14")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    overrides = tiny(corpus_file, *PLAIN, steps=STEPS)
    limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.mem_gb=1", "hydra.launcher.partition=short"]
    with gptlab(tmp_path, "-m", "hydra/launcher=submitit_slurm", *limits, *overrides, *PACED, "seed=0,1", ranks=0) as sweep:
        until(lambda: sweep.process.poll() is not None or any((tmp_path / "state").glob("*.state")), "a job")
        assert sweep.wait(60) == 0, sweep.output + "".join(f.read_text() for f in (tmp_path / "state").glob("*.out"))
        assert "2 runs: 2 trained, 0 skipped, 0 failed" in sweep.output
    script = (tmp_path / "state" / "1.sh").read_text()
    assert "#SBATCH --array=0-1%2" in script
    assert "#SBATCH --partition=short" in script
    assert "#SBATCH --signal=USR2@120" in script
    requeued = (tmp_path / "state" / "requeued").read_text().split()
    assert set(requeued) == {"1_0", "1_1"}
    runs = our_runs()
    assert [r.state for r in runs] == ["done", "done"]
    assert sum((r.directory / "log.txt").read_text().count("puts the job back into its queue") for r in runs) == len(requeued)
    assert not (Path(os.environ["GPTLAB_RUNS"]) / ".launch").exists()
    same_as_uninterrupted(runs, overrides, tmp_path / "whole", monkeypatch)


def test_a_batch_script_that_requeues_on_75_ends_with_the_same_weights(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = tiny(corpus_file, *PLAIN, steps=STEPS)
    queue, cluster = tmp_path / "queue", tmp_path / "bin" / "scontrol"  # a stand-in for SLURM's
    cluster.parent.mkdir()
    cluster.write_text(f'#!/bin/sh\necho "$@" >> {queue}\n')
    cluster.chmod(cluster.stat().st_mode | stat.S_IXUSR)
    command = [sys.executable, "-m", "gptlab", "--plugin", str(FAULTS), "train", *overrides, *PACED, "trainer.time_limit=9s"]
    script = '"$@"; code=$?\nif [ $code -eq 75 ]; then scontrol requeue $SLURM_JOB_ID; fi\nexit $code'
    environment = {**os.environ, "PATH": f"{cluster.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    codes = []
    while not codes or codes[-1] == 75:
        codes.append(subprocess.run(["sh", "-c", script, "sh", *command], cwd=ROOT, env=environment, timeout=PATIENCE).returncode)
        assert len(codes) < 10
    assert codes[-1] == 0
    assert len(codes) > 1
    assert queue.read_text() == "requeue 7\n" * (len(codes) - 1)
    same_as_uninterrupted(our_runs(), overrides, tmp_path / "whole", monkeypatch)
