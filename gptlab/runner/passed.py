"""The batches a run passed over, since their loss was not finite or far above the others: every later step takes the next batch."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from gptlab.runner.run import Run
from gptlab.tracker.jsonl import read_metrics

PASSED = "passed.jsonl"  # in a run's folder: a line for each batch that was passed over


def note_passed(run: Run, batch: int, step: int, reason: str, **more: Any) -> None:
    """Write down that `batch` was passed over where `step` (from 1) would have used it."""
    line = {"batch": batch, "step": step, "reason": reason, **more}
    with (run.directory / PASSED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def passed_batches(run: Run) -> list[int]:
    """The numbers (from 0) of the batches a run has passed over so far, rising."""
    return sorted({int(line["batch"]) for line in read_metrics(run.directory / PASSED)})


def batch_of_step(step: int, passed: Collection[int]) -> int:
    """The number (from 0) of the batch that step `step` (from 1) uses. Batches that come later are passed over in vain."""
    batch = step - 1
    for other in sorted(passed):
        batch += other <= batch
    return batch
