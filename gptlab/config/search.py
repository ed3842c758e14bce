"""The Hydra sweeper `optuna`: settings that are searched, each trial's chosen by what the trials before it came to.

gptlab train hydra/sweeper=optuna hydra.sweeper.trials=20 study=rates 'optimizer.learning_rate=tag(log,interval(1e-4,1e-1))' \\
    'optimizer.weight_decay=interval(0,0.3)' model/norm=layernorm,rmsnorm

A small plugin of our own, since the published one pins optuna below 3. Trials live in optuna's own storage (SQLite in the study's folder,
unless told), so that a search that was killed goes on: a trial that was under way is tried again, and its run goes on from its checkpoint.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from gptlab.config.errors import ConfigError, IOFailure
from gptlab.config.folders import study_folder
from gptlab.config.registry import suggest
from gptlab.config.slots import word
from gptlab.config.sweeper import LaunchingSweeper, quoted

if TYPE_CHECKING:
    import optuna

TARGET = "hydra_plugins.gptlab.OptunaSweeper"
SAMPLERS, PRUNERS = ("tpe", "cmaes", "random", "grid"), ("none", "median", "halving", "hyperband")
NEEDED = "{what} needs optuna: pip install 'gptlab[sweep]'"
STORAGE, ADDRESS = "optuna.db", "optuna.txt"  # in the study's folder; the second holds the address of a storage elsewhere
LOST = "lost_"  # and a trial's number: an attribute of the study
PRUNED = "pruned_at"  # a trial's attribute: the step at which it was given up


@dataclass
class OptunaConfig:
    """Options of hydra/sweeper=optuna. `trials` counts those of earlier launches too; `side_by_side`: how many run at once, for a launcher
    with several processes; `pruner` gives trials up by their validation curve; `first`: the config as it stands is the first trial."""

    _target_: str = TARGET
    trials: int = 20
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0
    side_by_side: int = 1
    first: bool = True
    storage: str = ""
    params: dict[str, str] = field(default_factory=dict)  # of an experiment: key to values, as on the command line


@dataclass(frozen=True)
class Space:
    """What is searched, and what all trials share. `axes`: key to an optuna distribution."""

    axes: dict[str, Any]
    common: list[str]


def space_of(options: OptunaConfig, arguments: Sequence[str], parser: OverridesParser) -> Space:
    """The axes among the overrides: `a=1,2`, `a=range(1,9)`, `a=interval(0,1)`, `a=tag(log,interval(1e-4,1e-1))`. Raises ConfigError."""
    axes: dict[str, Any] = {}
    common: list[str] = []
    given = [f"{key}={values}" for key, values in options.params.items()]
    for override in parser.parse_overrides([*given, *arguments]):
        key = str(override.get_key_element())
        if override.is_sweep_override() and key == "seed":
            raise ConfigError(
                "hydra/sweeper=optuna: a seed is not searched; give one, and ask of what was found whether it holds on others"
            )
        if override.is_sweep_override():
            axes[key] = _distribution(key, override)
        else:
            axes.pop(key, None)  # what comes later wins
            common.append(str(override.input_line))
    wide = {key for key, axis in axes.items() if not axis.single()}
    if not wide:
        raise ConfigError(
            "hydra/sweeper=optuna: nothing to search"
            + (f", since {next(iter(axes))} has one value alone" if axes else "")
            + "; give a range, as in 'optimizer.learning_rate=tag(log,interval(1e-4,1e-1))' or model/norm=layernorm,rmsnorm"
        )
    return Space(axes, common)


def _distribution(key: str, override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            log = "log" in value.tags
            whole = isinstance(value.start, int) and isinstance(value.end, int)  # of int(interval(…))
            kind: Any = IntDistribution if whole else FloatDistribution
            return kind(value.start, value.end, log=log)
        if isinstance(value, RangeSweep):
            start, stop, step = value.start or 0, value.stop or 0, value.step
            count = math.ceil((stop - start) / step)  # Hydra's ranges end before their stop
            if count < 1:
                raise ValueError("the range is empty")
            last = start + (count - 1) * step
            if isinstance(start, int) and isinstance(step, int):
                return IntDistribution(start, int(last), step=step, log=False)
            return FloatDistribution(start, last, step=step)
        if isinstance(value, ChoiceSweep):
            return CategoricalDistribution([str(v) for v in override.sweep_string_iterator()])
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: {' '.join(str(error).split())}") from error
    raise ConfigError(f"{key}: optuna cannot search {override.input_line!r}; give values, a range(…) or an interval(…)")


def storage_of(options: OptunaConfig, study: str) -> str:
    """The address of the storage: SQLite in the study's folder, unless told."""
    folder = study_folder(study).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if "://" in options.storage and urlsplit(options.storage).password:  # it would be written down with every run
        raise ConfigError(
            "hydra.sweeper.storage: leave the password out of the address; the database's own file or environment can hold it"
        )
    return options.storage or f"sqlite:///{folder / STORAGE}"


