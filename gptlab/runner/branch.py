"""A run that begins at another run's checkpoint (trainer.start): which one that is, whether it fits, and what is taken over from it.

Step, tokens, seconds and the position in the data go on from the parent's, so that a branch's figures are those of the whole road.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptlab.config import codec
from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import build, component_of
from gptlab.config.resolve import parse_budget
from gptlab.config.schema import NOT_IDENTITY, Config
from gptlab.runner import checkpoint
from gptlab.runner.length import UNKNOWN_STEPS, length_of
from gptlab.runner.passed import PASSED, passed_batches
from gptlab.runner.resume import restore
from gptlab.runner.run import Run, all_runs, find_run
from gptlab.runner.state import State
from gptlab.runner.trainer import Trainer
from gptlab.tracker.jsonl import read_metrics

START = "start.json"  # in a branch's folder: the run and the step it went on from
ENDS = ("schedule", "trainer.budget", "trainer.start")  # what a branch may have otherwise than its parent, beside NOT_IDENTITY


@dataclass
class Origin:
    """The checkpoint that a run begins at, by identity and step. `parent`: None where that run is no longer here."""

    identity: str
    step: int
    parent: Run | None
    found: Path | None = None  # the checkpoint, once it was looked at

    @property
    def name(self) -> str:
        return f"{self.identity}@{self.step}"


def settle(config: Config) -> tuple[Config, Origin | None]:
    """A resolved config with trainer.start as IDENTITY@STEP, however it was spelt, and a budget in steps where the start tells it.

    Raises ConfigError when there is no such run or checkpoint, CheckpointError when none of its checkpoints is whole.
    """
    if not config.trainer.start:
        if component_of(config.schedule).name == "cooldown":
            build(config.schedule, batch_tokens=int(config.trainer.batch_tokens), steps=None, start=0)  # it says what it wants
        return config, None
    reference, mark, which = config.trainer.start.rpartition("@")
    if not mark:
        reference, which = which, "latest"
    origin = _origin(reference, which)
    budget, text = parse_budget(config.trainer.budget), config.trainer.budget
    if budget.beyond and budget.unit in ("steps", "tokens", "%"):  # the same end is the same run
        size = int(config.trainer.batch_tokens)
        text = f"{budget.steps(batch_tokens=size, epoch_tokens=0, parameters=0, flops_per_token=1, start=origin.step)}steps"
    return replace(config, trainer=replace(config.trainer, start=origin.name, budget=text)), origin


def _origin(reference: str, which: str) -> Origin:
    try:
        parent = find_parent(reference)
    except ConfigError:
        known = _left_by(reference)
        if len(known) == 1 and which.isdigit():
            return Origin(known.pop(), int(which), None)
        raise
    # A step is not looked for yet: a branch that is done, or goes on from a checkpoint of its own, does without it.
    return Origin(parent.identity, int(which) if which.isdigit() else step_of(parent, which), parent)


def _left_by(reference: str) -> set[str]:
    """The runs of such an identity that are no longer here, but have branches that are."""
    word = reference.rpartition("/")[2].rpartition("-")[2]
    starts = {str((r.read("config.json") or {}).get("config", {}).get("trainer", {}).get("start", "")) for r in all_runs()}
    return {s.rpartition("@")[0] for s in starts if word and s.startswith(word)}


def find_parent(reference: str) -> Run:
    """A run to go on from, as `find_run` finds it; `latest` is the newest that is no cooldown. Raises ConfigError."""
    if reference != "latest":
        return find_run(reference)
    runs = [r for r in all_runs() if (r.read("config.json") or {}).get("config", {}).get("schedule", {}).get("name") != "cooldown"]
    return runs[-1] if runs else find_run(reference)


def step_of(parent: Run, which: str) -> int:
    """The step of a run's checkpoint: `latest` (the newest whole one), `best` or a step that is kept. Raises as `settle`."""
    if which in ("latest", "best"):
        return checkpoint.step_of(checkpoint.choose(parent.checkpoints, which))
    if not which.isdigit():
        raise ConfigError(f"{which or 'nothing'} is no checkpoint of run {parent.identity} to begin at: give a step, best or latest")
    kept = [checkpoint.step_of(c) for c in checkpoint.checkpoints(parent.checkpoints)]
    if int(which) not in kept:
        there = ", ".join(f"{s:,}" for s in sorted(kept)) or "none"
        raise ConfigError(
            f"run {parent.identity} keeps no checkpoint of step {int(which):,}; there is {there}: "
            "callbacks.checkpoint.keep_every=N keeps every N-th of a run"
        )
    return int(which)


