"""What happens around the training steps: the hooks a callback may fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from gptlab.tracker.protocol import Metrics

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer


class Callback:
    """Every hook does nothing until a subclass fills it.

    A callback that changes the numbers of the training itself, or what a run leaves behind, says so with `changes_training = True`, and
    becomes part of a run's identity. One that keeps an average of the weights says `makes_average = True`: of its `tensors`, those
    named `average.PATH` are that of the parameter PATH.
    """

    changes_training = False
    makes_average = False

    def tensors(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """What it must remember, by names of its own: each checkpoint holds it, and a resume fills these very tensors before `on_start`."""
        return {}

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of a session, a resumed one too."""

    def before_update(self, trainer: Trainer) -> None:
        """Between the gradients of a step, unscaled and clipped, and its update; what is done here is left out of the step's seconds."""

    def after_update(self, trainer: Trainer) -> None:
        """Right after the update, before anything measures or saves the weights; it counts among the step's seconds."""

    def on_step(self, trainer: Trainer) -> None:
        """After each step; `trainer.state` counts it."""

    def on_record(self, trainer: Trainer, metrics: Metrics) -> None:
        """Before a line is written: add to it."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of the budget."""
