"""The runs that a list of overrides asks for: one, or the points of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from gptlab.config.compose import prepare
from gptlab.config.errors import ConfigError
from gptlab.config.explain import check_overrides, explain
from gptlab.config.sources import config_dir


@dataclass(frozen=True)
class Point:
    """One run of a sweep: all its overrides, and those that are this point's own choice (none where nothing is swept)."""

    overrides: list[str]
    chosen: list[str]


def points(overrides: Sequence[str], *, what: str) -> list[Point]:
    """The runs of `gptlab train OVERRIDES`, in order: several where the overrides, or their experiment, make a sweep.

    Raises ConfigError for a sweep whose points nobody knows beforehand; `what` is who asks, for its sentence.
    """
    prepare()
    check_overrides(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            running = GlobalHydra.instance().hydra
            assert running is not None
            loader = running.config_loader
            hydra = running.compose_config("config", list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False).hydra
            parser = OverridesParser.create(config_loader=loader)
            swept = hydra.mode == RunMode.MULTIRUN or any(o.is_sweep_override() for o in parser.parse_overrides(list(overrides)))
            if not swept:
                return [Point(list(overrides), [])]
            if not str(hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
                raise ConfigError(f"{what}, and hydra/sweeper makes up its own; give the values of one run")
            parameters = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
            parsed = parser.parse_overrides([*parameters, *overrides])
            last = {o.get_key_element(): o.is_sweep_override() for o in parsed}  # what comes later wins
            found = [[str(o) for o in point] for batch in BasicSweeper.split_arguments(parsed, None) for point in batch]
            return [Point(point, [o for o in point if last.get(o.partition("=")[0])]) for point in found]
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    finally:
        GlobalHydra.instance().clear()