def _noted(study: str) -> str:
    folder = study_folder(study).absolute()
    noted = folder / ADDRESS
    return noted.read_text(encoding="utf-8") if noted.exists() else f"sqlite:///{folder / STORAGE}"


def open_study(options: OptunaConfig, name: str, space: Space) -> optuna.Study:
    """The study of that name in the storage, begun or continued. Raises ConfigError, IOFailure."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    address = storage_of(options, name)
    giving_up = pruner(options.pruner)
    _sampler(options, space, 0)  # what is wrong with it is told before anything is made
    try:
        known_studies = {s.study_name: s for s in optuna.get_all_study_summaries(storage=address)}
        begun = known_studies[name].n_trials if name in known_studies else 0
        study = optuna.create_study(
            storage=address,
            study_name=name,
            load_if_exists=True,
            direction="minimize",
            sampler=_sampler(options, space, begun),
            pruner=giving_up,
        )
        trials = study.get_trials(deepcopy=False)
    except Exception as error:  # its storages raise SQLAlchemy's errors, and their own
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if "locked" in reason:
            raise IOFailure(f"hydra.sweeper.storage={address} is locked by another process; wait for it, or give another") from error
        raise IOFailure(f"hydra.sweeper.storage={address} cannot be used ({reason}); give one of optuna's, or a new file") from error
    if options.storage:
        (study_folder(name) / ADDRESS).write_text(address, encoding="utf-8")
    if study.direction != optuna.study.StudyDirection.MINIMIZE:
        raise ConfigError(f"hydra.sweeper.storage={address}: its study {name!r} maximises; give another study=")
    known = set().union(*(t.distributions for t in trials)) if trials else set(space.axes)
    if known and known != set(space.axes):
        raise ConfigError(
            f"study={name}: its trials searched {', '.join(sorted(known))}, and this search has {', '.join(sorted(space.axes))}; "
            "give the same, or another study="
        )
    return study


def _sampler(options: OptunaConfig, space: Space, begun: int) -> Any:
    """`begun`: trials of earlier launches, whose draws are not to be made again."""
    from optuna import samplers

    seed = options.seed + begun
    if options.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise ConfigError("hydra.sweeper.sampler=cmaes needs cmaes: pip install 'gptlab[sweep]'")
    if options.sampler == "grid":
        points: dict[str, list[Any]] = {}
        for key, axis in space.axes.items():
            if hasattr(axis, "choices"):
                points[key] = list(axis.choices)
            elif axis.step:
                points[key] = [axis.low + i * axis.step for i in range(round((axis.high - axis.low) / axis.step) + 1)]
            else:
                raise ConfigError(f"hydra.sweeper.sampler=grid: {key} is an interval, which has no points; give its values or a range(…)")
        return samplers.GridSampler(points, seed=options.seed)
    made: dict[str, Any] = {
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True, constant_liar=options.side_by_side > 1),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }
    if options.sampler not in made:
        raise ConfigError(f"hydra.sweeper.sampler={options.sampler}{suggest(options.sampler, SAMPLERS)}; there are {', '.join(SAMPLERS)}")
    return made[options.sampler]()


def pruner(name: str) -> Any:
    """Optuna's pruner of that name. Raises ConfigError."""
    from optuna import pruners

    made: dict[str, Any] = {
        "none": pruners.NopPruner,
        "median": lambda: pruners.MedianPruner(n_startup_trials=4),
        "halving": pruners.SuccessiveHalvingPruner,
        "hyperband": pruners.HyperbandPruner,
    }
    if name not in made:
        raise ConfigError(f"hydra.sweeper.pruner={name}{suggest(name, PRUNERS)}; there are {', '.join(PRUNERS)}")
    return made[name]()


