"""A damaged checkpoint is told and passed over, a planted one runs no code, and no checkpoint goes before a newer one is durable."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab import compose, load, train
from gptlab.config.errors import CheckpointError, GptlabError, IOFailure
from gptlab.config.registry import register
from gptlab.data.shard import file_hash
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.run import Run, all_runs
from gptlab.runner.trainer import Trainer
from tests.faulty import COMMAND, left_over, only_run, weights, weights_hash
from tests.tiny import tiny

FILES = ("model.safetensors", "state.safetensors", "state.json", "manifest.json")


def _cut(share: float) -> Callable[[Path], None]:
    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return cut


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut to 0": _cut(0), "cut to 50 %": _cut(0.5), "cut to 99 %": _cut(0.99), "one bit": _flip, "deleted": Path.unlink,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, home_folder: Path, corpus_file: Path) -> tuple[Path, list[str]]:
    """A finished run with checkpoints of steps 4, 8 and 12, in a folder of runs; and its overrides."""
    overrides = tiny(corpus_file, "callbacks.checkpoint.every=4", "callbacks.checkpoint.keep=3", "callbacks.evaluation.every=12")
    folder = tmp_path_factory.mktemp("finished") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_HOME", str(home_folder))
        patch.setenv("GPTLAB_RUNS", str(folder))
        train(compose(overrides))
    return folder, overrides


@pytest.fixture
def stopped(finished: tuple[Path, list[str]], tmp_path: Path) -> Run:
    """A copy of it that is not done."""
    shutil.copytree(finished[0], tmp_path / "runs")
    run = only_run()
    (run.directory / "done.json").unlink()
    return run


@pytest.fixture
def good(finished: tuple[Path, list[str]]) -> Run:
    (found,) = (Run(f.parent) for f in finished[0].glob("*/*/config.json"))
    return found


@pytest.fixture
def overrides(finished: tuple[Path, list[str]]) -> list[str]:
    return finished[1]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_and_the_checkpoint_before_is_taken_or_an_explicit_one_refused(
    stopped: Run, good: Run, overrides: list[str], file: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint.checkpoints(stopped.checkpoints)[0]
    DAMAGES[damage](newest / file)
    assert checkpoint.problem(newest) is not None
    with pytest.raises(CheckpointError) as refused:
        train(compose([*overrides, "trainer.resume=12"]))
    assert refused.value.code == 5
    assert "\n" not in str(refused.value)
    for which in ("12", newest.name, str(newest)):
        with pytest.raises(CheckpointError, match=newest.name):
            load(stopped, checkpoint=which)
    assert (stopped.read("failed.json") or {})["code"] == 5
    capsys.readouterr()
    assert train(compose(overrides)).state == "done"
    told = " ".join(capsys.readouterr().out.split())
    assert "passed over" in told
    assert newest.name in told
    assert "resumed at step 8" in told
    assert weights_hash(stopped) == weights_hash(good)
    assert checkpoint.problem(newest) is None, "written anew"
    assert not left_over(stopped)


def test_when_every_checkpoint_is_damaged_the_run_says_so_and_begins_anew(
    stopped: Run, good: Run, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in checkpoint.checkpoints(stopped.checkpoints):
        _flip(folder / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"step-000000004: state\.safetensors"):
        load(stopped)
    train(compose(overrides))
    assert "the run begins anew" in capsys.readouterr().out
    assert weights_hash(stopped) == weights_hash(good)


def test_no_bit_of_a_manifest_can_turn_unnoticed(stopped: Run) -> None:
    newest = checkpoint.checkpoints(stopped.checkpoints)[0]
    file = newest / "manifest.json"
    whole = file.read_bytes()
    told = {key: value for key, value in json.loads(whole).items() if key != "sha256"}  # a last digit may leave a number what it was
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            try:
                found = checkpoint.manifest_of(newest)
            except CheckpointError:
                continue
            assert found == told, f"bit {bit} of byte {place}"
    file.write_bytes(whole)
    assert checkpoint.problem(newest) is None


def test_a_file_of_tensors_that_the_manifest_does_not_name_makes_a_checkpoint_unusable(stopped: Run) -> None:
    newest = checkpoint.checkpoints(stopped.checkpoints)[0]
    shutil.copy(newest / "model.safetensors", newest / "shard-00001-of-00001.safetensors")
    assert "shard-00001-of-00001.safetensors is not in its manifest" in (checkpoint.problem(newest) or "")


def test_a_run_goes_on_from_the_step_or_folder_it_is_told(stopped: Run, good: Run, overrides: list[str]) -> None:
    for which in ("4", "step-000000008", str(stopped.checkpoints / "step-000000008")):
        (stopped.directory / "done.json").unlink(missing_ok=True)
        assert train(compose([*overrides, f"trainer.resume='{which}'"])).state == "done"
        assert weights_hash(stopped) == weights_hash(good)
        assert [m["step"] for m in stopped.metrics() if "train/loss" in m] == list(range(1, 13))
    (stopped.directory / "done.json").unlink()
    for which, told in (("5", "there are 12, 8"), ("no/such", "is no checkpoint of this run")):
        with pytest.raises(CheckpointError, match=told):
            train(compose([*overrides, f"trainer.resume={which}"]))


class _Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def _reseal(folder: Path) -> None:
    """A manifest that fits what lies there now, as who plants something would write it."""
    files = {f.name: {"sha256": file_hash(f), "bytes": f.stat().st_size} for f in folder.iterdir() if f.name != "manifest.json"}
    step = checkpoint.step_of(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))


PLANTED = ("model.pt", ".metadata", "pytorch_model.bin", "state.pkl", "model.safetensors", "state.safetensors", "state.json")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_pickle_runs_no_code(stopped: Run, overrides: list[str], tmp_path: Path, name: str) -> None:
    newest, canary = checkpoint.checkpoints(stopped.checkpoints)[0], tmp_path / "canary"
    (newest / name).write_bytes(pickle.dumps(_Canary(canary)))
    _reseal(newest)
    with _at_most_a_sentence():
        load(stopped, checkpoint="12")
    checkpoint.problem(newest)
    with _at_most_a_sentence():
        train(compose([*overrides, "trainer.resume=12"]))
    with _at_most_a_sentence():
        train(compose(overrides))
    assert not canary.exists()
    pickle.loads((newest / name).read_bytes() if name not in FILES else pickle.dumps(_Canary(canary)))
    assert canary.exists(), "the canary itself works"


class _at_most_a_sentence:
    """Whatever comes out is one sentence of ours, and never a stranger's exception."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            return False
        assert isinstance(error, CheckpointError), repr(error)
        assert "\n" not in str(error)
        return True


