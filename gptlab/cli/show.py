"""What `gptlab compare`, `components` and `runs` print."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.table import Table

from gptlab.config import codec
from gptlab.config.errors import ConfigError
from gptlab.config.registry import Component, components_from, has_default, load_components, suggest
from gptlab.config.registry import components as all_components
from gptlab.config.slots import SLOTS
from gptlab.config.sources import config_dir
from gptlab.runner.run import Run, all_runs, find_run, find_study, holder, members, remove_run
from gptlab.study.compare import compare as compare_study
from gptlab.study.report import draw_curves, markdown, show
from gptlab.tracker.console import console, say


def compare(study: str, *, baseline: str | None, as_json: bool, as_markdown: bool, png: Path | None) -> None:
    """Print a comparison in the form that was asked for."""
    found = compare_study(study, baseline=baseline)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    elif as_markdown:
        print(markdown(found), end="")
    else:
        show(found)
    if png is not None:
        draw_curves(study, png)
        if not as_json:
            say(f"loss curves: {png}")


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


def list_runs(study: str | None) -> None:
    """A line a run: what it is, its state, how far it is, its held-out loss, its age."""
    if study is not None:
        wanted = {m["identity"] for m in members(find_study(study))}
        runs = [r for r in all_runs() if r.identity in wanted]
    else:
        runs = all_runs()
    if not runs:
        say("no runs yet; `gptlab train` makes one")
        return
    for name in dict.fromkeys(r.study for r in runs):
        console.print(_run_table(name, [r for r in runs if r.study == name]))
    for run in runs:
        failure = run.read("failed.json") if run.state == "failed" else None
        if failure:
            say((run.identity, "red"), f" exit {failure['code']}: {failure['message']}")


_COLOURS = {"done": "green", "failed": "red", "running": "cyan", "stopped": "yellow", "new": "dim"}


def _run_table(study: str, runs: list[Run]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=study, title_justify="left", title_style="bold")
    for name in ("identity", "what differs", "state", "step", "val/loss", "age"):
        shown.add_column(name, justify="right" if name in ("step", "val/loss", "age") else "left", no_wrap=name != "what differs")
    for run in runs:
        lines = run.metrics()
        losses = [m["val/loss"] for m in lines if "val/loss" in m]
        shown.add_row(
            run.identity,
            run.name.replace(",", " "),
            f"[{_COLOURS[run.state]}]{run.state}[/]",
            str(lines[-1]["step"] if lines else 0),
            f"{float(losses[-1]):.4f}" if losses else "",
            _age(run),
        )
    return shown


def _age(run: Run) -> str:
    seconds = time.time() - (run.directory / "config.json").stat().st_mtime
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_run(reference: str) -> None:
    """Everything a run says of itself."""
    load_components()
    run = find_run(reference)
    config = run.config()
    say((str(run.directory), "bold"), f"  {run.state}" + (f" by {holder(run.directory)}" if run.state == "running" else ""))
    done, failed, environment = run.read("done.json"), run.read("failed.json"), run.read("environment.json") or {}
    if done:
        say(f"done {done['finished']} by gptlab sources {done['source']}")
    if failed:
        say((f"failed {failed['time']}: {failed['message']} (exit {failed['code']}); the traceback is in log.txt", "red"))
    if environment:
        packages = environment.get("packages", {})
        hardware = environment.get("hardware", {})
        versions = f"gptlab {packages.get('gptlab')}, torch {packages.get('torch')}, python {environment.get('python')}"
        place = f"{hardware.get('gpu') or hardware.get('cpu')} ({hardware.get('device')}, {hardware.get('threads')} threads)"
        say((f"{versions}, {place}", "dim"))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("key")
    shown.add_column("value", overflow="fold")
    for key, value in codec.flatten(config).items():
        shown.add_row(key, _value(value))
    console.print(shown)
    latest: dict[str, Any] = {}
    for line in run.metrics():
        latest.update(line)
    for key, value in latest.items():
        say(f"  {key:<26} {value:,.6g}" if isinstance(value, float) else f"  {key:<26} {value}")


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (str, list, dict)) or value is None else str(value)


def remove(reference: str, *, yes: bool) -> None:
    """Delete a run, after asking."""
    run = find_run(reference)
    if not yes and not typer.confirm(f"delete {run.directory.resolve()} ({run.state})?"):
        say("kept")
        return
    remove_run(run)
    say(f"deleted {run.directory}")
