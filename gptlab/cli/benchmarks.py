"""`gptlab evaluate --tasks` and `--probes`: scores of runs side by side, which are kept in their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from gptlab.evaluate.results import Score, keep, metrics_of
from gptlab.runner.load import Loaded
from gptlab.runner.tracked import add_figures
from gptlab.tracker.console import console, say

CORE = "core"  # 22 tasks and one number, not the harness's


@dataclass(frozen=True)
class Asked:
    """What is to be measured: tasks of the harness, those in a folder too, and probes."""

    tasks: list[str]
    probes: list[str]
    folder: Path | None
    shots: int | None
    limit: int


def score(runs: Mapping[str, Loaded], asked: Asked, precision: str, as_json: bool) -> None:
    """Measure each run, keep its scores in its folder, and show them, a column a run."""
    from gptlab.evaluate.probes import chosen

    chosen(asked.probes)  # what is not there is said before anything is measured
    found: dict[str, list[Score]] = {}
    for name, loaded in runs.items():
        with console.status(f"{name}: {', '.join(asked.tasks + asked.probes)}"):
            found[name] = _scores(loaded, asked)
        if loaded.run is not None:
            keep(loaded.run, found[name], precision=precision)
            add_figures(loaded.run, metrics_of(found[name]))
    if as_json:
        print(json.dumps({name: [asdict(one) for one in scores] for name, scores in found.items()}, indent=1))
    else:
        _show(found)
        _left_out(found, chosen(asked.probes))


def _left_out(found: Mapping[str, list[Score]], probes: list[str]) -> None:
    """Which probes have no score, run by run: that they are not in the table must not look like an oversight."""
    for name, scores in found.items():
        known = {one.task for one in scores}
        if missing := [one for one in probes if one not in known]:
            why = "its tokeniser cannot write them, or its context is too short"
            say((f"{name}: nothing left of {', '.join(missing)}: {why}", "yellow"))


def _scores(loaded: Loaded, asked: Asked) -> list[Score]:
    from gptlab.evaluate.core import core
    from gptlab.evaluate.harness import benchmarks
    from gptlab.evaluate.probes import probe

    found = []
    if CORE in asked.tasks:
        found += core(loaded.model, loaded.tokenizer, asked.folder, limit=asked.limit)
    if tasks := [task for task in asked.tasks if task != CORE]:
        found += benchmarks(loaded.model, loaded.tokenizer, tasks, folder=asked.folder, shots=asked.shots, limit=asked.limit)
    if asked.probes:
        found += probe(loaded.model, loaded.tokenizer, asked.probes, limit=asked.limit)
    return found


def _show(found: Mapping[str, list[Score]]) -> None:
    by_run = [{(s.task, s.metric): s for s in scores} for scores in found.values()]
    keys = list(dict.fromkeys(key for scores in by_run for key in scores))
    first = {key: next(scores[key] for scores in by_run if key in scores) for key in keys}
    columns = {
        "metric": len({metric for _, metric in keys}) > 1,
        "shots": any(one.shots for one in first.values()),
        "examples": True,
        "chance": any(one.chance is not None for one in first.values()),
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("task", *(head for head, wanted in columns.items() if wanted), *found):
        table.add_column(head, justify="left" if head in ("task", "metric") else "right", overflow="fold")
    for key, one in first.items():
        counts = sorted({scores[key].examples for scores in by_run if key in scores})
        told = {
            "metric": one.metric,
            "shots": str(one.shots),
            "examples": f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}",
            "chance": "" if one.chance is None else f"{one.chance:.2f}",
        }
        shown = ("" if key not in scores else with_error(scores[key].value, scores[key].error) for scores in by_run)
        table.add_row(one.task, *(told[head] for head, wanted in columns.items() if wanted), *shown)
    console.print(table)
    say(("± a standard error", "dim"))
    for name, scores in found.items():
        if skipped := sum(one.skipped for one in scores if one.task not in ("english", "german")):
            say((f"{name}: {skipped:,} examples skipped: its tokeniser lacks a character of theirs", "yellow"))


def with_error(value: float, error: float | None) -> str:
    """`0.6231 ± 0.0147`."""
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