@pytest.mark.parametrize("key", ["top", "state", "optimizer"])
def test_a_planted_target_runs_no_code(stopped: Run, overrides: list[str], tmp_path: Path, key: str) -> None:
    canary = tmp_path / "canary"
    planted = {"_target_": "pathlib.Path.touch", "_args_": [str(canary)], "_partial_": False}
    newest = checkpoint.checkpoints(stopped.checkpoints)[0]
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, **planted} if key == "top" else {**state, key: planted}))
    (newest / "config.json").write_text(json.dumps(planted))
    _reseal(newest)
    written = json.loads((stopped.directory / "config.json").read_text())
    written["config"]["model"]["norm"] = planted
    (stopped.directory / "config.json").write_text(json.dumps(written))
    with pytest.raises(GptlabError) as refused:
        load(stopped, checkpoint="12")
    assert refused.value.code in (2, 5)
    for resume in ("12", "latest"):
        with _at_most_a_sentence():
            train(compose([*overrides, f"trainer.resume={resume}"]))
    assert not canary.exists()


# Retention


def _save(folder: Path, step: int, loss: float | None = None) -> Path:
    tensors = {"w": torch.full((4,), float(step))}
    metrics = {} if loss is None else {"val/loss": loss}
    return checkpoint.save(folder, step, tensors, {"optimizer.0.m": torch.zeros(4)}, {"state": {}}, metrics=metrics)


