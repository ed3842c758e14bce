"""Averages of the weights, which a run may keep beside those it trains: who makes one, where it is saved, and what uses it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptlab.config.errors import CheckpointError, ConfigError
from gptlab.config.registry import component_of, register, suggest
from gptlab.hardware.strategy import sharded_units
from gptlab.model.lora import merged
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.checkpoint import AVERAGE, CALLBACKS

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer

WEIGHTS = ("default", "trained", "average")


@dataclass(frozen=True)
class Kept:
    """An average as a checkpoint's state.json names it."""

    tensors: str  # begins the names of its tensors; the parameter's path follows
    default: bool  # whether it is what the run is used with: validation, samples, `load`
    metric: str  # of its held-out loss: `val` of one that is the default, else `val_` and the name of its callback


class Averages:
    """The average of a trainer's weights, if it keeps one: its optimizer makes it (schedule_free) or a callback does (ema).

    Raises ConfigError for two of them, and for an optimizer that averages under a schedule that decays.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Trainer = weakref.proxy(trainer)  # which holds this: a circle would keep a failed job in memory
        self._callbacks = dict(zip(trainer.config.callbacks, trainer.callbacks, strict=True))
        self._held: dict[str, Tensor] = {}  # while the average stands in the model: the weights that are trained
        self._placed = False
        makers = [key for key, callback in self._callbacks.items() if callback.makes_average]
        optimizer = f"optimizer={component_of(trainer.config.optimizer).name}"
        self._optimizer: Any = trainer.optimizer if hasattr(trainer.optimizer, "average") else None
        if len(makers) + (self._optimizer is not None) > 1:
            owner = optimizer if self._optimizer is not None else f"callbacks.{makers[0]}"
            raise ConfigError(
                f"callbacks.{makers[-1]}: a run keeps one average of its weights, and {owner} makes it; leave one of them out"
            )
        self.kept: Kept | None = None
        if self._optimizer is not None:
            self.kept = Kept(AVERAGE, default=True, metric="val")
            last = trainer.steps or 1_000_000
            if (left := trainer.schedule(last, last)) < 1:
                chosen = f"schedule={component_of(trainer.config.schedule).name}"
                raise ConfigError(
                    f"{optimizer} averages where others decay, and {chosen} ends at {left:.3g} of the rate; use schedule=constant"
                )
        elif makers:
            self.kept = Kept(f"{CALLBACKS}{makers[0]}.{AVERAGE}", default=False, metric=f"val_{makers[0]}")

    @property
    def beside(self) -> str:
        """The metric's name of an average that is measured beside the trained weights; '' where there is none."""
        return self.kept.metric if self.kept and not self.kept.default else ""

    @contextmanager
    def using(self, which: str = "default") -> Iterator[None]:
        """The model with these weights: `trained`, `average`, or what the run is used with (`default`); as it was afterwards, bit for bit.

        Every rank calls it. Nothing may be trained or saved meanwhile. Raises ConfigError where there is no average.
        """
        average = wants_average(self.kept, which, "this run")
        if average == self._placed:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _exchange(self) -> None:
        """Put the average in the place of the weights, or these back: in place, since a sharded or compiled model knows its memory."""
        for unit in sharded_units(self._trainer.model):  # else it may go on with parameters that it gathered before
            unit.reshard()
        if not self._placed:
            self._held = self._current()
        for path, parameter in self._trainer.model.named_parameters():
            before = parameter.detach().clone()
            parameter.copy_(self._held[path])
            self._held[path].copy_(before)
        self._placed = not self._placed

    def _current(self) -> dict[str, Tensor]:
        """Path -> average: of a callback the tensors it goes on with, of the optimizer copies."""
        if self._optimizer is not None:
            return {path: self._optimizer.average(p) for path, p in self._trainer.model.named_parameters()}
        assert self.kept is not None
        prefix, tensors = self.kept.tensors, self.callbacks_tensors()
        return {path: tensors[prefix + path] for path, _ in self._trainer.model.named_parameters()}

    def callbacks_tensors(self) -> dict[str, Tensor]:
        """What the callbacks remember, under the names of a checkpoint: the very tensors, for a resume to fill."""
        return {
            f"{CALLBACKS}{key}.{name}": tensor
            for key, callback in self._callbacks.items()
            for name, tensor in callback.tensors(self._trainer).items()
        }

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint holds of the callbacks and of the average: for its state.json, and tensors."""
        assert not self._placed, "a checkpoint of weights that are not the trained ones"
        tensors = self.callbacks_tensors()
        if self._optimizer is not None:
            tensors |= {AVERAGE + path: tensor for path, tensor in self._current().items()}
        return {} if self.kept is None else {"average": asdict(self.kept)}, tensors


def check_weights(which: str) -> None:
    """Raise ConfigError for weights that there never are."""
    if which not in WEIGHTS:
        raise ConfigError(f"weights={which} is not one of {', '.join(WEIGHTS)}{suggest(which, WEIGHTS)}")


def wants_average(kept: Kept | None, which: str, what: str) -> bool:
    """Whether `which` weights are the average. Raises ConfigError for a word that means nothing, or where `what` keeps no average."""
    check_weights(which)
    if which == "average" and kept is None:
        raise ConfigError(
            f"weights=average: {what} keeps no average of its weights; "
            "train with +callback@callbacks.ema=ema or optimizer=schedule_free to have one"
        )
    return which == "average" or (which == "default" and kept is not None and kept.default)


def kept_in(chosen: Path) -> Kept | None:
    """The average that a checkpoint holds. Raises CheckpointError for a state.json that gptlab has not written."""
    found = checkpoint.load_state(chosen).get("average")
    try:
        return None if found is None else Kept(**found)
    except TypeError as error:
        raise CheckpointError(f"{chosen}: its state names an average in a way that this gptlab does not know ({error})") from error


def load_weights(chosen: Path, which: str = "default") -> tuple[str, dict[str, Tensor], str | None]:
    """`trained` or `average`, these weights of a checkpoint (whole, on the CPU), and the metric of their loss if they are measured.

    Adapters are added to the products they stand beside: these are the weights of a plain model. Raises ConfigError for an average that
    the checkpoint does not hold, CheckpointError for one that is damaged.
    """
    kept = kept_in(chosen)
    if not wants_average(kept, which, str(chosen)):
        return "trained", merged(checkpoint.load_model(chosen)), None if kept and kept.default else "val/loss"
    assert kept is not None
    weights, others = checkpoint.load_tensors(chosen)
    average = {name.removeprefix(kept.tensors): tensor for name, tensor in others.items() if name.startswith(kept.tensors)}
    if not average or not average.keys() <= weights.keys():
        raise CheckpointError(f"{chosen}: the average that its state names is not among its tensors")
    return "average", merged(weights | average), f"{kept.metric}/loss"


def fill(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path) -> None:
    """Copy into each target what is found under its name. Raises CheckpointError where it is missing or has another shape."""
    for name, target in targets.items():
        if name not in found or found[name].shape != target.shape:
            raise CheckpointError(f"{where} does not fit this run: it has no {name} of {tuple(target.shape)}")
        target.copy_(found[name])


@register("callback", "ema")
class EMA(Callback):
    """An exponential mean of the weights: measured as `val_ema/loss` beside theirs, saved, and taken where `weights=average` is asked for.

    decay   what is kept of the mean at a step
    every   it is brought up to date every so many steps, with decay^every
    warm    the decay begins low, at most (1 + t) / (10 + t) at step t, so that the first weights are soon forgotten
    """

    changes_training = True  # not the training, but what it leaves: a run without it has no average to show
    makes_average = True

    def __init__(self, *, decay: float = 0.999, every: int = 1, warm: bool = True) -> None:
        if not 0 <= decay < 1 or every < 1:
            raise ConfigError(f"callbacks.ema: decay={decay} must be in [0, 1), and every={every} at least 1")
        self.decay, self.every, self.warm = decay, every, warm
        self._tensors: dict[str, Tensor] = {}

    def tensors(self, trainer: Trainer) -> Mapping[str, Tensor]:
        if not self._tensors:
            self._parameters = [p.detach() for p in trainer.model.parameters()]
            self._tensors = {AVERAGE + path: p.detach().clone() for path, p in trainer.model.named_parameters()}
            self._means = list(self._tensors.values())
            self._tensors["steps"] = torch.zeros((), dtype=torch.int64)
        return self._tensors

    def on_start(self, trainer: Trainer) -> None:
        self.tensors(trainer)  # before the first update

    @torch.no_grad()
    def after_update(self, trainer: Trainer) -> None:
        steps = self._tensors["steps"].add_(1)
        if (t := int(steps)) % self.every == 0:
            decay = min(self.decay, (1 + t) / (10 + t)) if self.warm else self.decay
            torch._foreach_lerp_(self._means, self._parameters, 1 - decay**self.every)
