"""What `gptlab components` and `check` print."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from gptlab.config.errors import ConfigError
from gptlab.config.registry import Component, components_from, has_default, load_components, suggest
from gptlab.config.registry import components as all_components
from gptlab.config.slots import SLOTS
from gptlab.config.sources import config_dir
from gptlab.tracker.console import console, say


def components(slot: str | None) -> None:
    """List slots with their components, options, defaults, and a line of what each is."""
    load_components()
    if slot is not None and slot not in SLOTS:
        raise ConfigError(f"--slot {slot}: no such slot{suggest(slot, SLOTS)}; there are {', '.join(SLOTS)}")
    for place in SLOTS.values() if slot is None else [SLOTS[slot]]:
        say(("\n" + place.path, "bold"), ("  " + place.summary, "dim"))
        for component in all_components(place.path):
            mark = " (outside)" if component.outside else ""
            say((f"  {component.name:<12}", "cyan"), (mark, "yellow"), f" {component.summary}")
            options = ", ".join(_option(component, f.name) for f in fields(component.options))
            if options:
                console.print(f"  {'':<12} {options}", style="dim", markup=False)

        presets = _presets(place.path)
        if presets:
            say((f"  presets: {'; '.join(presets)}", "dim"))


def _presets(group: str) -> list[str]:
    """The YAML variants of a slot's components, each with the first line of its comment."""
    found = []
    for file in sorted((config_dir() / group).glob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        found.append(f"{file.stem} ({first.lstrip('# ').rstrip('.')})")
    return found


def _option(component: Component, name: str) -> str:
    if not has_default(component.options, name):
        return f"{name} (required)"
    default = getattr(component.options(), name)
    choices = component.choices.get(name)
    shown = json.dumps(default) if isinstance(default, str) and not default.isprintable() else default
    return f"{name}={shown}" + (f" ({' | '.join(choices)})" if choices else "")


def check(file: Path) -> int:
    """Run the contract checks on the components a file registers; returns the exit code."""
    from gptlab.runner.contract import contract

    load_components()
    found = components_from(file)
    if not found:
        raise ConfigError(f"{file} registers no component; decorate a class or function with @register(SLOT, NAME)")
    failures = 0
    for component in found:
        say((f"{component.slot.path}={component.name}", "bold"), f"  {component.summary}")
        for result in contract(component):
            failures += not result.passed
            mark = ("  ✓ ", "green") if result.passed else ("  ✗ ", "red")
            say(mark, result.name, (f"  {result.detail}", "dim"))
    say(f"{failures} failed" if failures else ("every check passed", "green"))
    return 1 if failures else 0
