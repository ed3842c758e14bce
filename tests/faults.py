"""Faults on purpose, as callbacks: `gptlab --plugin tests/faults.py train … +callback@callbacks.fault=kill_at`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import time

import torch

from gptlab import register
from gptlab.runner import checkpoint, sharded
from gptlab.runner.callback import Callback


class _Once(Callback):
    """Strikes after a step, on one rank (-1: on all), once in the life of a run."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_step(self, trainer) -> None:
        mark = trainer.run.directory / f".{type(self).__name__}-{self.step}-{trainer.world.rank}"
        if trainer.state.step == self.step and self.rank in (-1, trainer.world.rank) and not mark.exists():
            mark.touch()
            self.strike(trainer)


@register("callback", "signal_at")
class SignalAt(_Once):
    """Sends this process a signal."""

    def __init__(self, *, step: int = 5, rank: int = -1, kind: str = "SIGTERM") -> None:
        super().__init__(step, rank)
        self.signal = signal.Signals[kind]

    def strike(self, trainer) -> None:
        os.kill(os.getpid(), self.signal)


@register("callback", "kill_at")
class KillAt(_Once):
    """Ends this process as kill -9 does."""

    def __init__(self, *, step: int = 5, rank: int = 0) -> None:
        super().__init__(step, rank)

    def strike(self, trainer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@register("callback", "hang_at")
class HangAt(_Once):
    """Stops answering."""

    def __init__(self, *, step: int = 5, rank: int = 1, seconds: float = 600) -> None:
        super().__init__(step, rank)
        self.seconds = seconds

    def strike(self, trainer) -> None:
        time.sleep(self.seconds)


@register("callback", "raise_at")
class RaiseAt(_Once):
    """Fails as a component of the user's may: by an exception, by sys.exit, or for want of memory."""

    def __init__(self, *, step: int = 2, rank: int = -1, kind: str = "exception") -> None:
        super().__init__(step, rank)
        self.kind = kind

    def strike(self, trainer) -> None:
        if self.kind == "exit":
            sys.exit(3)
        if self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        raise RuntimeError("a component of the user's failed")


@register("callback", "poison")
class Poison(Callback):
    """Makes the loss (or a gradient alone) of certain batches NaN, in a micro-batch of one rank."""

    def __init__(
        self, *, batches: list[int] | None = None, rank: int = 0, micro: int = 0, what: str = "loss", factor: float = float("nan")
    ) -> None:
        self.batches, self.rank, self.micro, self.what, self.factor = set(batches or [6]), rank, micro, what, factor

    def on_start(self, trainer) -> None:
        forward, calls = trainer.forward, {"batch": -1, "count": 0}

        def poisoned(batch):
            number = trainer.state.batch
            calls["count"] = calls["count"] + 1 if calls["batch"] == number else 0
            calls["batch"] = number
            loss = forward(batch)
            struck = number in self.batches and trainer.world.rank == self.rank and calls["count"] == self.micro
            if struck and self.what == "gradient":
                loss.register_hook(lambda gradient: gradient * self.factor)
            return loss * self.factor if struck and self.what == "loss" else loss

        trainer.forward = poisoned


@register("callback", "slow_save")
class SlowSave(Callback):
    """Makes every save take its time, so that a kill can hit it."""

    def __init__(self, *, seconds: float = 0.2) -> None:
        self.seconds = seconds

    def on_start(self, trainer) -> None:
        plain = checkpoint._sync

        def slow(path) -> None:
            time.sleep(self.seconds)
            plain(path)

        checkpoint._sync = slow


@register("callback", "seen")
class Seen(Callback):
    """Writes down a hash of every batch that is trained on."""

    def __init__(self) -> None:
        self.hash = ""

    def on_start(self, trainer) -> None:
        plain = trainer.loader.batch

        def noted(number):
            batch = plain(number)
            self.hash = hashlib.sha256(batch.inputs.contiguous().numpy().tobytes()).hexdigest()[:12]
            return batch

        trainer.loader.batch = noted

    def on_step(self, trainer) -> None:
        with (trainer.run.directory / f"seen.{trainer.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.state.step, "batch": self.hash}) + "\n")


@register("callback", "rows")
class RowsSeen(Callback):
    """Writes down a hash of every row of a step that this rank trains on, and how much the rank's rows count together."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.weight = 0.0

    def on_start(self, trainer) -> None:
        plain = trainer.loader.batch

        def noted(number):
            batch = plain(number)
            self.rows = [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()[:12] for row in batch.inputs]
            self.weight = batch.token_weight
            return batch

        trainer.loader.batch = noted

    def on_step(self, trainer) -> None:
        with (trainer.run.directory / f"rows.{trainer.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.state.step, "rows": self.rows, "weight": self.weight}) + "\n")


@register("callback", "slow_step")
class SlowStep(Callback):
    """Makes every step take its time, so that something can happen between two of them."""

    def __init__(self, *, seconds: float = 0.01) -> None:
        self.seconds = seconds

    def on_step(self, trainer) -> None:
        time.sleep(self.seconds)


@register("callback", "pace")
class Pace(Callback):
    """Makes every step take its time, so that a signal from outside can meet it."""

    def __init__(self, *, seconds: float = 0.1) -> None:
        self.seconds = seconds

    def on_step(self, trainer) -> None:
        time.sleep(self.seconds)


@register("callback", "full_disk")
class FullDisk(Callback):
    """Makes writing a shard fail on one rank, from the checkpoint of a step on."""

    def __init__(self, *, step: int = 10, rank: int = 1, reason: int = errno.ENOSPC) -> None:
        self.step, self.rank, self.reason = step, rank, reason

    def on_start(self, trainer) -> None:
        plain = sharded.write

        def failing(folder, tensors, shard):
            if trainer.world.rank == self.rank and f"step-{self.step:09d}" in folder.name:
                (folder / "shard-half.safetensors").write_bytes(b"half")
                raise OSError(self.reason, os.strerror(self.reason))
            return plain(folder, tensors, shard)

        sharded.write = failing
