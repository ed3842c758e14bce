"""A signal or the time limit saves at the end of the step and leaves with 75; a second Ctrl-C leaves at once; handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from gptlab import compose, train
from gptlab.config.errors import Stopped
from gptlab.config.registry import register
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.run import Run
from gptlab.runner.stop import SIGNALS, Requeued
from gptlab.runner.trainer import Trainer
from tests.faulty import COMMAND, ended, faults, forked, left_over, losses, only_run, weights_hash
from tests.tiny import tiny

STOP = "+callback@callbacks.stop=signal_at"


@register("callback", "two_signals")
class TwoSignals(Callback):
    """Two signals within a second, as torchrun and a cluster send them."""

    def __init__(self, *, names: list[str] | None = None) -> None:
        self.names = names or ["SIGINT", "SIGINT"]

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == 5:
            for name in self.names:
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(0.1)


@pytest.fixture(autouse=True)
def _faults() -> Iterator[None]:
    with faults():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, home_folder: Path, corpus_file: Path) -> Run:
    """The run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_HOME", str(home_folder))
        patch.setenv("GPTLAB_RUNS", str(tmp_path_factory.mktemp("whole")))
        return train(compose(tiny(corpus_file, "model.dropout=0.2"))).run


@pytest.fixture
def own(corpus_file: Path) -> list[str]:
    return tiny(corpus_file, "model.dropout=0.2", "callbacks.checkpoint.best=false")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(own: list[str], whole: Run, name: str) -> None:
    overrides = [*own, STOP, f"callbacks.stop.kind={name}"]
    assert ended(forked(overrides)) == 75
    run = only_run()
    assert [c.name for c in checkpoint.checkpoints(run.checkpoints)] == ["step-000000005"]
    assert run.state == "stopped"
    assert run.read("failed.json") is None
    assert f"stopped at step 5 by {name}" in (run.directory / "log.txt").read_text()
    assert train(compose(overrides)).state == "done"
    assert weights_hash(run) == weights_hash(whole)
    assert losses(run) == losses(whole)


def test_what_handled_the_signals_before_does_so_again(own: list[str]) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(Stopped, match="by SIGINT") as stopped:
        train(compose([*own, STOP, "callbacks.stop.kind=SIGINT"]))
    assert stopped.value.code == 75
    assert [signal.getsignal(s) for s in SIGNALS] == before
    train(compose(own))
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_the_time_limit_saves_and_leaves_and_each_session_has_its_own(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny(corpus_file, steps=40)
    slow = [*plain, "+callback@callbacks.slow=slow_step", "callbacks.slow.seconds=0.05", "trainer.time_limit=1s"]
    sessions = 0
    for _ in range(20):  # 40 steps take at least 2 seconds
        try:
            train(compose(slow))
            break
        except Stopped as stopped:
            sessions += 1
            assert "its time limit (trainer.time_limit)" in str(stopped)  # noqa: PT017
            assert checkpoint.checkpoints(only_run().checkpoints)
    assert sessions >= 1
    run = only_run()
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "whole"))
    assert weights_hash(run) == weights_hash(train(compose(plain)).run)


def test_two_signals_within_a_second_are_one(own: list[str], whole: Run) -> None:
    overrides = [*own, "+callback@callbacks.stop=two_signals"]
    assert ended(forked(overrides)) == 75
    run = only_run()
    assert [c.name for c in checkpoint.checkpoints(run.checkpoints)] == ["step-000000005"]
    train(compose(own))
    assert weights_hash(run) == weights_hash(whole)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_later_leaves_at_once_and_loses_no_checkpoint(corpus_file: Path, own: list[str], whole: Run, name: str) -> None:
    slow = ["callbacks.checkpoint.every=4", "+callback@callbacks.slow=slow_save", "callbacks.slow.seconds=4"]
    process = forked([*own, *slow])
    begun = time.monotonic()

    def saving() -> bool:
        assert time.monotonic() < begun + 60
        return any(Path(os.environ["GPTLAB_RUNS"]).glob("*/*/checkpoints/.*.part"))

    while not saving():
        time.sleep(0.01)
    assert process.pid is not None
    number = signal.Signals[name]
    os.kill(process.pid, number)
    process.join(1.3)
    assert process.exitcode is None, "it waits for the save"
    os.kill(process.pid, number)
    asked = time.monotonic()
    assert ended(process) == -number
    assert time.monotonic() - asked < 5, "a save takes 20 seconds"
    assert train(compose(own)).state == "done"
    run = only_run()
    assert weights_hash(run) == weights_hash(whole)
    assert not left_over(run)


def test_ctrl_c_in_a_real_process_says_how_to_go_on(own: list[str], whole: Run) -> None:
    slow = ["+callback@callbacks.step=slow_step", "callbacks.step.seconds=0.3"]
    process = subprocess.Popen([*COMMAND, *own, *slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(f.stat().st_size for f in Path(os.environ["GPTLAB_RUNS"]).glob("*/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "by SIGINT; the same command resumes it" in said
    assert len(said.strip().splitlines()) == 1
    assert train(compose(own)).state == "done"
    assert weights_hash(only_run()) == weights_hash(whole)


# submitit's handler puts the job back into the queue and ends the process


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a job of submitit's; signal handlers that a test sets are gone after it."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    before = {s: signal.getsignal(s) for s in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("launched")
def test_a_launchers_handler_is_called_once_the_checkpoint_is_there(own: list[str], whole: Run) -> None:
    found: list[tuple[int, list[str]]] = []

    def requeue(number: int, frame: FrameType | None) -> None:
        found.append((number, [c.name for c in checkpoint.checkpoints(only_run().checkpoints)]))
        raise SystemExit(3)

    overrides = [*own, STOP, "callbacks.stop.kind=SIGUSR2"]
    signal.signal(signal.SIGUSR2, requeue)
    with pytest.raises(Requeued) as left:
        train(compose(overrides))
    assert left.value.code == 3
    assert found == [(signal.SIGUSR2, ["step-000000005"])]
    assert signal.getsignal(signal.SIGUSR2) is requeue
    run = only_run()
    assert run.read("failed.json") is None, "a job that is put back into its queue has not failed"
    assert train(compose(overrides)).state == "done"
    assert weights_hash(run) == weights_hash(whole)


@pytest.mark.parametrize(("names", "handled"), [("[SIGUSR1]", True), ("[SIGTERM,SIGUSR1]", True), ("[SIGUSR2]", False)])
@pytest.mark.usefixtures("launched")
def test_the_launchers_own_signal_goes_before_a_plain_one_and_a_handler_may_return(own: list[str], names: str, handled: bool) -> None:
    called: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    with pytest.raises(Stopped, match="by SIGUSR1" if handled else "by SIGUSR2"):
        train(compose([*own, "+callback@callbacks.stop=two_signals", f"callbacks.stop.names={names}"]))
    assert called == ([signal.SIGUSR1] if handled else [])


def test_another_programs_handler_is_not_taken_for_a_launchers(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        with pytest.raises(Stopped, match="by SIGTERM"):
            train(compose([*own, STOP]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not called