def _steps(folder: Path) -> list[int]:
    return sorted(checkpoint.step_of(c) for c in checkpoint.checkpoints(folder))


def test_the_newest_the_best_and_every_so_many_th_stay(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.4), (60, None)):
        _save(tmp_path, step, loss)
        checkpoint.clean(tmp_path, step, keep=2, keep_every=30, best=True)
    assert _steps(tmp_path) == [20, 30, 50, 60]
    assert checkpoint.choose(tmp_path, "best").name == "step-000000020"
    assert checkpoint.choose(tmp_path, "30").name == "step-000000030"
    assert checkpoint.choose(tmp_path).name == "step-000000060"
    checkpoint.clean(tmp_path, 60, keep=1)
    assert _steps(tmp_path) == [60]
    with pytest.raises(CheckpointError, match="holds no checkpoint that was measured"):
        checkpoint.choose(tmp_path, "best")


def test_later_steps_of_an_abandoned_past_go_with_the_first_new_checkpoint_and_not_before(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0)):
        _save(tmp_path, step, loss)
    _flip(tmp_path / "step-000000030" / "model.safetensors")  # the run goes on from step 20
    assert _steps(tmp_path) == [10, 20, 30]
    _save(tmp_path, 25, 1.5)
    checkpoint.clean(tmp_path, 25, keep=2, best=True)
    assert _steps(tmp_path) == [20, 25], "the best of the abandoned past is none of this one's"
    assert checkpoint.lowest_loss(tmp_path) == 1.5


