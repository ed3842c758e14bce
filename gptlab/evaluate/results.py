"""One figure of one task, and where a run keeps its own: benchmarks.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from gptlab.runner.run import Run
from gptlab.tracker.protocol import Metrics

FILE = "benchmarks.json"  # in a run's folder


@dataclass(frozen=True)
class Score:
    """One figure of one task: its metric, value and standard error (None where there is none), and of how many examples.

    `shots`: examples shown before each; `chance`: what guessing reaches, where that is known; `skipped`: examples that the model's
    tokeniser cannot write.
    """

    task: str
    metric: str
    value: float
    error: float | None
    examples: int
    shots: int
    chance: float | None = None
    skipped: int = 0

    @property
    def name(self) -> str:
        """What it is called in a run's folder, in W&B and in a comparison."""
        return f"{self.task}/{self.metric}"


def share(task: str, marks: Sequence[float], *, shots: int = 0, chance: float | None = None, skipped: int = 0) -> Score:
    """The mean of marks from 0 to 1, with the standard error of a mean over so many independent examples."""
    n = len(marks)
    mean = sum(marks) / n
    error = math.sqrt(sum((mark - mean) ** 2 for mark in marks) / (n - 1) / n) if n > 1 else None
    return Score(task, "acc", mean, error, n, shots, chance, skipped)


def keep(run: Run, scores: Iterable[Score], **how: Any) -> None:
    """Write scores to the run's folder beside what is there, and `how` they were measured with each."""
    made = {score.name: asdict(score) | how for score in scores}
    run.write(FILE, (run.read(FILE) or {}) | made)


def kept(run: Run) -> dict[str, Score]:
    """The scores in a run's folder, by name."""
    known = {field.name for field in fields(Score)}
    return {name: Score(**{k: v for k, v in told.items() if k in known}) for name, told in (run.read(FILE) or {}).items()}


def metrics_of(scores: Iterable[Score]) -> Metrics:
    """`eval/NAME`, and `eval/NAME_stderr` where that is known, as a tracker gets them."""
    found: Metrics = {}
    for score in scores:
        found[f"eval/{score.name}"] = score.value
        if score.error is not None:
            found[f"eval/{score.name}_stderr"] = score.error
    return found
