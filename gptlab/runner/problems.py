"""How many held-out problems a model solves, as a callback: of any objective, on a corpus that has problems."""

from __future__ import annotations

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.data.problems import Problems, problems_of
from gptlab.objective.answers import answered
from gptlab.runner.callback import Callback
from gptlab.runner.trainer import Trainer


@register("callback", "problems")
class Solved(Callback):
    """The share of `count` held-out problems solved greedily (`val/solved`), `every` so many steps (0: none) and at the end.

    For what is not trained by objective=grpo, which measures the same itself. `val/ended`: the share of answers that ended.
    """

    def __init__(self, *, every: int = 0, count: int = 256, max_tokens: int = 0) -> None:
        for name, value, least in (("every", every, 0), ("count", count, 1), ("max_tokens", max_tokens, 0)):
            if value < least:
                raise ConfigError(f"callbacks.problems.{name}={value} must be at least {least}")
        self.every, self.count, self.max_tokens = every, count, max_tokens
        self._source: Problems | None = None
        self._measured = -1

    def on_start(self, trainer: Trainer) -> None:
        if trainer.strategy.sharded:
            raise ConfigError("callback=problems writes with whole weights, which hardware/strategy=fsdp has not; use single or ddp")
        self._source = problems_of(trainer.data, trainer.config.data, trainer.config.model.context_length)

    def on_step(self, trainer: Trainer) -> None:
        if self.every and trainer.state.step % self.every == 0:
            self._measure(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._measured != trainer.state.step:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        assert self._source is not None
        self._measured = trainer.state.step
        with trainer.averages.using("default"):
            found = answered(trainer, self._source, self.count, max_tokens=self.max_tokens)
        trainer.record({"val/solved": found.solved, "val/ended": found.ended})
