"""What a run minimises: a loss of a batch, and, where one is more than that, what it does around the steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.schema import Config
from gptlab.data.loader import Batch
from gptlab.data.prepared import Prepared
from gptlab.hardware.world import World
from gptlab.model.transformer import Transformer
from gptlab.tracker.protocol import Metrics, Tracker

Loss = Callable[[Transformer, Batch], Tensor]


class Training(Protocol):
    """What an objective may know of the run that it is trained in: the Trainer has it."""

    config: Config
    data: Prepared
    device: torch.device
    world: World
    tracker: Tracker

    @property
    def trained(self) -> Transformer:
        """The model, with its weights of now."""

    @property
    def number(self) -> int:
        """Steps that are done."""

    @property
    def batch_number(self) -> int:
        """The number of the batch that is next or being made, from 0: the steps, and one more for each batch that was passed over."""

    @property
    def folder(self) -> Path:
        """The run's own."""

    def initial(self) -> Transformer:
        """A model of its own with the weights that the run began with, in evaluation mode, without gradients."""

    def record(self, measured: Metrics) -> None:
        """Write a line with what was measured at this step."""


class Objective:
    """A loss with hooks. A plain function (model, batch) -> loss is an objective too: it has none of these.

    The loss is the sum over a batch; the trainer divides it by the batch's token weight (Batch.weight, summed over the whole step).
    """

    answers_problems = False  # it is trained on what the model itself answers, and not on the rows of its data

    def __call__(self, model: Transformer, batch: Batch) -> Tensor:
        raise NotImplementedError

    def check(self, data: Prepared, config: Config) -> None:
        """Raise ConfigError for data, or a beginning, that it cannot learn from. Nothing of the run has been made yet."""
        if data.pairs:
            raise ConfigError(
                "this data is pairs of a better and a worse answer, which objective=dpo learns from; "
                "data/corpus=chat takes the better ones as chats"
            )

    def adapt(self, model: Transformer, seed: int, new_tokens: int) -> None:
        """Before the optimizer is made: freeze parameters, or add some, drawn by `seed`. The weights are not there yet.

        `new_tokens`: how many of the vocabulary the weights to come do not know.
        """

    def begin(self, training: Training) -> None:
        """Before the first step of a session, the weights being there."""

    def outlined(self, batch: Batch) -> Batch:
        """A batch of plain rows as one of the shape that it is trained on: by which memory is forecast."""
        return batch

    def experience(self, training: Training, drawn: Batch) -> Batch:
        """What a step is trained on, from the rows that were drawn for it: themselves, or what the model makes of them."""
        return drawn

    def measure(self, training: Training) -> Metrics:
        """What is measured with each evaluation beside the held-out loss: `val/…`."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep of it."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave; nothing where a checkpoint kept nothing."""


class Plain(Objective):
    """A function as an objective."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, model: Transformer, batch: Batch) -> Tensor:
        return self.loss(model, batch)


def hooked(objective: Loss | Objective) -> Objective:
    """An objective with its hooks, those of a plain function doing nothing."""
    return objective if isinstance(objective, Objective) else Plain(objective)
