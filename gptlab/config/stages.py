"""The Hydra sweeper `stages`: runs one after another, each beginning with the weights of the one before it.

defaults:
  - override /hydra/sweeper: stages
hydra:
  mode: MULTIRUN
  sweeper: {stages: {base: data=pydocs model=nano, chat: data=drills objective=sft}}
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from gptlab.config.errors import ConfigError
from gptlab.config.sweeper import LaunchingSweeper, quoted

TARGET = "hydra_plugins.gptlab.StageSweeper"
LAUNCH = "GPTLAB_LAUNCH"  # the folder in which each task of a launch notes what became of it
OUTCOMES = "outcomes.jsonl"


@dataclass
class StagesConfig:
    """Options of hydra/sweeper=stages. `stages`: name to overrides, in order; the command line's go to every stage, and win."""

    _target_: str = TARGET
    stages: dict[str, str] = field(default_factory=dict)


def jobs_of(sweeper: DictConfig, arguments: Sequence[str], parser: OverridesParser) -> dict[str, list[str]]:
    """Each stage's overrides, but for the run it begins with. Raises ConfigError where there is none, or a list of values is given."""
    stages: Any = OmegaConf.to_container(sweeper.stages, resolve=True)
    if not stages:
        raise ConfigError("hydra.sweeper.stages is empty; give each stage its overrides, as +hydra.sweeper.stages.base='data=pydocs'")
    for override in parser.parse_overrides([*arguments, *(o for text in stages.values() for o in shlex.split(text))]):
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: hydra/sweeper=stages runs its stages once; give one value")
    own = [a for a in arguments if not a.lstrip("+").startswith(("hydra.sweeper", "hydra/sweeper"))]
    return {name: [*shlex.split(text), *own, f"name={quoted(name)}"] for name, text in stages.items()}


class StageSweeper(LaunchingSweeper):
    """Launches one stage after the other; what comes after a stage that failed is left out."""

    def sweep(self, arguments: list[str]) -> Any:
        results, before = [], ""
        for number, job in enumerate(jobs_of(self.config.hydra.sweeper, arguments, self.parser()).values()):
            job = [*job, f"trainer.init_from={quoted(before)}"] if before else job  # an identity may look like a number: 13e0957672
            self.validate_batch_is_legal([job])
            (result,) = self.launcher.launch([job], initial_job_idx=number)
            _ = result.return_value  # a failure outside a run is raised here
            results.append(result)
            before = _made(number)
            if not before:
                break
        return results


def _made(number: int) -> str:
    """The identity of the run that a job has made; empty where it has failed."""
    folder = os.environ.get(LAUNCH)
    file = Path(folder) / OUTCOMES if folder else None
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
    noted: dict[str, Any] = next((told for told in map(json.loads, reversed(lines)) if told["job"] == number), {})
    return str(noted.get("run", ""))