def check(trainer: Trainer, origin: Origin) -> Path:
    """The checkpoint to begin at, when all fits. Rank 0's word.

    Raises ConfigError where the parent is gone or was another training up to there, its rate is not at its full height at the
    step, or nothing is left to train; DataError where its text has changed since; CheckpointError for a damaged checkpoint.
    """
    parent, step = origin.parent, origin.step
    if parent is None:
        raise ConfigError(f"trainer.start={origin.name}: the run {origin.identity} is no longer here, and nothing of this one was kept")
    step_of(parent, str(step))
    config, whose = parent.config(), f"run {parent.identity}"
    _same_training(trainer, parent, config)
    found = checkpoint.choose(parent.checkpoints, str(step))
    state, length = State.from_json(checkpoint.load_state(found)["state"]), length_of(config, trainer)
    rate = build(config.schedule, batch_tokens=trainer.batch_tokens, steps=length.steps, start=length.start)
    total = length.total(state)
    before, after = (rate(step - 1, total), rate(step, total)) if step else (0.0, 0.0)
    schedule = f"schedule={component_of(config.schedule).name}"
    if after > before or not step:
        raise ConfigError(f"{whose} is still warming up at step {step:,} ({schedule}): go on from a step at its full rate")
    if before < 1 or after < 1:
        raise ConfigError(
            f"{whose} has begun to cool at step {step:,} ({schedule} is at {min(before, after):.3g} of the full rate): "
            "go on from a step at the full rate, of schedule=constant or of wsd before its decay"
        )
    mine = trainer.length
    by_clock = mine.steps is None and not mine.budget.beyond and mine.seconds <= state.seconds
    if by_clock or (mine.steps is not None and mine.steps <= step):
        at = f"{state.seconds / 60:.3g} min" if by_clock else f"step {step:,}"
        raise ConfigError(f"trainer.budget={trainer.config.trainer.budget} is spent where the run begins ({at}): give more, or +20%")
    own = trainer.schedule(step, mine.steps or UNKNOWN_STEPS)
    if own < 1:
        name = component_of(trainer.config.schedule).name
        raise ConfigError(
            f"schedule={name} would be at {own:.3g} of the full rate at step {step:,}, where {whose} has all of it: use schedule=cooldown"
        )
    return found


def _same_training(trainer: Trainer, parent: Run, config: Config) -> None:
    own, whose = trainer.config, f"run {parent.identity}"
    for key, mine, theirs in _differences(own, config):
        raise ConfigError(
            f"{key}={mine} differs from {theirs} in {whose}, which it goes on from: a branch changes only its schedule and its budget; "
            "`gptlab cooldown` takes over all the rest"
        )
    written = (parent.read("data.json") or {}).get("hash")
    if written != trainer.data.hash:
        if codec.encode(own.data) != codec.encode(config.data):
            one, two = codec.flatten(own), codec.flatten(config)
            key = next(k for k in [*one, *two] if k.startswith("data") and one.get(k) != two.get(k))
            raise ConfigError(
                f"{key}={one.get(key)} makes another text of it than {whose} was trained on ({two.get(key)}): a branch keeps it"
            )
        raise DataError(
            f"{whose} was trained on a text that has changed since, or its data.json cannot be read: bring back the text of then"
        )
    if codec.identity(config, trainer.data.hash, codec.outside_sources(config)) != parent.identity:
        raise ConfigError(
            f"{parent.directory.name} is not the run that its name ends with: it was renamed, or a component of your own has changed since"
        )


