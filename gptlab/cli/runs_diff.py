"""`gptlab runs diff A B`: in what two runs differ, and what came of it."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.table import Table

from gptlab.config import codec
from gptlab.runner.run import Run, find_run
from gptlab.tracker.console import console, say

_CHANGES_NOTHING = ("name", "study", "arm")  # of a config: what it is called


def diff(first: str, second: str, *, as_json: bool) -> None:
    """Print the settings, the circumstances and the last metrics in which two runs differ."""
    one, two = find_run(first), find_run(second)
    found = {
        "settings": _differing(*(_settings(run) for run in (one, two))),
        "made by": _differing(*(_circumstances(run) for run in (one, two))),
        "metrics": _differing(*(_last(run) for run in (one, two))),
    }
    if as_json:
        print(json.dumps({"runs": [str(one.directory), str(two.directory)], **found}, indent=1))
        return
    say((f"{one.study}/{one.directory.name}", "bold"), f"  {one.state}")
    say((f"{two.study}/{two.directory.name}", "bold"), f"  {two.state}")
    if one.identity == two.identity:
        say("they are one run")
        return
    for title, rows in found.items():
        if rows:
            console.print(_table(title, rows))
    if not found["settings"]:
        say("no setting differs: another data set, or another version of gptlab, made them two runs")


def _settings(run: Run) -> dict[str, Any]:
    written = codec.flatten_written((run.read("config.json") or {}).get("config", {}))
    return {key: value for key, value in written.items() if key not in _CHANGES_NOTHING}


def _circumstances(run: Run) -> dict[str, Any]:
    environment, data = run.read("environment.json") or {}, run.read("data.json") or {}
    hardware = environment.get("hardware", {})
    packages = {f"package {name}": version for name, version in environment.get("packages", {}).items()}
    told = {"python": environment.get("python"), "gptlab sources": environment.get("source"), "data": data.get("hash")}
    told |= {"processor": hardware.get("gpu") or hardware.get("cpu"), "threads": hardware.get("threads"), "ranks": environment.get("ranks")}
    return told | packages


def _last(run: Run) -> dict[str, Any]:
    """The last value of everything a run measured."""
    found: dict[str, Any] = {}
    for line in run.metrics():
        found.update(line)
    summary: dict[str, Any] = (run.read("done.json") or {}).get("summary", {})
    return found | summary


def _differing(one: dict[str, Any], two: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: [one.get(key), two.get(key)] for key in dict.fromkeys((*one, *two)) if one.get(key) != two.get(key)}


def _table(title: str, rows: dict[str, list[Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in ("what", "first", "second"):
        shown.add_column(name, overflow="fold", justify="left")
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for values in rows.values() for v in values if v is not None)
    if numbers:
        shown.add_column("difference", justify="right")
    for key, (first, second) in rows.items():
        more = [f"{second - first:+,.6g}" if None not in (first, second) else ""] if numbers else []
        shown.add_row(key, _value(first), _value(second), *more)
    return shown


def _value(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.6g}" if isinstance(value, float) else str(value)
