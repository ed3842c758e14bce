"""What happens around the training steps: the hooks a callback may fill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptlab.tracker.protocol import Metrics

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer


class Callback:
    """Every hook does nothing until a subclass fills it.

    A callback that changes the numbers of the training itself says so with `changes_training = True`, and becomes part of a
    run's identity.
    """

    changes_training = False

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of a session, a resumed one too."""

    def on_step(self, trainer: Trainer) -> None:
        """After each step; `trainer.state` counts it."""

    def on_record(self, trainer: Trainer, metrics: Metrics) -> None:
        """Before a line is written: add to it."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of the budget."""
