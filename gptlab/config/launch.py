"""Hydra's launch of what was composed already: composing takes longer than all else of a start, and Hydra's command line does it twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

JOB_NAME = "train"
MOST_REMEMBERED = 1000  # jobs, of a fifth of a megabyte each


class _Loader(ConfigLoaderImpl):  # type: ignore[misc]
    """Composes the jobs of a sweep, each of them once: a sweeper composes a job to see whether it is legal, and a launcher to run it."""

    def __init__(self, loader: ConfigLoader) -> None:
        super().__init__(loader.get_search_path())
        self._looked_at: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        job = tuple(sweep_overrides)
        if job in self._looked_at:
            return self._looked_at.pop(job)
        composed: DictConfig = super().load_sweep_config(master_config, sweep_overrides)
        if len(self._looked_at) < MOST_REMEMBERED:
            self._looked_at[job] = composed
        return composed

    def __getstate__(self) -> dict[str, Any]:  # for the processes of a launcher
        return self.__dict__ | {"_looked_at": {}}


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
    hydra = _Composed(_Loader(loader), composed)
    GlobalHydra.instance().initialize(hydra)
    try:
        begin = hydra.multirun if composed.hydra.mode == RunMode.MULTIRUN else hydra.run
        given = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)  # what an override refers to is not known before a run
        begin(composed.hydra.job.config_name, task, given)
    finally:
        HydraConfig.instance().cfg = None  # a launcher leaves its last job's there
        GlobalHydra.instance().clear()
