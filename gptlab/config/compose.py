"""Hydra's side of the config: find the recipes, store the components as options, compose, and say what went wrong in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
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


class ExperimentSource(FileConfigSource):  # type: ignore[misc]
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


class ExperimentSearchPath(SearchPathPlugin):  # type: ignore[misc]
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


def sweep_size(arguments: Sequence[str]) -> int | None:
    """How many runs `gptlab train ARGUMENTS` would launch with Hydra's own sweeper; None for a single run or another sweeper."""
    overrides = [a for a in arguments if not a.startswith("-")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert running is not None
        try:
            composed = running.compose_config("config", overrides, RunMode.MULTIRUN, validate_sweep_overrides=False)
        except (HydraException, OmegaConfBaseException):
            return None  # Hydra itself will say what is wrong
        loader = running.config_loader
    GlobalHydra.instance().clear()
    multirun = composed.hydra.mode == RunMode.MULTIRUN or {"-m", "--multirun"} & set(arguments)
    if not multirun or not str(composed.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return None
    parameters = [f"{k}={v}" for k, v in (composed.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*parameters, *overrides])
    return sum(len(batch) for batch in BasicSweeper.split_arguments(parsed, None))


def to_config(composed: DictConfig, overrides: Sequence[str], *, name: str | None = None) -> Config:
    """The typed config of what Hydra composed, named after the overrides that set it apart."""
    try:
        config = cast(Config, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        raise explain(error) from error
    except AttributeError as error:  # `+key=value` put a key into the tree that its class has not
        extra = _extra_key(composed)
        if extra is None:
            raise
        raise ConfigError(_wrong_key(*extra)) from error
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
    """Refuse an override that would copy the environment into a config, a log and a checkpoint, and a group that is set to no name."""
    for override in overrides:
        key, _, value = override.partition("=")
        if re.search(r"\$\{\s*oc\.env", override):
            raise ConfigError(f"{key}: ${{oc.env:…}} would write the environment into the run; give the value itself")
        group = key.lstrip("+~").partition("@")[0]
        if group in _groups() and re.fullmatch(r"null|true|false|[-+.\d_]+(e[-+]?\d+)?", value, re.IGNORECASE):
            options = _names(group)
            raise ConfigError(f"{group}={value}: {group} takes the name of an option{f': {_listed(options)}' if options else ''}")


def _groups() -> list[str]:
    return [*SLOTS, "model", "data", "hardware"]


def _names(slot: str) -> list[str]:
    return [c.name for c in components(slot)]


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def known_keys(value: Any = None, prefix: str = "") -> list[str]:
    """Every dotted key a config can hold, whatever its components, and every group."""
    if value is None:
        keys = [k for k in known_keys(Config()) if k.replace(".", "/") not in SLOTS or k in SLOTS] + _groups() + ["experiment"]
        for slot in components():
            place = slot.slot.path.replace("/", ".")
            keys += [f"{place}.{f.name}" for f in fields(slot.options) if place != "callback"]
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
    for inner in chain:
        if isinstance(inner, ConfigError):
            return inner
    text = " ".join(str(e) for e in chain)
    owner = next((m[1] for e in chain if (m := re.search(r"Key '[^']*' not in '([^']+)'", str(e)))), "")
    for inner in chain:
        if isinstance(inner, OverrideParseException):
            said = re.sub(r"\s+", " ", str(inner.message).removeprefix(f"Error parsing override '{inner.override}'"))
            said = said.split(" See http")[0].strip()
            return ConfigError(
                f"{inner.override!r} is not an override ({said}); write key=value, and put quotes around a value with special characters"
            )
    if match := re.search(r"Could not override '([^']+)'", text):
        return ConfigError(_wrong_key(match[1], owner))
    if match := re.search(r"Could not find '([^']+?)'", text):
        group, _, name = match[1].rpartition("/")
        found = re.search(r"Available options in '[^']+':((?:\s*\S+)*?)\s*(?:Config search path|$|In )", text)
        options = sorted(set((found[1] if found else "").split()))
        if options:
            return ConfigError(f"{group}={name}: no such option{suggest(name, options)}; there {_are(options)}")
        return ConfigError(f"{match[1]}: no such config{_nearest(match[1], known_keys())}")
    for inner in reversed(chain):
        if isinstance(inner, ConfigKeyError) and inner.full_key:
            return ConfigError(_wrong_key(str(inner.full_key), owner))
    for inner in reversed(chain):
        if isinstance(inner, OmegaConfBaseException) and (inner.full_key or isinstance(inner, MissingMandatoryValue)):
            return ConfigError(_wrong_value(inner))
    message = re.sub(r"\s+", " ", str(error)).strip()
    return ConfigError(re.sub(r" ?See https?://\S+.*$", "", message))


_WANTED = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "string": "text"}


def _wrong_value(error: OmegaConfBaseException) -> str:
    """The sentence for a value that its key cannot hold."""
    message = re.sub(r"\s+", " ", str(error.msg or error)).split(" full_key:")[0].strip()
    key = str(error.full_key or (m[1] if (m := re.search(r"[Mm]issing mandatory value: (\S+)", message)) else ""))
    slot = key.replace(".", "/")
    if isinstance(error, MissingMandatoryValue):
        if slot in SLOTS:
            return f"{key} has no component: choose one with {slot}={_listed(_names(slot))}"
        return f"{key} has no value: give it on the command line with {key}=…"
    if slot in SLOTS and (match := re.search(r"is not a subclass of \w+\. value: (.*)", message)):
        return f"{key}={match[1]}: components are chosen with a slash, {slot}={_listed(_names(slot))}"
    if match := re.search(r"Value '(.*?)'(?: of type '\w+')? could not be converted to (\w+)", message):
        return f"{key}={match[1]} must be {_WANTED.get(match[2], match[2])}"
    if match := re.search(r"Value '(.*)' is not a valid bool", message):
        return f"{key}={match[1]} must be true or false"
    if match := re.search(r"Cannot convert '(\w+)' to string: '(.*)'", message):
        return f"{key}={match[2]} must be text, not a {match[1]}"
    if "is not Optional" in message:
        return f"{key}=null: it needs a value"
    if match := re.search(r"Interpolation key '([^']+)' not found", message):
        return f"{key}: ${{{match[1]}}} names a key that is not there{_nearest(match[1], known_keys())}"
    return f"{key}: {message}"


def _extra_key(node: Any) -> tuple[str, str] | None:
    """The full key of the first value that its class does not declare, and the name of that class."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return None
    kind = OmegaConf.get_type(node)
    declared = {f.name for f in fields(kind)} if kind is not None and is_dataclass(kind) else None
    for key in node:
        if declared is not None and key not in declared:
            return str(node._get_full_key(key)), str(getattr(kind, "__name__", ""))
        if found := _extra_key(node._get_node(key)):
            return found
    return None


def _wrong_key(key: str, owner: str = "") -> str:
    """The sentence for a key that is not there; `owner` is the class that was asked for it."""
    parent, _, word = key.rpartition(".")
    here = [c for c in components() if c.options.__name__ == owner and c.slot.path.replace("/", ".") in (parent, "callback")]
    if here:
        chosen = here[0]
        own = [f.name for f in fields(chosen.options)]
        choice = f"{chosen.slot.path}={chosen.name}"
        others = [c.name for c in components(chosen.slot.path) if word in {f.name for f in fields(c.options)}]
        if others:
            return f"{key} is not an option of {choice}, which has {', '.join(own) or 'none'}; {chosen.slot.path}={_listed(others)} has it"
        has = f", which has {', '.join(own) or 'none'}"
        return f"{key} is not an option of {choice}{_sibling(key, [f'{parent}.{name}' for name in own]) or has}"
    if key.startswith("data.validation.") or key == "data.validation":
        return f"{key} is a new set, which takes a plus: +data.validation.NAME=FILE"
    keys = known_keys()
    siblings = [k for k in keys if k.rpartition(".")[0] == parent and "/" not in k]
    mark = next((m for m in "/." if m in key), "")
    hint = ("" if mark == "/" else _sibling(key, siblings)) or _nearest(key, [k for k in keys if mark in k])
    return f"{key} is not a key of the config{hint or (f'; there {_are(siblings)}' if siblings else '')}"


def _are(words: Sequence[str]) -> str:
    return f"{'is' if len(words) == 1 else 'are'} {', '.join(sorted(words))}"


def _sibling(key: str, keys: Sequence[str]) -> str:
    """' (did you mean …?)' by the last word alone: the rest is the same for all of them, and proves nothing."""
    words = {short_key(k): k for k in keys}
    near = get_close_matches(short_key(key), words, n=1, cutoff=0.6)
    return f" (did you mean {words[near[0]]}?)" if near else ""


def _nearest(key: str, keys: Sequence[str]) -> str:
    """' (did you mean …?)' with the keys that end in nearly the same word, or else the nearest key."""
    word = get_close_matches(short_key(key), {short_key(k) for k in keys}, n=1, cutoff=0.75)
    near = [k for k in keys if word and short_key(k) == word[0]]
    return f" (did you mean {_listed(near[:3])}?)" if near else suggest(key, keys, 0.8)