def _differences(own: Config, other: Config) -> Iterator[tuple[str, Any, Any]]:
    """(key, own value, the other's) of what would make another training of the steps before."""
    same = replace(other, schedule=own.schedule, trainer=replace(other.trainer, budget=own.trainer.budget, start=own.trainer.start))
    mine, theirs = codec.canonical(own), codec.canonical(same)
    if mine == theirs:
        return
    one, two = codec.flatten(own), codec.flatten(same)
    callbacks = {*mine.get("callbacks", {}), *theirs.get("callbacks", {})}  # those that change the training
    for key in [*one, *(k for k in two if k not in one)]:
        place = key.replace("/", ".")
        free = any(place == n or place.startswith(f"{n}.") for n in (*NOT_IDENTITY, *ENDS))
        idle = place.startswith("callbacks.") and place.split(".")[1] not in callbacks
        if not free and not idle and one.get(key) != two.get(key):
            yield key, one.get(key, "nothing"), two.get(key, "nothing")


def begin(trainer: Trainer, origin: Origin) -> None:
    """Take over the parent's state at the checkpoint, and write down where it came from. Every rank calls it.

    What the parent measured at that very step becomes the first line of the branch's metrics: its curve leaves the parent's there.
    """
    world, run = trainer.world, trainer.run
    found = origin.found or world.share(lambda: check(trainer, origin))
    restore(trainer, found)
    state, parent = trainer.state, origin.parent
    assert parent is not None
    state.begun = state.seconds
    trainer.writer.saved = -1  # this run has no checkpoint of that step yet

    def take_over() -> set[int]:
        _note(run, origin)
        known = set(passed_batches(run))  # by the branch itself, in a try before its first checkpoint
        passed = [m for m in read_metrics(parent.directory / PASSED) if m["batch"] < state.batch and m["batch"] not in known]
        _append(run.directory / PASSED, passed)
        if not run.metrics_file.exists():
            _append(run.metrics_file, [m for m in parent.metrics() if m.get("step") == state.step])
        return known | {int(m["batch"]) for m in passed}

    trainer.passed = world.share(take_over)


def _append(file: Path, lines: list[dict[str, Any]]) -> None:
    if lines:
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(line) + "\n" for line in lines))


def arm_of(config: Config, manifest_hash: str, outside: dict[str, str], start: str = "") -> str:
    """What all seeds of an arm share: the identity with every seed at 0, and with `start`, the arm's own, for a branch's start."""
    seedless = replace(config, seed=0, seeds=replace(config.seeds, init=0, data=0, dropout=0))
    return codec.identity(replace(seedless, trainer=replace(config.trainer, start=start)), manifest_hash, outside)


def _note(run: Run, origin: Origin) -> None:
    """Write down what a branch goes on from, while that is here."""
    assert origin.parent is not None
    parent = {"run": origin.identity, "name": origin.parent.name, "study": origin.parent.study}
    run.write(START, parent | {"step": origin.step, "arm": _arm_of_run(origin.parent)})


def start_arm(run: Run, origin: Origin | None) -> str:
    """The start that all seeds of a branch's arm share: the parent's arm and the step; empty for a run that is no branch."""
    if origin is None:
        return ""
    noted = run.read(START)
    arm = noted["arm"] if noted else _arm_of_run(origin.parent) if origin.parent else origin.identity
    return f"{arm}@{origin.step}"


def _arm_of_run(run: Run) -> str:
    config, noted = run.config(), run.read(START)
    manifest_hash = str((run.read("data.json") or {}).get("hash"))
    start = f"{noted['arm']}@{noted['step']}" if noted else config.trainer.start
    return arm_of(config, manifest_hash, codec.outside_sources(config), start)
