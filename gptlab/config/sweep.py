"""The runs that a list of overrides asks for: one, the points of a sweep, or the arms and seeds of a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptlab.config import cluster, halving, search, stages
from gptlab.config.compose import prepare, without_environment
from gptlab.config.errors import ConfigError
from gptlab.config.explain import check_overrides, explain
from gptlab.config.launch import JOB_NAME, launch
from gptlab.config.sources import config_dir
from gptlab.config.sweeper import Study, study_of


@dataclass(frozen=True)
class Point:
    """One run of a sweep: all its overrides, and those that are this point's own choice (none where nothing is swept)."""

    overrides: list[str]
    chosen: list[str]


@dataclass(frozen=True)
class Sweep:
    """What overrides ask for. `points`: None where hydra/sweeper makes up its own; `study`: of a sweep over arms; `search`: the sweeper
    that chooses as it goes; `stages`: the overrides of runs that begin with one another's weights; `size`: how many runs there will be (0:
    not known); `elsewhere`: on other machines, which share the runs' folder and not this one's temporary files; `launch`: does it, with
    the function of one run; None where Hydra's own command line has something to say about it."""

    swept: bool
    points: list[Point] | None
    study: Study | None = None
    name: str = ""  # of the study's folder
    search: str = ""
    stages: dict[str, list[str]] = field(default_factory=dict)
    size: int = 0
    elsewhere: bool = False
    launch: Callable[[Callable[[DictConfig], Any]], None] | None = field(default=None, repr=False, compare=False)


def points(overrides: Sequence[str], *, what: str) -> list[Point]:
    """The runs of `gptlab train OVERRIDES`, in order: several where the overrides, or their experiment, make a sweep.

    Raises ConfigError for a sweep whose points nobody knows beforehand; `what` is who asks, for its sentence.
    """
    asked = sweep(overrides)
    if asked.stages:
        one = " ".join([*next(iter(asked.stages.values())), "hydra.mode=RUN"])
        raise ConfigError(f"{what}, and each stage after the first begins with the run before it; give the values of one: {one}")
    if asked.points is None:
        raise ConfigError(f"{what}, and hydra/sweeper makes up its own; give the values of one run")
    return asked.points


def sweep(overrides: Sequence[str], *, multirun: bool = False) -> Sweep:
    """What `gptlab train OVERRIDES` would launch; `multirun`: -m was given. Raises ConfigError."""
    prepare()
    check_overrides(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3", job_name=JOB_NAME):
            running = GlobalHydra.instance().hydra
            assert running is not None
            loader = running.config_loader
            given = [*overrides, "hydra.mode=MULTIRUN"] if multirun else list(overrides)
            composed = running.compose_config("config", given, RunMode.MULTIRUN, validate_sweep_overrides=False)
            found = _asked(loader, composed, overrides, multirun)
            elsewhere = str(composed.hydra.launcher.get("_target_", "")).endswith(cluster.TARGET)
            legal = _legal(loader, composed, given)
            return replace(found, elsewhere=elsewhere, launch=partial(launch, loader, composed) if legal else None)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    finally:
        GlobalHydra.instance().clear()


def _legal(loader: ConfigLoader, composed: DictConfig, overrides: Sequence[str]) -> bool:
    """Whether Hydra would launch this without a word: no group is left open, and nothing is swept that cannot be."""
    swept = [o for o in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)) if o.is_sweep_override()]
    if composed.hydra.mode == RunMode.MULTIRUN:
        return not any(o.is_hydra_override() for o in swept)
    choices = composed.hydra.runtime.choices
    return not swept and not any(OmegaConf.is_missing(choices, group) for group in choices)


def _asked(loader: ConfigLoader, composed: DictConfig, overrides: Sequence[str], multirun: bool) -> Sweep:
    hydra = composed.hydra
    with without_environment():  # what a sweep's values hold becomes overrides, as plain text
        OmegaConf.to_container(hydra.sweeper, resolve=True)
    parser = OverridesParser.create(config_loader=loader)
    lists = any(o.is_sweep_override() for o in parser.parse_overrides(list(overrides)))
    if not (multirun or hydra.mode == RunMode.MULTIRUN or lists):
        return Sweep(False, [Point(list(overrides), [])])
    kind = str(hydra.sweeper.get("_target_", ""))
    if kind.endswith("ArmSweeper"):
        study = study_of(hydra.sweeper, overrides, parser)
        jobs = [Point(study.job(a, s), [*a.overrides, f"seed={s}"]) for s in study.seeds for a in study.arms]
        return Sweep(True, jobs, study, str(composed.study), size=len(jobs))
    if kind == search.TARGET:
        return Sweep(True, None, name=str(composed.study), search="optuna", size=int(hydra.sweeper.trials))
    if kind == halving.TARGET:
        options = halving.HalvingConfig(**OmegaConf.to_container(hydra.sweeper, resolve=True))  # type: ignore[arg-type]
        ladder = halving.ladder_of(options, overrides, str(composed.trainer.budget), parser)
        size = sum(ladder.sizes(options.keep)) * max(1, len(ladder.seeds))
        return Sweep(True, None, name=str(composed.study), search="halving", size=size)
    if kind == stages.TARGET:
        jobs_of = stages.jobs_of(hydra.sweeper, [o for o in overrides if not o.startswith("-")], parser)
        return Sweep(True, None, name=str(composed.study), stages=jobs_of, size=len(jobs_of))
    if not kind.endswith("BasicSweeper"):
        return Sweep(True, None)
    parameters = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    parsed = parser.parse_overrides([*parameters, *overrides])
    last = {o.get_key_element(): o.is_sweep_override() for o in parsed}  # what comes later wins
    found = [[str(o) for o in point] for batch in BasicSweeper.split_arguments(parsed, None) for point in batch]
    points = [Point(point, [o for o in point if last.get(o.partition("=")[0])]) for point in found]
    return Sweep(True, points, name=str(composed.study), size=len(points))
