"""Tab completion of `gptlab train …`: the subcommand is stripped and Hydra's own completion is asked."""

from __future__ import annotations

from hydra import initialize_config_dir
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra.core.global_hydra import GlobalHydra

from gptlab.config import compose
from gptlab.config.sources import config_dir


def complete(incomplete: str) -> list[str]:
    """What may follow: groups and their options, keys and their values."""
    compose.prepare()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert running is not None
        found: list[str] = BashCompletion(running.config_loader)._query("config", incomplete)
    GlobalHydra.instance().clear()
    return [f for f in found if f.startswith(incomplete)]
