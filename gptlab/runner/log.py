"""What goes wrong in a run, written down: warnings and tracebacks in log.txt (log.1.txt of rank 1, …), a failure in failed.json."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from gptlab.config.errors import GptlabError, IOFailure, OutOfMemory, Stopped
from gptlab.config.schema import Config
from gptlab.hardware.device import device_memory, is_out_of_memory
from gptlab.hardware.world import ElsewhereFailed, is_lost, lost
from gptlab.runner.mirror import MirrorWarning
from gptlab.runner.run import now
from gptlab.runner.stop import Requeued
from gptlab.tracker.console import say
from gptlab.tracker.guard import TrackerWarning

if TYPE_CHECKING:
    from gptlab.runner.run import Run
    from gptlab.runner.trainer import Trainer


class Log:
    """Writes warnings and a failure to the run's log, the failure to failed.json (rank 0), and makes one sentence of every exception."""

    def __init__(self, run: Run, trainer: Trainer) -> None:
        self.run, self.trainer, self.world = run, trainer, trainer.world
        self.file = run.directory / ("log.txt" if self.world.first else f"log.{self.world.rank}.txt")

    def __enter__(self) -> None:
        self._before = warnings.catch_warnings()  # filters that a component sets are gone with its run
        self._before.__enter__()
        warnings.showwarning = self._warn  # type: ignore[assignment]
        if not self.world.first:  # rank 0 tells on the terminal what it does
            hardware = self.trainer.device
            self._append(f"rank {self.world.rank} of {self.world.size}: process {os.getpid()} on {socket.gethostname()}, {hardware}\n")

    def _warn(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        self._append(f"{category.__name__}: {message} ({filename}:{lineno})\n")
        if issubclass(category, (TrackerWarning, MirrorWarning)):
            say((str(message), "yellow"))

    def _append(self, text: str) -> None:
        with self.file.open("a", encoding="utf-8") as log:
            log.write(f"{now()} {text}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._before.__exit__(kind, error, trace)
        if error is None or not isinstance(error, Exception | SystemExit):
            return
        if isinstance(error, Stopped | Requeued):
            self._append(f"{error if isinstance(error, Stopped) else 'stopped; the launcher puts the job back into its queue'}\n")
            return
        told = self._told(error)
        try:
            self._append("".join(traceback.format_exception(kind, error, trace)))
            if self.world.first:
                self.run.write("failed.json", {"code": told.code, "error": type(error).__name__, "message": str(told), "time": now()})
        except OSError:
            pass  # the disk is full, or gone: the sentence is told all the same
        if told is not error:
            raise told from error

    def _told(self, error: BaseException) -> GptlabError:
        """The sentence for the user."""
        if isinstance(error, GptlabError):
            return error
        if is_out_of_memory(error):
            return OutOfMemory(memory_advice(self.trainer.config, self.trainer.data.vocabulary, f"step {self.trainer.state.step + 1}"))
        if self.world.size > 1 and is_lost(error):
            return lost(error, f"step {self.trainer.state.step + 1}")
        if isinstance(error, OSError):
            return IOFailure(f"{self.run.directory}: {error.strerror or error}; the traceback is in {self.file.name}")
        if isinstance(error, SystemExit):
            return ElsewhereFailed(f"something called sys.exit({error.code}); the traceback is in {self.file}", 1)
        first = " ".join(str(error).split())[:300]
        return GptlabError(f"{type(error).__name__}: {first}; the traceback is in {self.file}")


def memory_advice(config: Config, vocabulary: int, when: str) -> str:
    """What to turn when the memory is used up: what would fit by forecast; in general, where that is not known."""
    hardware, model = config.hardware, config.model
    ways = [advice] if (advice := _by_forecast(config, vocabulary)) else []
    if not ways:
        if isinstance(hardware.micro_batch, int) and hardware.micro_batch > 1:
            ways.append(f"hardware.micro_batch={max(1, hardware.micro_batch // 2)} (now {hardware.micro_batch}; the numbers stay the same)")
        if hardware.precision == "fp32" and hardware.device != "cpu":
            ways.append("hardware.precision=bf16")
        ways += ["more devices with hardware/strategy=fsdp", f"a smaller model.context_length (now {model.context_length}), width or depth"]
    return f"out of memory at {when} on {hardware.device}: try {', or '.join(ways)}; checkpoints are untouched"


def _by_forecast(config: Config, vocabulary: int) -> str:
    from gptlab.runner.forecast import advice_when_full

    try:
        return advice_when_full(config, vocabulary, device_memory(torch.device(config.hardware.device)))
    except Exception:  # the memory is used up, and the general advice will do
        return ""
