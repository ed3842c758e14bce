"""Writes checkpoints in a thread, from a copy of the state: training waits for the copy alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from gptlab.config.errors import IOFailure
from gptlab.hardware.world import World
from gptlab.runner import checkpoint, sharded

NICE = 15  # of the writing thread: it takes a twentieth of a core from training on the CPU, and all of one that is idle


def _step_back() -> None:
    """Give this thread, which Linux schedules like a process, a lower priority than those that train."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Writer:
    """Writes one checkpoint at a time. `after` is called, in the thread, with each one that is durable.

    Of whole states rank 0 writes all; of `shards` every rank writes its own, and each calls every method here.
    """

    def __init__(self, folder: Path, world: World, *, shards: bool) -> None:
        self.folder, self.world, self.shards = folder, world, shards
        self.background = True
        self.after: list[Callable[[Path], None]] = []
        self.saved = -1  # the last step that was handed in
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, model: Mapping[str, Tensor], tensors: Mapping[str, Tensor], state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Copy the state, and write it in the background. Waits for the one before; raises what became of it."""
        self.wait()
        if step == self.saved:
            return
        self.saved = step
        if not self.shards and not self.world.first:
            return
        shard = sharded.Shard(self.world, sharded.offsets_of({**model, **tensors})) if self.shards else None
        model, tensors = self._copied(model), self._copied(tensors)

        def write() -> None:
            if self.background:
                _step_back()
            try:
                made = checkpoint.save(self.folder, step, model, tensors, state, metrics=metrics, shard=shard)
                if self.world.first:
                    for call in self.after:
                        call(made)
            except BaseException as error:  # for who waits
                self._error = error

        if not self.background:
            write()
            self._raise()
            return
        self._thread = threading.Thread(target=write, name=f"gptlab {checkpoint.checkpoint_name(step)}", daemon=True)
        self._thread.start()

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Into the buffers of the last time, so that a long run takes memory for this once."""
        for name, tensor in tensors.items():
            self._copies[name] = sharded.copied(tensor, self._copies.get(name))
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._copies[name] for name in tensors}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the writing in the background ran into something."""
        return self._error is not None

    def fail(self, ranks: list[int]) -> NoReturn:
        """Raise what the writing ran into, here or on the ranks that say so."""
        self.wait()
        error = IOFailure(f"rank {', '.join(map(str, ranks))} could not write its checkpoint, and says why")
        error.everywhere = True
        raise error

    def wait(self) -> None:
        """Wait until what was handed in is durable. Raises IOFailure or LostRank when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self.saved = -1
            raise error

    def close(self) -> None:
        """Wait for the thread, on a way out that has an error of its own."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
