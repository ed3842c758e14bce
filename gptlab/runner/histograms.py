"""How gradients and weights are spread, for a tracker that shows histograms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.runner.callback import Callback
from gptlab.tracker.protocol import Histogram

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer


@register("callback", "histograms")
class Histograms(Callback):
    """Histograms of every matrix's gradient and weight, `every` so many steps, in `bins`; W&B and TensorBoard show them.

    Costs about the reading of all weights and gradients twice at such a step. Not for sharded weights, of which a rank has a part.
    """

    def __init__(self, *, every: int = 100, bins: int = 64) -> None:
        self.every, self.bins = every, bins
        if every < 1 or bins < 2:
            raise ConfigError(f"callbacks.histograms: every={every} must be at least 1 and bins={bins} at least 2")

    def on_start(self, trainer: Trainer) -> None:
        if trainer.strategy.sharded:
            raise ConfigError("callback=histograms cannot look at weights that are sharded over ranks; use hardware/strategy=ddp or single")

    def before_update(self, trainer: Trainer) -> None:
        step = trainer.state.step + 1
        if step % self.every or not trainer.world.first:
            return
        found: dict[str, Histogram] = {}
        for name, parameter in trainer.model.named_parameters():
            if parameter.ndim < 2:
                continue
            found[f"weights/{name}"] = self._spread(parameter.detach())
            if parameter.grad is not None:
                found[f"gradients/{name}"] = self._spread(parameter.grad)
        trainer.tracker.histograms(step, found)

    def _spread(self, values: Tensor) -> Histogram:
        counts, edges = torch.histogram(values.float().cpu().reshape(-1), bins=self.bins)
        return counts.double().numpy(), edges.double().numpy()
