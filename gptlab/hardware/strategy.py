"""How the work is spread over devices: one process; one a device with whole copies (ddp); or with sharded parameters (fsdp)."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.hardware.world import World, join, launched

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Strategy(Protocol):
    """What a trainer asks of a strategy. Gradients come out as the mean over ranks: a loss is multiplied by the number of them."""

    sharded: bool  # whether a rank holds only its shards of the parameters

    def join(self) -> World:
        """Meet the other processes. Raises ConfigError where torchrun did not start what this strategy needs."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model on the device, its parameters sharded where the strategy does so."""

    def wrap(self, step: nn.Module) -> nn.Module:
        """What is called with a micro-batch, so that gradients meet those of the other ranks."""

    def accumulating(self, step: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's passes; gradients need meet only in the `last` of a step."""


@register("hardware/strategy", "single")
class Single:
    """One process on one device."""

    sharded = False

    def join(self) -> World:
        found = launched() or World()
        if found.size > 1:
            raise ConfigError(f"hardware/strategy=single is one process; torchrun started {found.size}: use hardware/strategy=ddp or fsdp")
        return found

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model.to(device)

    def wrap(self, step: nn.Module) -> nn.Module:
        return step

    def accumulating(self, step: nn.Module, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


@register("hardware/strategy", "ddp")
class DDP:
    """A whole copy of the model in every process of torchrun; `timeout`: minutes until a silent rank counts as lost."""

    sharded = False

    def __init__(self, *, timeout: float = 10.0) -> None:
        self.timeout = _positive(timeout)

    def join(self) -> World:
        return _met("ddp", self.timeout)

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model.to(device)

    def wrap(self, step: nn.Module) -> nn.Module:
        # Buffers are constants of the model, and gradients are freed after each step: neither need be sent or copied.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option's new name is not in every torch we allow
            return DistributedDataParallel(
                step, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=_has_unused(step.get_submodule("model"))
            )

    def accumulating(self, step: nn.Module, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if last or not isinstance(step, DistributedDataParallel) else step.no_sync()


@register("hardware/strategy", "fsdp")
class FSDP:
    """Parameters, gradients and optimizer state sharded over the processes of torchrun (FSDP2, Zhao et al., 2023)."""

    sharded = True

    def __init__(self, *, timeout: float = 10.0, reshard: bool = True) -> None:
        self.timeout, self.reshard = _positive(timeout), reshard
        self._model: Any = None

    def join(self) -> World:
        self._world = _met("fsdp", self.timeout)
        return self._world

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # more than half a second, which one process need not wait for

        mesh = init_device_mesh(device.type, (self._world.size,))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard)
        fully_shard(model.to(device), mesh=mesh, reshard_after_forward=self.reshard)
        for unit in sharded_units(model):  # a first pass in inference mode would make buffers that no gradient can pass
            unit.unshard()
            unit.reshard()
        self._model = model
        return model

    def wrap(self, step: nn.Module) -> nn.Module:
        return step

    @contextlib.contextmanager
    def accumulating(self, step: nn.Module, last: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(last)
        yield


def sharded_units(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters are sharded; none where no strategy has sharded any."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a model that is sharded has imported it
    return [] if fsdp is None else [unit for unit in model.modules() if isinstance(unit, fsdp.FSDPModule)]


def _met(name: str, timeout: float) -> World:
    if launched() is None:
        raise ConfigError(
            f"hardware/strategy={name} needs torchrun: torchrun --nproc-per-node 2 -m gptlab train … hardware/strategy={name}; "
            "for one process use hardware/strategy=single"
        )
    return join(timeout)


def _has_unused(model: nn.Module) -> bool:
    """Whether a parameter has no part in the model's output, as the norm before ffn=none: ddp else waits for its gradient for ever."""
    output = model(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    used, seen, ahead = set[int](), set[Any](), [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            used.add(id(getattr(node, "variable", None)))
            ahead += [before for before, _ in node.next_functions]
    return any(id(p) not in used for p in model.parameters() if p.requires_grad)


def _positive(timeout: float) -> float:
    if not timeout > 0:
        raise ConfigError(f"hardware.strategy.timeout={timeout} must be a positive number of minutes")
    return timeout
