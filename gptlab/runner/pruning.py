"""A trial of a search that is given up by its validation curve (`hydra/sweeper=optuna hydra.sweeper.pruner=median`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gptlab.config.errors import ConfigError, Pruned
from gptlab.config.registry import register
from gptlab.config.search import NEEDED, PRUNED, pruner
from gptlab.runner.callback import Callback

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer


@register("callback", "pruning")
class Pruning(Callback):
    """Tells optuna's trial of each held-out loss, and leaves, with a checkpoint, where its study's `pruner` says that it is not worth more.

    The sweeper sets all of it. The same command without it trains the run to its end.
    """

    def __init__(self, *, storage: str = "", study: str = "", trial: int = -1, pruner: str = "median") -> None:
        self.storage, self.study, self.number, self.pruner = storage, study, trial, pruner
        self._told = -1

    def on_start(self, trainer: Trainer) -> None:
        if not self.storage or not self.study or self.number < 0:
            raise ConfigError(
                "callback=pruning is put into a trial by hydra/sweeper=optuna hydra.sweeper.pruner=median; it does nothing alone"
            )
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(NEEDED.format(what="callback=pruning")) from error
        self._trial = None
        if trainer.world.first:
            study = optuna.load_study(study_name=self.study, storage=self.storage, pruner=pruner(self.pruner))
            self._trial = optuna.trial.Trial(study, study._storage.get_trial_id_from_study_id_trial_number(study._study_id, self.number))

    def on_step(self, trainer: Trainer) -> None:
        step, loss = trainer.measured_on_held_out
        if step != trainer.state.step or step == self._told or trainer.finished:
            return
        self._told = step
        if trainer.world.share(lambda: self._gives_up(step, loss)):
            trainer.save_checkpoint()
            trainer.writer.wait()
            raise Pruned(f"given up at step {step}: val/loss {loss:.4f} is not among the better ones of its search")

    def _gives_up(self, step: int, loss: float) -> bool:
        assert self._trial is not None
        self._trial.report(loss if math.isfinite(loss) else math.inf, step)
        if not self._trial.should_prune():
            return False
        self._trial.set_user_attr(PRUNED, step)
        return True
