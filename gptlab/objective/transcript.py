"""Rollouts to be read: a file in the run's samples, and a table for the tracker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from gptlab.objective.protocol import Training
from gptlab.objective.rollout import Rollout

TABLE_ROWS = 32  # of a step that go to the tracker


def write_rollouts(
    training: Training,
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    parts: Mapping[str, Sequence[float]],
    advantages: Sequence[float],
) -> None:
    """Write all rollouts that the next step learns from to samples/rollouts-STEP.jsonl, and hand the first of them to the tracker."""
    step = training.number + 1
    lines: list[dict[str, float | int | str]] = [
        {
            "step": step,
            "prompt": rollout.sample.prompt,
            "completion": rollout.sample.completion,
            "reference": rollout.sample.reference,
            "ended": rollout.sample.ended,
            "tokens": len(rollout.completion),
            "reward": reward,
            **({f"reward/{name}": values[i] for name, values in parts.items()} if len(parts) > 1 else {}),
            "advantage": round(advantage, 6),
        }
        for i, (rollout, reward, advantage) in enumerate(zip(rollouts, rewards, advantages, strict=True))
    ]
    folder = training.folder / "samples"
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"rollouts-{step:09d}.jsonl").write_text(text, encoding="utf-8")
    training.tracker.table(step, "rollouts", list(lines[0]), [list(line.values()) for line in lines[:TABLE_ROWS]])
