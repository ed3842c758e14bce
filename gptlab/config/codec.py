"""Typed config <-> JSON. Artifacts carry registered names, never import paths, and are read back only through the registry."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from omegaconf import MISSING

from gptlab.config.errors import CheckpointError, ConfigError
from gptlab.config.registry import absent, absent_parts, check_choices, component, component_of, suggest
from gptlab.config.schema import NOT_IDENTITY, Config, HardwareConfig, ModelConfig
from gptlab.config.slots import SLOTS, Options

VERSION = 1
Recipe = TypeVar("Recipe", ModelConfig, HardwareConfig)
RECIPES_WITH_SLOTS = "model", "hardware"  # that a config may leave open
_SLOT_OF_BASE = {slot.base: slot for slot in SLOTS.values()}


def encode(value: Any) -> Any:
    """A config, or a part of one, as JSON data; a component becomes {"name": …, options…}."""
    if isinstance(value, Options):
        named = {"name": component_of(value).name}
        return named | {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    return value


def to_json(config: Config) -> dict[str, Any]:
    """What is written as a run's config.json."""
    return {"version": VERSION, "config": encode(config)}


def from_json(data: Mapping[str, Any], where: str) -> Config:
    """Read what `to_json` wrote. `where` names the file in errors. Raises CheckpointError or ConfigError."""
    if data.get("version") != VERSION:
        raise CheckpointError(f"{where}: config version {data.get('version')!r}; this gptlab reads version {VERSION}")
    try:
        config = typing.cast(Config, decode(Config, data["config"], where))
        return replace(config, model=completed(config.model), hardware=completed(config.hardware, "hardware"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where} is no config of gptlab's, or damaged ({type(error).__name__}: {error})") from error


def decode(kind: Any, data: Any, where: str) -> Any:
    """Build `kind` (a config class, slot base or field type) from JSON data."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None or len([a for a in arguments if a is not type(None)]) > 1:
            return data
        return decode(next(a for a in arguments if a is not type(None)), data, where)
    if origin is dict:
        return {k: decode(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    if origin is list:
        return [decode(arguments[0], v, where) for v in data]
    if isinstance(kind, type) and issubclass(kind, Options):
        values = dict(data)
        found = component(_SLOT_OF_BASE[kind].path, values.pop("name", "?"))
        options = typing.cast(Options, _decode_fields(found.options, values, where))
        check_choices(options, where)
        return options
    if is_dataclass(kind):
        return _decode_fields(typing.cast(type, kind), data, where)
    if kind is float and isinstance(data, int):
        return float(data)
    return data


def _decode_fields(kind: type, data: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        key = sorted(unknown)[0]
        raise ConfigError(f"{where}: {kind.__name__} has no {key!r}{suggest(key, hints)}")
    return kind(**{k: decode(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def canonical(config: Config) -> dict[str, Any]:
    """What a run's identity hashes: the resolved config less NOT_IDENTITY, less callbacks' cadence, less defaults."""
    kept: dict[str, Any] = {}
    for f in fields(config):
        if f.name == "callbacks":
            # Only a callback that says so can change the numbers (`changes_training` on its factory).
            active = {k: v for k, v in config.callbacks.items() if getattr(component_of(v).factory, "changes_training", False)}
            if active:
                kept["callbacks"] = {k: _pruned(v) for k, v in active.items()}
        elif f.name not in NOT_IDENTITY:
            value = getattr(config, f.name)
            part = _pruned(value, f.name) if is_dataclass(value) else value
            if part not in ({}, None):
                kept[f.name] = part
    return kept


def _pruned(value: Any, path: str = "") -> Any:
    """A dataclass as JSON without the fields that hold their default (a component always keeps its name)."""
    kept: dict[str, Any] = {"name": component_of(value).name} if isinstance(value, Options) else {}
    for f in fields(value):
        here = f"{path}.{f.name}"
        inner = getattr(value, f.name)
        if here in NOT_IDENTITY:
            continue
        if is_dataclass(inner):
            part = _pruned(inner, here)
            if part and not _is_absent(inner):
                kept[f.name] = part
        elif inner != _default_of(f):
            kept[f.name] = encode(inner)
    return kept


def completed(config: Recipe, recipe: str = "model") -> Recipe:
    """With the component that does nothing in every slot that was left open, as one from before the slot leaves it."""
    return replace(config, **{name: nothing for name, nothing in absent_parts(recipe).items() if getattr(config, name) == MISSING})


def _is_absent(value: Any) -> bool:
    """Whether it is the component that stands for nothing in its slot."""
    return isinstance(value, Options) and value == absent(component_of(value).slot)


def _default_of(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def identity(config: Config, manifest_hash: str, outside: Mapping[str, str]) -> str:
    """Hash of a resolved config, its data and the sources of components from outside the package: 10 hex digits."""
    content = {"config": canonical(config), "data": manifest_hash, "outside": dict(outside)}
    if not outside:
        del content["outside"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def options_in(config: Any, path: str = "") -> Iterator[tuple[str, Options]]:
    """Every component's options in a config, with the dotted path of its place."""
    items: list[tuple[str, Any]] = []
    if isinstance(config, Options):
        yield path, config  # and what it is made of: a mix's sources
    if is_dataclass(config):
        items = [(f.name, getattr(config, f.name)) for f in fields(config)]
    elif isinstance(config, dict):
        items = list(config.items())
    for name, value in items:
        yield from options_in(value, f"{path}.{name}" if path else str(name))


def outside_sources(config: Config) -> dict[str, str]:
    """`slot=name` -> source hash of every component that is not gptlab's own and can change the numbers."""
    found: dict[str, str] = {}
    for path, options in options_in(config):
        chosen = component_of(options)
        is_callback = path.startswith("callbacks.")
        if path in ("tracker", "hardware.strategy") or (is_callback and not getattr(chosen.factory, "changes_training", False)):
            continue
        digest = chosen.source_hash()
        if digest:
            found[f"{chosen.slot.path}={chosen.name}"] = digest
    return found


def flatten_written(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `flatten` gives, of a config as it lies on disk: without its components, of which one may not be here."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flatten_written(value, (*path, key))
        elif key == "name" and path:
            found["/".join(path)] = value
        else:
            found[".".join((*path, key))] = value
    return found


def flatten(config: Config) -> dict[str, Any]:
    """Flat view for tables and dashboards: `model/norm: rmsnorm` for components, `model.norm.eps: 1e-6` for values."""
    encoded = encode(config)
    return {"name": encoded.pop("name"), **flatten_written(encoded)}
