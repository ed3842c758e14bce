"""Going on from a checkpoint: of a run that stopped, or back within one that diverged. Every rank does it together."""

from __future__ import annotations

from pathlib import Path

from gptlab.config.errors import DivergedError
from gptlab.runner import checkpoint, sharded
from gptlab.runner.averages import fill
from gptlab.runner.passed import passed_batches
from gptlab.runner.state import State, optimizer_targets, unpack_optimizer
from gptlab.runner.trainer import Trainer


def resume(trainer: Trainer) -> list[str]:
    """Continue from the checkpoint that trainer.resume names: `latest` is the newest good one, if there is one.

    Returns what was wrong with newer ones. Raises CheckpointError for one that was named and is damaged, or does not fit.
    """
    folder, which = trainer.run.checkpoints, trainer.config.trainer.resume

    complaints: list[str]

    def find() -> tuple[set[int], Path | None, list[str]]:
        told: list[str] = []
        found = checkpoint.newest_good(folder, told) if which == "latest" else checkpoint.choose(folder, which)
        return set(passed_batches(trainer.run)), found, told

    trainer.passed, found, complaints = trainer.world.share(find)
    if found is not None:
        restore(trainer, found)
    return complaints


def roll_back(trainer: Trainer) -> None:
    """Go back to the newest good checkpoint, and take back what has been logged since. Raises DivergedError where there is none."""
    trainer.writer.wait()
    found: Path | None = trainer.world.share(lambda: checkpoint.newest_good(trainer.run.checkpoints))
    if found is None:
        raise DivergedError(f"no checkpoint in {trainer.run.checkpoints} is whole, so that there is none to go back to")
    restore(trainer, found)
    if trainer.metrics is not None:
        trainer.metrics.rewind(trainer.state.step)


def restore(trainer: Trainer, found: Path) -> None:
    """Give a trainer back the state of a checkpoint, whole or sharded, whatever its own strategy. Raises CheckpointError."""
    saved, callbacks = checkpoint.load_state(found), trainer.averages.callbacks_tensors()
    if trainer.strategy.sharded:
        model, tensors = trainer.model.state_dict(), optimizer_targets(trainer.optimizer, sharded.shapes(found))
        sharded.load_into(found, {**model, **tensors, **callbacks}, trainer.world.writers())
    else:
        model, tensors = checkpoint.load_tensors(found)
        fill(callbacks, tensors, found)
    checkpoint.fill(trainer.model, model, found)
    unpack_optimizer(trainer.optimizer, saved["optimizer"], tensors)
    if saved["scaler"]:
        trainer.scaler.load_state_dict(saved["scaler"])
    prefix = checkpoint.OBJECTIVE
    trainer.objective.restore({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
    trainer.state = State.from_json(saved["state"])
    trainer.writer.saved = trainer.state.step
