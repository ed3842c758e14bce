"""The processes (ranks) that train one model together, as torchrun starts them: who we are, and what all must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gptlab.config.errors import GptlabError, IOFailure

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # for text to be prepared; a rank that dies meanwhile is noticed at once
END = timedelta(minutes=20)  # beyond a step's time-out: rank 0 may still bring its mirror up to date
_GROUPS: dict[str, Any] = {}  # of this process: made once, used by every run of a sweep


class LostRank(IOFailure):
    """Another rank died, hung beyond the time-out, or cannot be reached."""


class ElsewhereFailed(GptlabError):
    """Rank 0 failed, and says why; this rank follows it with the same exit code."""

    everywhere = True

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class World:
    """This process among `size` ranks; `local_rank` counts those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def gather(self, *values: float) -> list[list[float]]:
        """The values of every rank, by rank. Raises LostRank."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with reached("exchange of a step's figures"):
            dist.all_gather(found, mine)
        return [t.tolist() for t in found]

    def share(self, work: Callable[[], T], *, patient: bool = False) -> T:
        """What rank 0 makes of `work`, on every rank. `patient`: it may take hours.

        Raises on rank 0 what `work` raises, on the others ElsewhereFailed; LostRank when rank 0 is gone.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.first:
            try:
                told[0] = work()
            except BaseException as error:
                failure = error
                code = error.code if isinstance(error, GptlabError) else 1
                told[1] = (str(error) or type(error).__name__, code)
        with reached("word from rank 0"):
            dist.broadcast_object_list(told, src=0, group=_GROUPS["patient"] if patient else None)
        if failure is not None:
            if isinstance(failure, GptlabError):
                failure.everywhere = True
            raise failure
        if told[1] is not None:
            raise ElsewhereFailed(*told[1])
        found: T = told[0]
        return found

    def wait(self, *, patient: bool = False) -> None:
        """Wait until every rank is here: at the end of a run, or (`patient`) for text to be prepared. Raises LostRank."""
        if self.size > 1:
            with reached("the other ranks"):
                dist.barrier(group=_GROUPS["patient" if patient else "end"])

    def writers(self) -> Any:
        """The process group of the threads that write checkpoints; None for one rank."""
        return _GROUPS.get("writers")


class reached:
    """What fails in here fails since another rank is gone or too late: it is told so, with what was waited for."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise lost(error, self.what) from error


def lost(error: BaseException, what: str) -> LostRank:
    """The error of a collective as a sentence."""
    words = " ".join(str(error).split()).rpartition("] ")[2].partition(". This is typically")[0][:160]  # less gloo's guess
    return LostRank(f"another rank died or did not answer in time ({what}: {words}); the same command goes on from the last checkpoint")


def is_lost(error: BaseException) -> bool:
    """Whether an error that came up somewhere in a step was a collective's."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting", "pair closure", "process group")
    return isinstance(error, RuntimeError) and any(w in text for w in words)


def launched() -> World | None:
    """Who torchrun says we are; None where it did not start this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return None
    return World(*(int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))))


def joined() -> bool:
    """Whether this process has met the other ranks."""
    return bool(_GROUPS)


def join(timeout: float) -> World:
    """Meet the other ranks, once a process; `timeout` (minutes) is how long a collective waits. Raises LostRank."""
    world = launched()
    assert world is not None
    if _GROUPS:
        return world
    limit = timedelta(minutes=timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with reached(f"meeting {world.size} ranks"):
        dist.init_process_group(backend, timeout=limit)
        _GROUPS["patient"] = dist.new_group(backend="gloo", timeout=PATIENCE)
        _GROUPS["end"] = dist.new_group(backend="gloo", timeout=limit + END)
        _GROUPS["writers"] = dist.new_group(backend="gloo", timeout=limit)
    return world


def leave() -> None:
    """Part from the other ranks in order, at the end of a process that went well. Raises LostRank."""
    if _GROUPS:
        with reached("the end of the other ranks"):
            dist.barrier(group=_GROUPS["end"])
        _GROUPS.clear()
        dist.destroy_process_group()