def counted(study: optuna.Study) -> list[Any]:
    """The trials that ended, whatever with; not those that were lost with their process, since they were tried again."""
    from optuna.trial import TrialState

    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return [t for t in study.get_trials(deepcopy=False, states=ended) if f"{LOST}{t.number}" not in study.user_attrs]


def found_trials(name: str) -> list[Any]:
    """The trials of a study in its storage that ended, as optuna keeps them."""
    import optuna

    return counted(optuna.load_study(study_name=name, storage=_noted(name)))


def importances(name: str) -> dict[str, float]:
    """The share of each setting in the spread of the losses; empty where there are too few trials, or one setting alone."""
    import optuna

    study = optuna.load_study(study_name=name, storage=_noted(name))
    if len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))) < 10:
        return {}
    try:
        found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError):  # all losses are equal, or a setting never varied
        return {}
    return found if len(found) > 1 else {}


def overrides_of(parameters: dict[str, Any]) -> list[str]:
    """A trial's values as overrides."""
    return [f"{key}={format(value, '.6g') if isinstance(value, float) else value}" for key, value in parameters.items()]


def label_of(parameters: dict[str, Any]) -> str:
    """A trial's values as the name of an arm, quoted for Hydra."""
    return quoted(" ".join(word(key, format(v, ".4g") if isinstance(v, float) else str(v)) for key, v in parameters.items()))


class OptunaSweeper(LaunchingSweeper):
    """Asks optuna for settings, launches them, tells it what their runs came to."""

    def sweep(self, arguments: list[str]) -> Any:
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(NEEDED.format(what="hydra/sweeper=optuna"))
        options = OptunaConfig(**cast(dict[str, Any], OmegaConf.to_container(self.config.hydra.sweeper, resolve=True)))
        if options.trials < 1 or options.side_by_side < 1:
            raise ConfigError(f"hydra.sweeper: trials={options.trials} and side_by_side={options.side_by_side} must be at least 1")
        space = space_of(options, arguments, self.parser())
        name = str(self.config.study)
        study = open_study(options, name, space)
        _begin(study, space, self.config if options.first else None)
        returned: list[Any] = []
        while (done := len(counted(study))) < options.trials:
            trials = [study.ask(space.axes) for _ in range(min(options.trials - done, options.side_by_side))]
            jobs = [[*space.common, *self._job(options, name, trial)] for trial in trials]
            self.validate_batch_is_legal(jobs)
            for trial, result in zip(trials, self.launcher.launch(jobs, initial_job_idx=done), strict=True):
                returned.append(result)
                _tell(study, trial, result.return_value)  # a failure outside a run is raised here
        return returned

    @staticmethod
    def _job(options: OptunaConfig, name: str, trial: optuna.Trial) -> list[str]:
        return [*overrides_of(trial.params), f"arm={label_of(trial.params)}", *_pruning(options, name, trial.number)]


def _begin(study: optuna.Study, space: Space, config: DictConfig | None) -> None:
    """Give up what an earlier launch left under way, to be tried again; of a new study the config as it stands comes first."""
    import optuna

    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.set_user_attr(f"{LOST}{trial.number}", True)
            study.enqueue_trial(trial.params)
    if trials or config is None:
        return
    values = {}
    for key, axis in space.axes.items():
        value = config.hydra.runtime.choices.get(key) if "/" in key else OmegaConf.select(config, key, default=None)
        value = str(value) if hasattr(axis, "choices") else value
        if value is None or not (value in axis.choices if hasattr(axis, "choices") else axis.low <= float(value) <= axis.high):
            return  # it lies outside what is searched
        values[key] = value
    study.enqueue_trial(values)


def _pruning(options: OptunaConfig, study: str, number: int) -> list[str]:
    """The overrides that let a trial's run be given up."""
    if options.pruner == "none":
        return []
    where = {"storage": storage_of(options, study), "study": study, "trial": number, "pruner": options.pruner}
    return ["+callback@callbacks.pruning=pruning", *(f"callbacks.pruning.{key}={quoted(str(value))}" for key, value in where.items())]


def _tell(study: optuna.Study, trial: optuna.Trial, loss: Any) -> None:
    from optuna.trial import TrialState

    attributes = study._storage.get_trial(trial._trial_id).user_attrs
    if PRUNED in attributes:
        study.tell(trial, state=TrialState.PRUNED)
    elif loss is None or not math.isfinite(loss):  # it failed, and has been told; a NaN would be refused
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, float(loss))
