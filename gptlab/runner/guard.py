"""Looks at a step before its update: a loss or gradient that is not finite, and a loss far above the recent ones."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from gptlab.config.errors import DivergedError
from gptlab.runner import checkpoint
from gptlab.runner.passed import note_passed
from gptlab.tracker.console import say
from gptlab.tracker.protocol import Metrics

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer

MEMORY = 0.98  # of the running mean and variance: about the last 50 losses
SETTLED = 20  # losses before a spike can be told from the beginning's fall
BATCHES = "batches"  # in a run's folder: the batches that were passed over or spiked, to look at


@dataclass
class Losses:
    """Running mean and variance of a run's losses (exponentially weighted; West, 1979); part of its state."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def add(self, loss: float) -> None:
        """Count a loss in. The first ones weigh as in a plain mean."""
        self.count += 1
        weight = max(1 - MEMORY, 1 / self.count)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)

    def deviations(self, loss: float) -> float:
        """How many standard deviations a loss lies above the mean; 0 while there are too few to tell."""
        if self.count < SETTLED or self.variance <= 0:
            return 0.0
        return (loss - self.mean) / math.sqrt(self.variance)


class Guard:
    """Decides on each step, with what all ranks know, whether its update is made. Acts as trainer.on_nonfinite and skip_spikes say."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Trainer = weakref.proxy(trainer)  # which holds this: a circle would keep a failed job in memory

    def judge(self, loss: float, norm: float, bad_ranks: list[int], scored: float) -> Metrics | None:
        """None: the batch is passed over, and the state is as before it (or as in the last checkpoint). Else what there is to tell.

        `bad_ranks`: where the loss is not finite; `scored`: the batch's token weight. Raises DivergedError where the run has to stop.
        """
        trainer, settings = self.trainer, self.trainer.config.trainer
        # A scaled fp16 gradient may overflow: the scaler then skips the update itself.
        if not math.isfinite(loss):
            self._not_finite(f"the loss is {loss}", bad_ranks)
            return None
        if not math.isfinite(norm) and not trainer.scaler.is_enabled():
            self._not_finite(f"the gradient norm is {norm}", [])
            return None
        if not scored:
            self._pass_over("none of its tokens is scored", [])
            return None
        losses = trainer.state.losses
        above = losses.deviations(loss)
        if settings.skip_spikes and above > settings.skip_spikes:
            self._pass_over(f"the loss {loss:.4f} is {above:.1f} standard deviations above the mean {losses.mean:.4f}", [])
            return None
        losses.add(loss)
        if not settings.log_spikes or above <= settings.log_spikes:
            return {}
        self._keep_batch()
        self._say(f"step {trainer.state.step + 1}: the loss {loss:.4f} is {above:.1f} standard deviations above the recent ones")
        return {"train/spike": above}

    def judge_held_out(self, loss: float) -> None:
        """Raises DivergedError where the last update has spoilt the weights. With batches to pass over, the next step says so, if there is
        one."""
        trainer = self.trainer
        if not math.isfinite(loss) and (trainer.finished or trainer.config.trainer.on_nonfinite == "stop"):
            raise DivergedError(
                f"the held-out loss is {loss} at step {trainer.state.step}, whose update spoilt the weights; {self._kept()}"
            )

    def _kept(self) -> str:
        """What is left of a run that ends here, and what may help."""
        self.trainer.writer.close()
        kept = checkpoint.checkpoints(self.trainer.run.checkpoints)
        left = f"{kept[0].name} is kept" if kept else "no checkpoint had been saved yet"
        return f"{left}; a lower optimizer.learning_rate or a longer schedule.warmup would help"

    def _not_finite(self, what: str, bad_ranks: list[int]) -> None:
        trainer = self.trainer
        mode, step = trainer.config.trainer.on_nonfinite, trainer.state.step + 1
        if mode == "stop":
            raise DivergedError(
                f"{what}{self._where(bad_ranks)} at step {step} ({self._rows(bad_ranks)}; "
                f"gptlab data show {trainer.run.identity} --step {step} prints them); "
                f"{self._kept()}, and trainer.on_nonfinite=skip or rollback passes over the batch"
            )
        self._pass_over(what, bad_ranks)
        if mode == "rollback":
            from gptlab.runner.resume import roll_back  # which knows the trainer, that knows this

            roll_back(trainer)
            self._say(f"went back to step {trainer.state.step}")

    def _pass_over(self, what: str, bad_ranks: list[int]) -> None:
        """Mark the batch as not to be trained on, keep it to be looked at, and say so. Raises DivergedError when there were too many."""
        trainer = self.trainer
        batch, step, most = trainer.state.batch, trainer.state.step + 1, trainer.config.trainer.max_passed
        what += self._where(bad_ranks)
        if len(trainer.passed) >= most:
            raise DivergedError(
                f"{what} at step {step} ({self._rows(bad_ranks)}), and {len(trainer.passed)} batches have been passed over already "
                f"(trainer.max_passed={most}): the batches are hardly to blame; a lower optimizer.learning_rate would help"
            )
        trainer.passed.add(batch)
        self._keep_batch()
        if trainer.world.first:
            note_passed(trainer.run, batch, step, what)
        trainer.latest["train/passed_over"] = len(trainer.passed)
        self._say(f"step {step}: {what}; its batch ({self._rows(bad_ranks)}) is passed over")

    def _keep_batch(self) -> None:
        trainer = self.trainer
        if not trainer.world.first:
            return
        whole = trainer.loader.whole(trainer.state.batch)
        parts = {"inputs": whole.inputs, "targets": whole.targets, "weight": whole.weight, "document": whole.document}
        folder = trainer.run.directory / BATCHES
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in parts.items() if v is not None}, folder / f"batch-{trainer.state.batch:09d}.safetensors")

    def _rows(self, bad_ranks: list[int]) -> str:
        """The samples of this step, of the ranks to blame where they are known, by their numbers in the order of the data."""
        loader, ranks = self.trainer.loader, self.trainer.world.size
        first = self.trainer.state.batch * loader.rows
        share = loader.rows // ranks
        blamed = sorted(bad_ranks) if bad_ranks and len(bad_ranks) < ranks else []
        spans = [(first + r * share, first + (r + 1) * share - 1) for r in blamed] or [(first, first + loader.rows - 1)]
        return "rows " + ", ".join(f"{a:,} to {b:,}" for a, b in spans) + f", batch {self.trainer.state.batch:,} of the data's order"

    def _where(self, bad_ranks: list[int]) -> str:
        if not bad_ranks or self.trainer.world.size == 1:
            return ""
        return f" on rank{'s' * (len(bad_ranks) > 1)} {', '.join(map(str, bad_ranks))}"

    def _say(self, text: str) -> None:
        if self.trainer.world.first:
            say((text, "yellow"))
