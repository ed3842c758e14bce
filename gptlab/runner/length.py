"""How long a run trains: its budget in steps, or by the clock, from where it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptlab.config.errors import ConfigError
from gptlab.config.resolve import Budget, parse_budget, start_step
from gptlab.config.schema import Config
from gptlab.runner.state import State

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer

UNKNOWN_STEPS = 1e12  # of a run by the clock, before its first step: far from any decay


@dataclass(frozen=True)
class Length:
    """A budget, the step it is counted from, and the steps it comes to (None where the clock decides)."""

    budget: Budget
    start: int
    steps: int | None

    @property
    def seconds(self) -> float:
        """Of a budget by the clock."""
        return 60 * self.budget.amount

    def finished(self, state: State) -> bool:
        """Whether the budget is spent."""
        return state.step >= self.steps if self.steps is not None else self._share(state) >= 1

    def total(self, state: State) -> float:
        """Steps of the whole run; where time is the budget, estimated from the run's own steps so far."""
        if self.steps is not None:
            return self.steps
        share = self._share(state)
        return self.start + (state.step - self.start) / share if share > 0 else UNKNOWN_STEPS

    def _share(self, state: State) -> float:
        """The share of its time that a run has spent: a branch has what its parent has left, or (`+10min`) all of it."""
        return (state.seconds - state.begun) / (self.seconds - (0.0 if self.budget.beyond else state.begun))


def length_of(config: Config, trainer: Trainer) -> Length:
    """The length of a run that has the model and the data of this trainer. Raises ConfigError for epochs of a text without an end."""
    budget, start, loader = parse_budget(config.trainer.budget), start_step(config), trainer.loader
    if budget.unit == "epochs" and loader.endless:
        raise ConfigError(
            f"trainer.budget={config.trainer.budget}: this text has no known end; give data.corpus.tokens, or a budget in tokens"
        )
    steps = budget.steps(
        batch_tokens=trainer.batch_tokens,
        epoch_tokens=loader.epoch_tokens if budget.unit == "epochs" else 0,
        parameters=trainer.parameters,
        flops_per_token=trainer.flops_per_token,
        start=start,
    )
    return Length(budget, start, steps)
