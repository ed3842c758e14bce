"""kill -9 at any moment costs steps and changes no number: weights, metrics and the order of the samples are the uninterrupted run's."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.runner.run import Run
from tests.conftest import sentences
from tests.faulty import COMMAND, ended, faults, forked, left_over, losses, only_run, weights_hash
from tests.tiny import tiny


@pytest.fixture(autouse=True)
def _faults() -> Iterator[None]:
    with faults():
        yield


@pytest.fixture
def mix(tmp_path: Path) -> list[str]:
    """A tiny run on two texts, with dropout."""
    found = ["data=mix", "data/tokenizer=byte", "model.dropout=0.2"]
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.txt").write_text(sentences(200, seed=seed))
        found += [f"+data/corpus@data.corpus.sources.{name}=text", f"data.corpus.sources.{name}.path={tmp_path / name}.txt"]
    own = tiny(tmp_path)
    return [*found, *(o for o in own if not o.startswith("data"))]


def uninterrupted(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same run as one piece, in a folder of its own."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("GPTLAB_RUNS", str(tmp_path / "whole"))
        return train(compose(overrides)).run


def runs() -> Path:
    return Path(os.environ["GPTLAB_RUNS"])


def in_a_save() -> bool:
    return any(runs().glob("*/*/checkpoints/.*.part"))


def written() -> tuple[int, ...]:
    """When the metrics were written last: changes once a session trains."""
    return tuple(f.stat().st_mtime_ns for f in runs().glob("*/*/metrics.jsonl"))


def wait_for(happened: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        if process is not None and process.poll() is not None:
            return
        time.sleep(0.005)


def test_kills_while_starting_between_saves_and_in_a_save_change_no_number(
    mix: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*mix, "trainer.budget=60steps", "callbacks.checkpoint.every=5"]
    whole = uninterrupted(overrides, tmp_path, monkeypatch)
    slow = ["+callback@callbacks.slow=slow_save", "callbacks.slow.seconds=0.02", "+callback@callbacks.step=slow_step"]
    killed_in: list[str] = []
    for phase in ("starting", "between", "in a save"):
        before = written()
        process = forked([*overrides, *slow])
        if phase != "starting":
            wait_for(lambda before=before: written() != before)
            finished = {"between": lambda: not in_a_save() and any(runs().glob("*/*/checkpoints/step-*")), "in a save": in_a_save}[phase]
            wait_for(finished)
        process.kill()
        assert ended(process) == -signal.SIGKILL
        killed_in.append(phase)
    assert in_a_save(), "the last kill left half a checkpoint"
    rarely = ["callbacks.checkpoint.every=0", "callbacks.checkpoint.best=false"]  # the step of the half one is not saved again
    assert train(compose([*overrides, *rarely])).state == "done"
    run = only_run()
    assert run.identity == whole.identity
    assert weights_hash(run) == weights_hash(whole)
    assert losses(run) == losses(whole)
    assert not left_over(run)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_number(mix: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("KILL_SEED", "20"))
    draw = random.Random(seed)
    overrides = [*mix, "trainer.budget=1500steps", "callbacks.checkpoint.every=20"]
    whole = uninterrupted(overrides, tmp_path, monkeypatch)
    slow = ["+callback@callbacks.slow=slow_save", "callbacks.slow.seconds=0.06", "+callback@callbacks.step=slow_step"]
    phases: list[str] = []
    told = [f"seed {seed}, {len(losses(whole))} lines of metrics"]
    while len(phases) < 20:
        before = written()
        process = subprocess.Popen([*COMMAND, *overrides, *slow], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 4))
        else:
            wait_for(lambda before=before: written() != before, process)
            time.sleep(draw.uniform(0, 1))
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        # held still, so that what is there is what the kill leaves
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        phase = "in a save" if written() != before and in_a_save() else "starting" if written() == before else "between saves"
        process.kill()
        process.wait()
        phases.append(phase)
        kept = sorted(int(f.name[5:]) for f in runs().glob("*/*/checkpoints/step-*"))
        told.append(f"kill {len(phases):2}: {phase}; checkpoints {kept}")
    last = subprocess.run([*COMMAND, *overrides, *slow], capture_output=True, text=True, timeout=300, check=False)
    assert last.returncode == 0, last.stderr
    run = only_run()
    told += [str(dict(Counter(phases))), f"weights, uninterrupted {weights_hash(whole)}", f"weights, killed        {weights_hash(run)}"]
    print("\n".join(told))
    assert run.identity == whole.identity
    assert weights_hash(run) == weights_hash(whole), told
    assert losses(run) == losses(whole)
    assert not left_over(run)
    assert phases.count("in a save") >= 3, told


def test_stopped_at_an_epochs_border_and_killed_before_a_new_save_the_same_samples_come_in_the_same_order(
    mix: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_text = [*(o for o in mix if not o.startswith("trainer.budget")), "+callback@callbacks.seen=seen", "trainer.batch_tokens=320"]
    overrides = [*whole_text, "trainer.budget=2epochs", "model.context_length=32", "callbacks.checkpoint.best=false"]
    whole = uninterrupted(overrides, tmp_path, monkeypatch)
    seen = {m["step"]: m["batch"] for m in map(json.loads, (whole.directory / "seen.0.jsonl").read_text().splitlines())}
    steps = max(seen)
    border = steps // 2
    stop = ["+callback@callbacks.stop=signal_at", f"callbacks.stop.step={border}"]
    kill = ["+callback@callbacks.kill=kill_at", f"callbacks.kill.step={border + 3}"]
    assert ended(forked([*overrides, *stop, *kill])) == 75
    assert ended(forked([*overrides, *stop, *kill])) == -signal.SIGKILL
    run = only_run()
    assert [f.name for f in run.checkpoints.glob("step-*")] == [f"step-{border:09d}"], "killed before any new save"
    assert ended(forked(overrides)) == 0
    lines = [json.loads(line) for line in (run.directory / "seen.0.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [*range(1, border + 4), *range(border + 1, steps + 1)]
    assert {m["step"]: m["batch"] for m in lines} == seen, "the last word about each step"
    assert [m["batch"] for m in lines[border : border + 3]] == [m["batch"] for m in lines[border + 3 : border + 6]], "drawn again alike"
    assert weights_hash(run) == weights_hash(whole)
