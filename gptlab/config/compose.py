"""Hydra's side of the config: find the recipes, store the components as options, compose, and say what went wrong in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from gptlab.config.codec import options_in
from gptlab.config.errors import ConfigError
from gptlab.config.registry import check_choices, components, load_components, suggest
from gptlab.config.schema import Config
from gptlab.config.slots import SLOTS, Options

_PACKAGE = Path(__file__).resolve().parent.parent
# Overrides that say where and how a run is done, not what it is: they give it no name.
_NAMELESS = ("experiment", "study", "name", "tracker", "hardware.device", "hardware.threads", "hardware.micro_batch",
             "trainer.log_every", "callbacks", "callback", "data.corpus.path", "hydra")  # fmt: skip


def config_dir() -> Path:
    """The folder of recipes: beside the modules in a wheel, beside the package in a checkout."""
    return _shipped("conf")


def experiment_dirs() -> list[Path]:
    """Folders searched for `experiment=NAME`: the shipped one, then ./experiments."""
    found = [_shipped("experiments"), Path.cwd() / "experiments"]
    return list(dict.fromkeys(p.resolve() for p in found if p.is_dir()))


def _shipped(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


class ExperimentSource(FileConfigSource):
    """Makes a folder of YAML files the group `experiment`, each file composed at the root of the config."""

    @staticmethod
    def scheme() -> str:
        return "experiments"

    def _inside(self, config_path: str) -> str | None:
        head, _, rest = config_path.partition("/")
        return rest if head == "experiment" else None

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(self._inside(config_path) or config_path)
        result.header["package"] = "_global_"
        return result

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "experiment")

    def is_config(self, config_path: str) -> bool:
        name = self._inside(config_path)
        return bool(name) and super().is_config(cast(str, name))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return ["experiment"] if results_filter in (None, ObjectType.GROUP) else []
        if config_path != "experiment":
            return []
        names = [] if results_filter == ObjectType.GROUP else [p.stem for p in Path(self.path).glob("*.yaml")]
        return sorted(names)


class ExperimentSearchPath(SearchPathPlugin):
    """Adds the experiment folders to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in experiment_dirs():
            search_path.append("gptlab", f"experiments://{folder}")


def prepare() -> None:
    """Load every component and make it known to Hydra. Safe to call again."""
    load_components()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for component in components():
        store.store(group=component.slot.path, name=component.name, node=component.options)
    for plugin in (ExperimentSource, ExperimentSearchPath):
        Plugins.instance().register(plugin)
    # An error of ours is one sentence; Hydra's own printing would come before it.
    os.environ["HYDRA_FULL_ERROR"] = "1"


def compose(overrides: Sequence[str] = (), *, name: str | None = None) -> Config:
    """Compose one run's config from Hydra overrides, as `gptlab train` does.

    `name` replaces the name made from the overrides. Raises ConfigError with the key, the value and what would work.
    """
    prepare()
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


def to_config(composed: DictConfig, overrides: Sequence[str], *, name: str | None = None) -> Config:
    """The typed config of what Hydra composed, named after the overrides that set it apart."""
    try:
        config = cast(Config, OmegaConf.to_object(composed))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or error} has no value: give it on the command line") from error
    except OmegaConfBaseException as error:
        raise explain(error) from error
    for path, options in options_in(config):
        check_choices(options, path)
    chosen = name if name is not None else config.name
    return replace(config, name=chosen or name_of(overrides))


def settings(overrides: Iterable[str]) -> dict[str, str]:
    """What a list of overrides sets, less what only says where and how: `{"model/norm": "rmsnorm", "seed": "1"}`."""
    found: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        key = key.split("@")[0] if "@" in key else key
        if not any(key == n or key.startswith((n + ".", n + "/")) for n in _NAMELESS):
            found[key] = value
    return found


def name_of(overrides: Iterable[str]) -> str:
    """A folder name for a run: `norm=rmsnorm,position=rotary,seed=1`."""
    parts = [f"{short_key(key)}={value}" for key, value in settings(overrides).items()]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(sorted(parts, key=lambda p: p.startswith("seed="))))[:120]


def short_key(key: str) -> str:
    """The last word of a key: `norm` of `model/norm`, `learning_rate` of `optimizer.learning_rate`."""
    return re.split(r"[./]", key)[-1]


def check_overrides(overrides: Iterable[str]) -> None:
    """Refuse an override that would copy the environment into a config, a log and a checkpoint."""
    for override in overrides:
        if re.search(r"\$\{\s*oc\.env", override):
            raise ConfigError(f"{override.split('=')[0]}: ${{oc.env:…}} would write the environment into the run; give the value itself")


def known_keys(value: Any = None, prefix: str = "") -> list[str]:
    """Every dotted key a config can hold, whatever its components, and every group."""
    if value is None:
        keys = known_keys(Config()) + list(SLOTS) + ["model", "data", "hardware", "experiment"]
        for slot in components():
            place = slot.slot.path.replace("/", ".")
            keys += [f"{place}.{f.name}" for f in fields(slot.options)]
        return list(dict.fromkeys(keys))
    found: list[str] = []
    for f in fields(value):
        key = f"{prefix}{f.name}"
        found.append(key)
        inner = getattr(value, f.name, None)
        if is_dataclass(inner) and not isinstance(inner, Options):
            found += known_keys(inner, f"{key}.")
    return found


def explain(error: BaseException) -> ConfigError:
    """One sentence for an error of Hydra or OmegaConf: the key, the value, and what would work."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    if isinstance(error, ConfigError):
        return error
    text = " ".join(str(e) for e in chain)
    for inner in chain:
        if isinstance(inner, ConfigError):
            return inner
    if match := re.search(r"Could not override '([^']+)'", text):
        return ConfigError(_wrong_key(match[1], chain))
    if match := re.search(r"Could not find '([^']+?)'\s*(?:Available options in '([^']+)':\s*((?:\s*\S+)+?))?\s*(?:Config search path|$|In )", text):
        group, _, name = match[1].rpartition("/")
        options = sorted(set((match[3] or "").split()))
        if options:
            return ConfigError(f"{group}={name}: no such option{suggest(name, options)}; there are {', '.join(options)}")
        return ConfigError(f"{match[1]}: no such config{suggest(match[1], known_keys())}")
    if match := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        return ConfigError(f"{match[1]} is not a group of this config{suggest(match[1], known_keys())}")
    for inner in reversed(chain):
        if isinstance(inner, ConfigKeyError) and inner.full_key:
            return ConfigError(_wrong_key(str(inner.full_key), chain))
    for inner in reversed(chain):
        if isinstance(inner, OmegaConfBaseException) and inner.full_key:
            message = re.sub(r"\s+", " ", str(inner.msg or inner)).split(" full_key:")[0].strip()
            return ConfigError(f"{inner.full_key}: {message}")
    message = re.sub(r"\s+", " ", str(error)).strip()
    message = re.sub(r" ?See https?://\S+.*$", "", message)
    return ConfigError(message)


def _wrong_key(key: str, chain: Sequence[BaseException]) -> str:
    keys = known_keys()
    parent = key.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == parent]
    hint = suggest(key, siblings) or suggest(key, keys)
    if not hint and siblings:
        hint = f"; there {'is' if len(siblings) == 1 else 'are'} {', '.join(sorted(siblings))}"
    owner = next((m[1] for e in chain if (m := re.search(r"Key '[^']*' not in '([^']+)'", str(e)))), "")
    if key in keys and owner.endswith("Options"):
        return f"{key}: the component chosen here ({owner.removesuffix('Options')}) has no such option"
    return f"{key} is not a key of the config{hint}"
