"""The Hydra sweeper `arms`: the arms of an ablation, each with every seed, whatever launches them.

defaults:
  - override /hydra/sweeper: arms
hydra:
  mode: MULTIRUN
  sweeper: {design: ladder, seeds: 3, vary: {model/norm: "layernorm,rmsnorm"}, arms: {muon: optimizer=muon}}
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from gptlab.config.arms import GRID, Arm, axis, expand, overrides_of, with_overrides
from gptlab.config.errors import ConfigError
from gptlab.config.registry import suggest

_GRAMMAR, _ESCAPED = re.compile(r"([=:,(){}\[\]])"), r"\\\1"  # of Hydra's dictionaries
SEEDS = 3  # unless told otherwise
TARGET = "hydra_plugins.gptlab.ArmSweeper"


@dataclass
class ArmsConfig:
    """Options of hydra/sweeper=arms. `vary`: key to values, comma-separated; `arms`: name to overrides; `seeds`: from `first_seed`."""

    _target_: str = TARGET
    vary: dict[str, str] = field(default_factory=dict)
    arms: dict[str, str] = field(default_factory=dict)
    design: str = GRID
    exact: dict[str, str] = field(default_factory=dict)  # name to overrides: these arms alone, whatever the rest says
    params: dict[str, str] = field(default_factory=dict)  # as Hydra's own sweeper has them: axes too, and the list of seeds
    seeds: int = 0  # 0: those of params, else SEEDS
    first_seed: int = 0
    baseline: str = ""  # the arm the others are judged against; the first, unless named
    effect: float = 0.01  # the smallest difference of val/loss worth knowing
    looks: list[int] = field(default_factory=list)  # of a sequential study: the numbers of seeds at which it is looked at


@dataclass(frozen=True)
class Study:
    """What a sweep over arms asks for: the arms, the seeds, and the overrides that all share."""

    arms: list[Arm]
    seeds: list[int]
    common: list[str]
    options: ArmsConfig

    def jobs(self) -> list[list[str]]:
        """Every run's overrides: seed by seed, so that a study that is cut short has whole pairs, and the arms share good and bad hours."""
        return [self.job(arm, seed) for seed in self.seeds for arm in self.arms]

    def job(self, arm: Arm, seed: int) -> list[str]:
        return [*with_overrides(self.common, arm.overrides), f"seed={seed}", f"arm={quoted(arm.label)}"]

    def arguments(self, name: str, *, arms: Sequence[Arm] = (), seeds: Sequence[int] = (), looks: Sequence[int] = ()) -> list[str]:
        """The arguments of `gptlab train` that launch these very arms (unless told: all, with all seeds) as the study `name`."""
        exact = {arm.label: shlex.join(arm.overrides) for arm in arms or self.arms}
        options = [dictionary("exact", exact), f"hydra.sweeper.effect={self.options.effect}"]
        options += [f"hydra.sweeper.baseline={quoted(self.options.baseline)}"] if self.options.baseline in exact else []
        options += [f"hydra.sweeper.looks=[{','.join(map(str, looks))}]"] if looks else []
        own = ("study=", "seed=", "hydra/sweeper", "hydra.sweeper")
        common = [o for o in self.common if not o.lstrip("+").startswith(own)]
        return ["-m", "hydra/sweeper=arms", *options, *common, f"study={name}", f"seed={','.join(map(str, seeds or self.seeds))}"]


def study_of(sweeper: DictConfig, arguments: Sequence[str], parser: OverridesParser) -> Study:
    """What `hydra.sweeper` and the command line ask for: a list of values there is one more axis, a list of seeds replaces the number.

    Raises ConfigError.
    """
    given = cast(dict[str, Any], OmegaConf.to_container(sweeper, resolve=True))
    options = ArmsConfig(**given)
    params = dict(options.params)  # of an experiment that is a plain sweep
    listed = str(params.pop("seed", ""))
    fixed = [f"{key}={values}" for key, values in params.items() if len(_values(f"{key}={values}", parser)) < 2]
    vary = dict(
        axis(f"{key}={values}") for key, values in ({k: v for k, v in params.items() if f"{k}={v}" not in fixed} | options.vary).items()
    )
    named = {name: overrides_of(text, f"hydra.sweeper.arms.{name}") for name, text in options.arms.items()}
    common: list[str] = fixed
    seeds = list(range(options.first_seed, options.first_seed + (options.seeds or SEEDS)))
    if listed and not options.seeds:
        seeds = [int(v) for v in _values(f"seed={listed}", parser)]
    for override in parser.parse_overrides(list(arguments)):
        key = str(override.get_key_element())
        if key == "seed":
            seeds = [int(v) for v in _values(str(override.input_line), parser)]
        elif override.is_sweep_override():
            vary[key] = axis(str(override.input_line))[1]
        else:
            common.append(str(override.input_line))
    if not seeds:
        raise ConfigError(f"hydra.sweeper.seeds={options.seeds}: an ablation needs at least one seed")
    found = [Arm(name, tuple(shlex.split(text))) for name, text in options.exact.items()] or expand(vary, named, options.design)
    labels = [arm.label for arm in found]
    if options.baseline and options.baseline not in labels:
        near = suggest(options.baseline, labels)
        raise ConfigError(f"--baseline {options.baseline!r} is not an arm{near}; there are: {'; '.join(labels)}")
    return Study(found, seeds, common, options)


def dictionary(name: str, values: Mapping[str, str]) -> str:
    """The override that gives a dictionary of this sweeper's its values, whatever characters these hold."""
    inner = ", ".join(f"{_GRAMMAR.sub(_ESCAPED, key)}: {quoted(value)}" for key, value in values.items())
    return f"++hydra.sweeper.{name}={{{inner}}}"


def quoted(text: str) -> str:
    """A text as a value in Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _values(override: str, parser: OverridesParser) -> list[str]:
    parsed = parser.parse_overrides([override])[0]
    return [str(v) for v in parsed.sweep_string_iterator()] if parsed.is_sweep_override() else [str(parsed.get_value_element_as_str())]


class LaunchingSweeper(Sweeper):  # type: ignore[misc]
    """What our sweepers share: the config, its launcher, and Hydra's grammar."""

    def __init__(self, **options: Any) -> None:
        pass  # they are read from the config, where the command line stands beside them

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def parser(self) -> OverridesParser:
        """Of overrides, with the groups of this config."""
        return OverridesParser.create(config_loader=self.hydra_context.config_loader)


class ArmSweeper(LaunchingSweeper):
    """Launches every arm with every seed as one batch."""

    def sweep(self, arguments: list[str]) -> Any:
        jobs = study_of(self.config.hydra.sweeper, arguments, self.parser()).jobs()
        self.validate_batch_is_legal(jobs)
        results = self.launcher.launch(jobs, initial_job_idx=0)
        for result in results:
            _ = result.return_value  # a failure outside a run is raised here
        return results


def install(sweepers: Mapping[str, type[Sweeper]]) -> None:
    """Make sweepers known to Hydra, by the names in their `_target_`. Safe to call again.

    Hydra builds only plugins whose name lies in its own package for them; ours go by such a name in its index, and are pickled for
    workers under their real one.
    """
    plugins = Plugins.instance()
    for target, sweeper in sweepers.items():
        plugins.register(sweeper)
        plugins.class_name_to_class[target] = sweeper
