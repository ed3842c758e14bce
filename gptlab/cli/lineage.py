"""What `gptlab runs lineage` prints: the runs that a run's weights came through, from the first, and what each took."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.table import Table

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of, load_components
from gptlab.runner.run import PARENT, Run, find_run
from gptlab.tracker.console import console, say


@dataclass(frozen=True)
class Stage:
    """One run of the chain, as far as the next one went on from it: what it added to the one before. Seconds are with evaluations.

    `began`: the run and step whose weights it began with, or that they were drawn, or imported.
    """

    run: str
    name: str
    study: str
    state: str
    began: str
    objective: str
    data: str
    steps: int
    tokens: int
    flops: float
    seconds: float
    loss: float | None
    solved: float | None = None  # of the stage's own problems
    missing: bool = False


def lineage(reference: str, *, price: float, as_json: bool) -> None:
    """Print the chain. `price`: dollars an hour of the machine, 0: none is told."""
    if price < 0:
        raise ConfigError(f"--price {price} must be at least 0 dollars an hour")
    load_components()
    stages = chain(find_run(reference))
    if as_json:
        print(json.dumps([asdict(stage) for stage in stages], indent=1))
        return
    solved = any(stage.solved is not None for stage in stages)
    columns = ["stage", "run", "objective", "data", "tokens", "time", *["cost"] * bool(price), "loss", *["solved"] * solved]
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        shown.add_column(name, justify="left" if name in columns[:4] else "right", no_wrap=name not in ("stage", "data"), overflow="fold")
    for stage in stages:
        if stage.missing:
            shown.add_row(stage.name.replace(",", " "), stage.run, "is gone")
            continue
        shown.add_row(
            stage.name.replace(",", " "), stage.run, stage.objective, stage.data, _count(stage.tokens), _time(stage.seconds),
            *[f"${stage.seconds / 3600 * price:,.2f}"] * bool(price), "" if stage.loss is None else f"{stage.loss:.4f}",
            *["" if stage.solved is None else f"{stage.solved:.1%}"] * solved,
        )  # fmt: skip
    console.print(shown)
    for before, stage in zip([None, *stages], stages, strict=False):
        if not stage.missing and (before is None or before.missing or stage.began != f"{before.name.replace(',', ' ')}@{before.steps}"):
            say(f"{stage.name.replace(',', ' ')} began with {stage.began}")
    known = [stage for stage in stages if not stage.missing]
    seconds, flops = sum(stage.seconds for stage in known), sum(stage.flops for stage in known)
    cost = f", ${seconds / 3600 * price:,.2f} at ${price:g} an hour" if price else ""
    say(f"in all {sum(stage.tokens for stage in known):,} tokens, {flops:.3g} FLOPs, {_time(seconds)}{cost}")
    of_solved = "; solved are its own problems" if solved else ""
    say((f"loss is val/loss, of each stage's own held-out data: of chats on the assistant's tokens alone{of_solved}", "dim"))


def chain(run: Run) -> list[Stage]:
    """The stages, the first one first. Where a parent is gone the chain begins with its name."""
    found = [_stage(run, None)]
    at: Run | None = run
    while at is not None and (parent := at.read(PARENT) or at.read("start.json")):
        start, _, branched_at = at.config().trainer.start.partition("@")
        identity, until = str(parent.get("run") or start), int(parent.get("step") or branched_at or 0)
        try:
            at = find_run(identity)
        except ConfigError:
            found.append(Stage(identity, str(parent["name"]), str(parent["study"]), "gone", "", "", "", 0, 0, 0.0, 0.0, None, missing=True))
            break
        if any(stage.run == at.identity for stage in found):
            break
        stood = _stage(at, until)
        if branched_at:  # a branch counts on where its parent stood
            found[-1] = replace(
                found[-1],
                tokens=found[-1].tokens - stood.tokens,
                flops=found[-1].flops - stood.flops,
                seconds=found[-1].seconds - stood.seconds,
            )
        found.append(stood)
    return found[::-1]


def _stage(run: Run, until: int | None) -> Stage:
    """A run up to a step, or to where it has come."""
    config = run.config()
    parent, came = run.read(PARENT), run.read("imported.json")
    began = (
        f"{parent['name'].replace(',', ' ')}@{parent['step']}"
        if parent
        else config.trainer.start or (f"import of {came['kind']}" if came else "nothing")
    )
    latest: dict[str, Any] = {}
    for line in run.metrics():
        if until is None or int(line.get("step", 0)) <= until:
            latest.update(line)
    loss, solved = latest.get("val/loss"), latest.get("val/solved")
    return Stage(
        run.identity, run.name, run.study, run.state, began, component_of(config.objective).name, component_of(config.data.corpus).name,
        int(latest.get("step", 0)), int(latest.get("tokens", 0)), float(latest.get("flops", 0.0)), float(latest.get("wall", 0.0)),
        None if loss is None else float(loss), None if solved is None else float(solved),
    )  # fmt: skip


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
