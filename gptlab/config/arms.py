"""Arms: the configs that an ablation compares, made from axes of values and from named lists of overrides."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from gptlab.config.errors import ConfigError
from gptlab.config.explain import explain
from gptlab.config.registry import suggest
from gptlab.config.slots import word

GRID, SINGLE, LADDER = "grid", "single", "ladder"
DESIGNS = (GRID, SINGLE, LADDER)
BASE = "base"


@dataclass(frozen=True)
class Arm:
    """One config of an ablation, less its seed: its name, and the overrides that set it apart."""

    label: str
    overrides: tuple[str, ...]


def axis(text: str, option: str = "--vary") -> tuple[str, list[str]]:
    """`model/norm=layernorm,rmsnorm` as its key and values, in Hydra's own grammar; `option` gave it. Raises ConfigError."""
    if "=" not in text:
        example = "optimizer.learning_rate=3e-4,1e-3,3e-3" if option == "--tune" else "model/norm=layernorm,rmsnorm"
        raise ConfigError(f"{option} {text} has no values: give KEY=VALUE,VALUE, as in {example}")
    parsed = _parsed([text])[0]
    key = str(parsed.get_key_element())
    if parsed.is_sweep_override():
        if not parsed.is_discrete_sweep():
            raise ConfigError(f"{option} {text}: an ablation takes values one by one, as in {key}=1,2,3")
        values = [str(v) for v in parsed.sweep_string_iterator()]
    else:
        values = [str(parsed.get_value_element_as_str())]
    if len(values) < 2:
        first = ", the baseline's first" if option == "--vary" else ""
        raise ConfigError(f"{option} {text} has one value: give at least two{first}")
    if twice := next((v for v in values if values.count(v) > 1), None):
        raise ConfigError(f"{option} {text} gives {twice} twice")
    return key, values


def named(text: str) -> tuple[str, list[str]]:
    """`modern="model/norm=rmsnorm optimizer=muon"` as its name and overrides. Raises ConfigError."""
    name, mark, rest = text.partition("=")
    if not mark or not name.strip() or "/" in name or "." in name:
        raise ConfigError(f'--arm {text}: give NAME="OVERRIDE OVERRIDE", as in modern="model/norm=rmsnorm optimizer=muon"')
    return name.strip(), overrides_of(rest, f"--arm {name}")


def overrides_of(text: str, where: str) -> list[str]:
    """The overrides of one line, split as a shell splits words. Raises ConfigError."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} cannot be split into overrides ({error})") from error
    for override in found:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{where}: {override!r} is no override; write key=value")
    return found


def expand(vary: Mapping[str, Sequence[str]], arms: Mapping[str, Sequence[str]], design: str = GRID) -> list[Arm]:
    """The arms of a design, the baseline first.

    `grid`: every combination of the axes' values. `single`: the first value of all, then one other value at a time. `ladder`: each
    change added to those before it. A named arm differs from the base by its own overrides; in a ladder it is a rung.
    Raises ConfigError.
    """
    if design not in DESIGNS:
        raise ConfigError(f"--design {design} is not one of {', '.join(DESIGNS)}{suggest(design, DESIGNS)}")
    if not vary and not arms:
        raise ConfigError('nothing is varied: give --vary KEY=VALUE,VALUE, --arm NAME="OVERRIDES", or an experiment that does')
    first = tuple(f"{key}={values[0]}" for key, values in vary.items())
    found: list[Arm] = []
    if design == GRID:
        combined = itertools.product(*([(key, value) for value in values] for key, values in vary.items()))
        for combination in combined:
            label = " ".join(word(k, v) for k, v in combination) or BASE
            found.append(Arm(label, tuple(f"{k}={v}" for k, v in combination)))
    else:
        found.append(Arm(BASE, first))
        reached: tuple[str, ...] = first
        for key, values in vary.items():
            for value in values[1:]:
                changed = with_overrides(reached if design == LADDER else first, [f"{key}={value}"])
                found.append(Arm(("+ " if design == LADDER else "") + word(key, value), changed))
                reached = changed
    before = found[-1].overrides if design == LADDER else first
    for name, overrides in arms.items():
        changed = with_overrides(before, overrides)
        found.append(Arm(("+ " if design == LADDER else "") + name, changed))
        before = changed if design == LADDER else before
    labels = [arm.label for arm in found]
    if twice := next((x for x in labels if labels.count(x) > 1), None):
        raise ConfigError(f"two arms are called {twice!r}: name one otherwise, by --arm NAME=…")
    return found


def with_overrides(overrides: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """Overrides where a later one takes the place of an earlier one of the same key."""
    replaced = {_key(o) for o in more}
    return (*(o for o in overrides if _key(o) not in replaced), *more)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _parsed(overrides: Sequence[str]) -> list[Any]:
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except HydraException as error:
        raise explain(error) from error
