"""The Hydra sweeper `halving`: many settings for a short while, the better ones for longer, the best for the whole budget.

gptlab train hydra/sweeper=halving study=wide optimizer.learning_rate=1e-3,2e-3,4e-3,8e-3 model/norm=layernorm,rmsnorm seed=0,1

Successive halving (Jamieson and Talwalkar, 2016) with whole runs: each rung trains its settings from the beginning to the end of its own
budget, schedule and all, since a loss in mid-decay says little. With one in three kept that costs at most half as much again as going on
would. The rungs before the last are studies of their own, NAME_rung1 and so on; what is done is found again when a sweep is repeated.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gptlab.config.errors import ConfigError
from gptlab.config.folders import study_folder
from gptlab.config.resolve import Budget, parse_budget
from gptlab.config.slots import word
from gptlab.config.sweeper import LaunchingSweeper, quoted

TARGET = "hydra_plugins.gptlab.HalvingSweeper"
HISTORY = "halving.json"  # in the study's folder


@dataclass
class HalvingConfig:
    """Options of hydra/sweeper=halving: one in `keep` settings goes on to the next of `rungs`, whose budget is `keep` times as long."""

    _target_: str = TARGET
    rungs: int = 3
    keep: float = 3.0
    params: dict[str, str] = field(default_factory=dict)  # of an experiment: key to values, as on the command line


@dataclass(frozen=True)
class Standing:
    """A setting in a rung: the mean held-out loss over its seeds (infinite: a run failed), and whether it goes on."""

    rung: int
    budget: str
    setting: str
    loss: float
    stays: bool


@dataclass(frozen=True)
class Ladder:
    """What a sweep asks for: the settings, the seeds that each is trained with, and the rungs' budgets, the whole one last."""

    settings: list[list[str]]
    seeds: list[str]
    common: list[str]
    budgets: list[str]

    def sizes(self, keep: float) -> list[int]:
        """How many settings each rung has."""
        return [max(1, math.ceil(len(self.settings) / keep**rung - 1e-9)) for rung in range(len(self.budgets))]


def ladder_of(options: HalvingConfig, arguments: Sequence[str], budget: str, parser: OverridesParser) -> Ladder:
    """Raises ConfigError."""
    if options.rungs < 2 or options.keep <= 1:
        raise ConfigError(f"hydra.sweeper: rungs={options.rungs} must be at least 2 and keep={options.keep} above 1")
    if budget == "auto":
        raise ConfigError("hydra/sweeper=halving divides the budget among its rungs; give one, such as trainer.budget=900steps")
    whole = parse_budget(budget)
    parsed = parser.parse_overrides([*(f"{key}={values}" for key, values in options.params.items()), *arguments])
    if any(str(o.get_key_element()) == "trainer.budget" and o.is_sweep_override() for o in parsed):
        raise ConfigError("hydra/sweeper=halving: trainer.budget is what its rungs divide; give one budget")
    last = {str(o.get_key_element()): o for o in parsed}  # what comes later wins
    swept = [key for key, o in last.items() if o.is_sweep_override() and key != "seed"]
    seeds = last.get("seed")
    values = [str(v) for v in seeds.sweep_string_iterator()] if seeds is not None and seeds.is_sweep_override() else []
    if seeds is not None and not values:
        values = [str(seeds.get_value_element_as_str())]
    axes = [last[key] for key in swept]
    points = [[str(o) for o in point] for batch in BasicSweeper.split_arguments(axes, None) for point in batch] if axes else []
    if len(points) < 2:
        raise ConfigError("hydra/sweeper=halving: nothing to choose from; give at least two values, as in model/norm=layernorm,rmsnorm")
    common = [str(o.input_line) for key, o in last.items() if key not in (*swept, "seed", "trainer.budget", "study")]
    budgets = [_written(whole, options.keep ** (rung + 1 - options.rungs)) for rung in range(options.rungs)]
    return Ladder(points, values, common, budgets)


def _written(whole: Budget, share: float) -> str:
    amount = whole.amount * share
    number = str(math.ceil(amount - 1e-9)) if whole.unit in ("steps", "tokens", "flops") else format(amount, ".4g")
    return f"{'+' if whole.beyond else ''}{number}{whole.unit}"


class HalvingSweeper(LaunchingSweeper):
    """Launches a rung as one batch, keeps the better settings, and launches the next."""

    def sweep(self, arguments: list[str]) -> Any:
        options = HalvingConfig(**cast(dict[str, Any], OmegaConf.to_container(self.config.hydra.sweeper, resolve=True)))
        ladder = ladder_of(options, arguments, str(self.config.trainer.budget), self.parser())
        name = str(self.config.study)
        settings, returned, history = ladder.settings, list[Any](), list[Standing]()
        sizes = ladder.sizes(options.keep)
        seeds: list[list[str]] = [[f"seed={seed}"] for seed in ladder.seeds] or [[]]
        for rung, budget in enumerate(ladder.budgets):
            study = name if rung == len(ladder.budgets) - 1 else f"{name}_rung{rung + 1}"
            own = [f"trainer.budget={budget}", f"study={study}"]
            jobs = [[*ladder.common, *s, *seed, *own, f"arm={quoted(_label(s))}"] for s in settings for seed in seeds]
            self.validate_batch_is_legal(jobs)
            results = self.launcher.launch(jobs, initial_job_idx=len(returned))
            returned += results
            losses = [result.return_value for result in results]  # a failure outside a run is raised here
            each = [losses[i : i + len(seeds)] for i in range(0, len(losses), len(seeds))]
            means = [math.inf if any(v is None or not math.isfinite(v) for v in loss) else math.fsum(loss) / len(loss) for loss in each]
            order = sorted(range(len(settings)), key=lambda i: means[i])
            stays = {i for i in order[: sizes[rung + 1] if rung + 1 < len(sizes) else 1] if math.isfinite(means[i])}
            history += [Standing(rung + 1, budget, shlex.join(settings[i]), means[i], i in stays) for i in order]
            folder = study_folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / HISTORY).write_text(json.dumps([_told(standing) for standing in history], indent=1), encoding="utf-8")
            settings = [settings[i] for i in order if i in stays]
            if not settings:
                break  # every run failed, and has been told
        return returned


def _label(setting: list[str]) -> str:
    return " ".join(word(key, value) for key, _, value in (override.partition("=") for override in setting))


def _told(standing: Standing) -> dict[str, Any]:
    told = asdict(standing)
    return told | {"loss": standing.loss if math.isfinite(standing.loss) else None}
