"""What a run must remember beside its weights: how far it is, its optimizer, and the randomness of its next step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlab.config.errors import CheckpointError
from gptlab.runner.checkpoint import OPTIMIZER
from gptlab.runner.guard import Losses


@dataclass
class State:
    """How far a run is. `seconds` are spent in training steps alone, `wall` counts everything."""

    step: int = 0  # updates made
    batch: int = 0  # number of the next batch: the step, and one more for each that was passed over
    tokens: int = 0
    seconds: float = 0.0
    wall: float = 0.0
    begun: float = 0.0  # seconds when the run began: 0, or those of the checkpoint it went on from
    timed_tokens: int = 0  # tokens and seconds after the warm-up of each session
    timed_seconds: float = 0.0
    losses: Losses = field(default_factory=Losses)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> State:
        """Read what `to_json` wrote; one from before batches were counted apart had passed none over. Raises CheckpointError."""
        try:
            return State(**{**data, "batch": data.get("batch", data["step"]), "losses": Losses(**data.get("losses", {}))})
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"the checkpoint's state is not one that this gptlab knows ({error})") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state as JSON data and tensors named `optimizer.<parameter>.<key>`."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return {"groups": state["param_groups"], "scalars": scalars}, tensors


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer back what `pack_optimizer` took."""
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in packed["scalars"].items()}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": packed["groups"]})


def optimizer_targets(optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Empty tensors for an optimizer's saved state, each sharded as its parameter is. `shapes`: of all tensors in the checkpoint."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[str, Tensor] = {}
    for name, (size, dtype) in shapes.items():
        if name.startswith(OPTIMIZER):
            parameter = parameters[int(name.split(".", 2)[1])]
            like = size == parameter.shape
            found[name] = torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(size, dtype=dtype)
    return found


def seed_step(seed: int, batch: int, rank: int) -> None:
    """Seed every generator for a step: its dropout is a function of the seed, the batch's number and the rank, whatever came before."""
    number = int.from_bytes(hashlib.blake2b(f"{seed}:{batch}:{rank}".encode(), digest_size=8).digest(), "little")
    # torch.manual_seed looks for every kind of device each time, which takes a hundred times as long
    torch.default_generator.manual_seed(number >> 1)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number >> 1)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number >> 1)
    np.random.seed(number & 0xFFFFFFFF)  # a component of the user's may draw from it
    random.seed(number)


@contextmanager
def own_randomness() -> Iterator[None]:
    """What is drawn in here leaves the process's generators as they were."""
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
