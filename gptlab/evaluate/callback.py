"""What a model can do, while it is trained: probes and benchmarks at a cadence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.evaluate.probes import chosen, probe
from gptlab.evaluate.results import Score, keep, metrics_of
from gptlab.hardware.precision import autocast
from gptlab.runner.callback import Callback
from gptlab.runner.state import own_randomness

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer


@register("callback", "probes")
class Probes(Callback):
    """What the model can do, as `eval/NAME`, `every` so many steps (0: at the end alone): probes, and benchmark `tasks` too.

    probes  names or groups of `gptlab evaluate --probes`; none where tasks alone are asked for
    tasks   of lm-evaluation-harness; those over files of your own lie in `folder`
    limit   items of each at most; 0: all
    """

    def __init__(
        self,
        *,
        every: int = 0,
        probes: tuple[str, ...] = ("english", "induction"),
        tasks: tuple[str, ...] = (),
        folder: str = "",
        limit: int = 50,
    ) -> None:
        if every < 0 or limit < 0:
            raise ConfigError(f"callbacks.probes: every={every} and limit={limit} must be at least 0")
        if not probes and not tasks:
            raise ConfigError("callbacks.probes: there is nothing to ask; probes=[english] or tasks=[NAME] names something")
        chosen(probes)
        self.every, self.probes, self.tasks, self.folder, self.limit = every, probes, tasks, folder, limit
        self._measured, self._scores = -1, list[Score]()

    def on_start(self, trainer: Trainer) -> None:
        if self.probes:  # what the tokeniser cannot write at all is said now, and not when the run is over
            probe(trainer.model, trainer.data.tokenizer, self.probes, limit=1)

    def on_step(self, trainer: Trainer) -> None:
        if self.every and trainer.state.step % self.every == 0:
            self._measure(trainer)

    def on_end(self, trainer: Trainer) -> None:
        scores = self._measure(trainer)
        if trainer.world.first:
            keep(trainer.run, scores, precision=trainer.config.hardware.precision)

    def _measure(self, trainer: Trainer) -> list[Score]:
        if self._measured == trainer.state.step:
            return self._scores
        self._measured, self._scores = trainer.state.step, self._asked(trainer)
        trainer.record(metrics_of(self._scores))
        return self._scores

    def _asked(self, trainer: Trainer) -> list[Score]:
        model, tokenizer, found = trainer.model, trainer.data.tokenizer, []
        # the harness seeds every generator there is, and the training is to go on as if nothing had been
        with trainer.averages.using("default"), own_randomness(), autocast(trainer.device, trainer.config.hardware.precision):
            if self.probes:
                found += probe(model, tokenizer, self.probes, limit=self.limit)
            if self.tasks:
                from gptlab.evaluate.harness import benchmarks

                was_training = model.training
                found += benchmarks(model, tokenizer, self.tasks, folder=Path(self.folder) if self.folder else None, limit=self.limit)
                model.train(was_training)
        return found
