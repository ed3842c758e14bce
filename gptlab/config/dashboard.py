"""Which sections and panels a W&B dashboard has: the config group `dashboard`, composed as a run's config is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptlab.config.errors import ConfigError
from gptlab.config.explain import explain
from gptlab.config.registry import suggest
from gptlab.config.sources import config_dir

KINDS = ("line", "bar", "parallel", "importance", "differences", "media", "verdict")
AXES = ("step", "tokens", "flops", "seconds", "wall")


@dataclass
class Panel:
    """One panel: `metrics` as a run logs them; `x`, of a line, one of the axes every run has."""

    kind: str = "line"
    metrics: list[str] = field(default_factory=list)
    x: str = "step"
    title: str = ""
    log_x: bool = False
    log_y: bool = False


@dataclass
class Section:
    """Panels under one heading."""

    title: str = ""
    panels: list[Panel] = field(default_factory=list)


def sections_of(name: str, overrides: Sequence[str] = ()) -> list[Section]:
    """The sections of conf/dashboard/NAME.yaml, changed by Hydra's overrides, such as `~dashboard/section@dashboard.sections.samples`.

    Raises ConfigError.
    """
    known = sorted(file.stem for file in (config_dir() / "dashboard").glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"dashboard={name} is not known{suggest(name, known)}; there are {', '.join(known)}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose(overrides=[f"+dashboard={name}", *overrides])
            found = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True)).get("dashboard", {}).get("sections") or {}
            return [_section(key, section) for key, section in found.items()]
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    finally:
        GlobalHydra.instance().clear()


def _section(key: str, given: dict[str, Any]) -> Section:
    where = f"dashboard.sections.{key}"
    try:
        typed = cast(Section, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Section), given)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())[:200]}") from error
    for panel in typed.panels:
        if panel.kind not in KINDS:
            raise ConfigError(f"{where}: kind={panel.kind} is no panel{suggest(panel.kind, KINDS)}; there are {', '.join(KINDS)}")
        if panel.x not in AXES:
            raise ConfigError(f"{where}: x={panel.x} is no axis{suggest(panel.x, AXES)}; there are {', '.join(AXES)}")
        if panel.kind not in ("differences", "verdict") and not panel.metrics:
            raise ConfigError(f"{where}: a panel of kind={panel.kind} needs metrics, such as [val/loss]")
    return typed
