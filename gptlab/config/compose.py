"""Composition: store the components as Hydra's options, compose a config, name it after what sets it apart."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from gptlab.config import halving, search, stages, sweeper
from gptlab.config.cluster import store_cluster
from gptlab.config.codec import RECIPES_WITH_SLOTS, options_in
from gptlab.config.errors import ConfigError
from gptlab.config.explain import check_overrides, environment_refused, explain, extra_key, references_as_text, short_key, wrong_key
from gptlab.config.registry import absent_parts, check_choices, components, load_components
from gptlab.config.schema import Config
from gptlab.config.sources import ExperimentSearchPath, ExperimentSource, config_dir

# Overrides that say where and how a run is done, not what it is: they give it no name.
_NAMELESS = ("study", "name", "arm", "tracker", "hardware.device", "hardware.threads", "hardware.micro_batch",
             "hardware/strategy", "hardware.strategy", "trainer.log_every", "trainer.on_nonfinite", "trainer.max_passed",
             "trainer.log_spikes", "trainer.time_limit", "trainer.resume", "trainer.profile", "trainer.mirror",
             "callbacks", "callback", "data.corpus.path", "data.corpus.sources", "hydra")  # fmt: skip


_SWEEPERS = {
    "arms": sweeper.ArmsConfig,
    "optuna": search.OptunaConfig,
    "halving": halving.HalvingConfig,
    "stages": stages.StagesConfig,
}

Inherit = Callable[[Config, Sequence[str]], Config]
_INHERIT: list[Inherit] = []


def inherits(function: Inherit) -> Inherit:
    """Let `function` complete what was composed with what lies on disk: the runner knows of runs, this package does not."""
    _INHERIT[:] = [function]
    return function


def prepare() -> None:
    """Load every component and make it known to Hydra. Safe to call again."""
    load_components()
    store = ConfigStore.instance()
    _offer(store, "", "schema", Config)
    for component in components():
        _offer(store, component.slot.path, component.name, component.options)
    for name, options in _SWEEPERS.items():
        _offer(store, "hydra/sweeper", name, options)
    for plugin in (ExperimentSource, ExperimentSearchPath):
        Plugins.instance().register(plugin)
    sweepers = {sweeper.TARGET: sweeper.ArmSweeper, search.TARGET: search.OptunaSweeper, halving.TARGET: halving.HalvingSweeper}
    sweeper.install({**sweepers, stages.TARGET: stages.StageSweeper})
    store_cluster(store)
    # An error of ours is one sentence; Hydra's own printing would come before it.
    os.environ["HYDRA_FULL_ERROR"] = "1"


def _offer(store: ConfigStore, group: str, name: str, options: type[Any]) -> None:
    """Make `group=name` an option, unless it is one already: a store takes as long as ten lookups."""
    known = store.repo
    for part in filter(None, group.split("/")):
        known = known.get(part, {})
    node = known.get(f"{name}.yaml")
    if node is None or OmegaConf.get_type(node.node) is not options:
        store.store(group=group or None, name=name, node=options, provider="gptlab")


def compose(overrides: Sequence[str] = (), *, name: str | None = None) -> Config:
    """Compose one run's config from Hydra overrides, as `gptlab train` does.

    `name` replaces the name made from the overrides. Raises ConfigError with the key, the value and what would work.
    """
    prepare()
    overrides = references_as_text(overrides)
    check_overrides(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose("config", list(overrides))
            return to_config(composed, overrides, name=name)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    finally:
        GlobalHydra.instance().clear()


def chosen(overrides: Sequence[str]) -> list[str]:
    """The option that fills each group of a composed config: `model/norm=rmsnorm`, …"""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        choices = hydra_compose("config", list(overrides), return_hydra_config=True).hydra.runtime.choices
    GlobalHydra.instance().clear()
    return [f"{group}={option}" for group, option in sorted(choices.items()) if option and not str(group).startswith("hydra")]


@contextlib.contextmanager
def without_environment() -> Iterator[None]:
    """In here a value that interpolates the environment is refused, however it is spelt and whichever file it stands in."""

    def refuse(*given: str, _node_: Any) -> NoReturn:
        raise ConfigError(environment_refused(str(_node_._get_full_key(None))))

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def to_config(composed: DictConfig, overrides: Sequence[str], *, name: str | None = None) -> Config:
    """The typed config of what Hydra composed, named after the overrides that set it apart."""
    try:
        with without_environment():
            config = cast(Config, OmegaConf.to_object(_completed(composed)))
    except OmegaConfBaseException as error:
        raise explain(error) from error
    except AttributeError as error:  # `+key=value` put a key into the tree that its class has not
        extra = extra_key(composed)
        if extra is None:
            raise
        raise ConfigError(wrong_key(*extra)) from error
    for inherit in _INHERIT:
        config = inherit(config, overrides)
    if config.model.dial and any(o.lstrip("+").startswith("optimizer.learning_rate=") for o in overrides):
        config.model.dial = "sizes"  # a rate that is given wins, though it be the default
    for path, options in options_in(config):
        check_choices(options, path)
    chosen = name if name is not None else config.name
    return replace(config, name=chosen or (_plain(f"{config.arm},seed={config.seed}") if config.arm else name_of(overrides)))


def _completed(composed: DictConfig) -> DictConfig:
    """With the component that does nothing in every slot that a recipe (one from before the slot) leaves open."""
    for recipe in RECIPES_WITH_SLOTS:
        for name, nothing in absent_parts(recipe).items():
            if OmegaConf.is_missing(composed[recipe], name):
                composed[recipe][name] = nothing
    return composed


def settings(overrides: Iterable[str]) -> dict[str, str]:
    """What a list of overrides sets, less what only says where and how: `{"model/norm": "rmsnorm", "seed": "1"}`."""
    found: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        group, _, place = key.partition("@")
        key = group if not place.startswith(_NAMELESS) else place
        if not any(key == n or key.startswith((n + ".", n + "/")) for n in _NAMELESS):
            found[key] = value.strip("'") if key in ("trainer.init_from", "trainer.start") else value
    return found


def name_of(overrides: Iterable[str]) -> str:
    """A folder name for a run: `norm=rmsnorm,position=rotary,seed=1`."""
    parts = [f"{short_key(key)}={value}" for key, value in settings(overrides).items() if key != "experiment"]
    return _plain(",".join(sorted(parts, key=lambda p: p.startswith("seed="))))


def _plain(name: str) -> str:
    """What may be a folder's name."""
    return re.sub(r"[^\w.,=+-]+", "_", name)[:120]
