"""Hydra's launch of what was composed already: composing takes longer than all else of a start, and Hydra's command line does it twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig

JOB_NAME = "train"


class _Composed(Hydra):  # type: ignore[misc]
    """Hydra, for one command line whose config is known."""

    def __init__(self, loader: ConfigLoader, composed: DictConfig) -> None:
        super().__init__(JOB_NAME, loader)
        self._known = composed

    def compose_config(self, *args: Any, with_log_configuration: bool = False, **options: Any) -> DictConfig:
        if with_log_configuration:
            configure_log(self._known.hydra.hydra_logging, self._known.hydra.verbose)
        return self._known


def launch(loader: ConfigLoader, composed: DictConfig, task: Callable[[DictConfig], Any]) -> None:
    """Run `task` as `hydra.main` would: once, or, where hydra.mode says so, by the sweeper. `loader` composes the jobs of a sweep."""
    hydra = _Composed(loader, composed)
    GlobalHydra.instance().initialize(hydra)
    try:
        begin = hydra.multirun if composed.hydra.mode == RunMode.MULTIRUN else hydra.run
        begin(composed.hydra.job.config_name, task, list(composed.hydra.overrides.task))
    finally:
        GlobalHydra.instance().clear()