@pytest.mark.parametrize("damage", ["cut to 0", "cut to 99 %", "deleted"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newer_one_never_pushes_out_a_good_older_one(tmp_path: Path, damage: str, file: str) -> None:
    for step in (10, 20, 30):
        _save(tmp_path, step)
    DAMAGES[damage](tmp_path / "step-000000020" / file)
    checkpoint.clean(tmp_path, 30, keep=2)
    assert {10, 30} <= set(_steps(tmp_path))
    _save(tmp_path, 40)
    checkpoint.clean(tmp_path, 40, keep=2)
    assert _steps(tmp_path) == [30, 40]


def test_nothing_is_cleaned_before_the_new_checkpoint_is_durable(
    stopped: Run, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(stopped.checkpoints / "step-000000012")
    before = {f: weights_hash(stopped, f) for f in ("4", "8")}

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "_sync", full)
        with pytest.raises(IOFailure, match=r"the checkpoint needs [\d,]+ bytes") as error:
            train(compose([*overrides, "callbacks.checkpoint.keep=1"]))
    assert error.value.code == 74
    assert {f: weights_hash(stopped, f) for f in ("4", "8")} == before
    assert not left_over(stopped)
    assert (stopped.read("failed.json") or {})["code"] == 74
    assert train(compose([*overrides, "callbacks.checkpoint.keep=1"])).state == "done"
    assert _steps(stopped.checkpoints) == [12]


# Writing in the background


@register("callback", "watch_writing")
class WatchWriting(Callback):
    """Counts the steps that are made while a checkpoint is written."""

    steps = 0

    def on_step(self, trainer: Trainer) -> None:
        WatchWriting.steps += any(t.name.startswith("gptlab step-") for t in threading.enumerate())


@pytest.fixture
def slow_writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every save takes a quarter of a second; what is given tells when one begins and ends."""
    plain_sync, plain_save, events = checkpoint._sync, checkpoint.save, list[str]()

    def sync(path: Path) -> None:
        time.sleep(0.05)
        plain_sync(path)

    def save(folder: Path, step: int, *rest: Any, **more: Any) -> Path:
        events.append(f"begin {step}")
        made = plain_save(folder, step, *rest, **more)
        events.append(f"end {step}")
        return made

    monkeypatch.setattr(checkpoint, "_sync", sync)
    monkeypatch.setattr(checkpoint, "save", save)
    WatchWriting.steps = 0
    return events


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_state_of_its_step(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_writing: list[str]
) -> None:
    own = tiny(corpus_file, "callbacks.checkpoint.every=8", "callbacks.checkpoint.keep=9", "callbacks.evaluation.every=32", steps=32)
    own.append("+callback@callbacks.watch=watch_writing")
    run = train(compose(own)).run
    during = WatchWriting.steps
    assert slow_writing == [f"{what} {step}" for step in (8, 16, 24, 32) for what in ("begin", "end")], "one after the other"
    assert during >= 8, "steps were made while one was written"
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "waiting"))
    WatchWriting.steps = 0
    waiting = train(compose([*own, "callbacks.checkpoint.background=false"])).run
    assert WatchWriting.steps == 0
    for one in checkpoint.checkpoints(run.checkpoints):
        other = waiting.checkpoints / one.name
        for name in ("model.safetensors", "state.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), f"{one.name}/{name}"
        assert json.loads((one / "state.json").read_text())["state"]["step"] == checkpoint.step_of(one)
    assert len({weights_hash(run, str(checkpoint.step_of(c))) for c in checkpoint.checkpoints(run.checkpoints)}) == 4


def test_what_a_writing_in_the_background_runs_into_ends_the_run_at_its_next_step(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any, **more: Any) -> Path:
        raise IOFailure("the disk is gone")

    monkeypatch.setattr(checkpoint, "save", failing)
    with pytest.raises(IOFailure, match="the disk is gone"):
        train(compose(tiny(corpus_file, "callbacks.checkpoint.every=2", steps=4000)))
    (run,) = all_runs()
    assert len(run.metrics()) < 1000
    assert all(torch.isfinite(v).all() for v in weights(run).values()) if checkpoint.checkpoints(run.checkpoints) else True


# A disk that is full

FULL = """
mount -t tmpfs -o size=4m tmpfs "$GPTLAB_RUNS" || exit 99
head -c 2300000 /dev/zero > "$GPTLAB_RUNS/others"
"$@"; first=$?
cp -a "$GPTLAB_RUNS" "$OUT/full"
rm "$GPTLAB_RUNS/others"
"$@"; second=$?
cp -a "$GPTLAB_RUNS" "$OUT/room"
echo "$first $second" > "$OUT/codes"
"""


@pytest.mark.slow
def test_a_full_disk_costs_no_older_checkpoint_and_once_there_is_room_the_same_command_ends_alike(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs a user namespace of its own to mount a small disk in")
    own = tiny(corpus_file, "callbacks.checkpoint.every=3", "callbacks.checkpoint.keep=9", "callbacks.evaluation.every=12")
    own.append("model.width=64")  # a checkpoint takes 0.6 MB
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("GPTLAB_RUNS", str(tmp_path / "whole"))
        whole = train(compose(own)).run
    runs, out = tmp_path / "runs", tmp_path / "out"
    runs.mkdir()
    out.mkdir()
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", *COMMAND, *own]
    told = subprocess.run(command, env={**os.environ, "OUT": str(out)}, capture_output=True, text=True, timeout=300, check=False)
    if told.returncode == 99:
        pytest.skip(f"may not mount a small disk: {told.stderr}")
    assert (out / "codes").read_text().split() == ["74", "0"], told.stderr
    (sentence,) = told.stderr.strip().splitlines()
    needed = re.search(r"the disk is full: the checkpoint needs ([\d,]+) bytes and [\d,]+ are free", sentence)
    assert needed is not None, sentence
    (full,) = (Run(f.parent) for f in (out / "full").glob("*/*/config.json"))
    (room,) = (Run(f.parent) for f in (out / "room").glob("*/*/config.json"))
    older = checkpoint.checkpoints(full.checkpoints)
    assert older, "some were written before it was full"
    tensors = sum(t.numel() * t.element_size() for part in checkpoint.load_tensors(older[0]) for t in part.values())
    assert int(needed[1].replace(",", "")) == tensors
    for kept in older:
        step = str(checkpoint.step_of(kept))
        assert weights_hash(full, step) == weights_hash(whole, step)
    assert not left_over(full)
    assert (full.read("failed.json") or {})["code"] == 74
    assert weights_hash(room) == weights_hash(whole)
    assert not left_over(room)
