"""`gptlab ablate --tune`: each arm's own best value of one setting, found on seeds that no verdict uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.table import Table
from rich.text import Text

from gptlab.cli.train import train
from gptlab.config.arms import Arm, axis, with_overrides
from gptlab.config.errors import ConfigError, GptlabError
from gptlab.config.slots import word
from gptlab.config.sweeper import Study
from gptlab.study.compare import METRIC, collect
from gptlab.tracker.console import console, say

FIRST_SEED, SEEDS = 1000, 2  # of the sweep


def parse_tune(text: str | None) -> tuple[str, list[str]] | None:
    """`optimizer.learning_rate=3e-4,1e-3` as its key and values. Raises ConfigError."""
    return None if text is None else axis(text, "--tune")


def tuned(study: Study, name: str, key: str, values: Sequence[str]) -> Study:
    """The study with every arm at its own best value, by the mean loss over the tuning seeds, trained as the study `NAME-tune`.

    Raises ConfigError where verdict seeds would be used, GptlabError where an arm has no finished run.
    """
    seeds = list(range(FIRST_SEED, FIRST_SEED + SEEDS))
    if set(seeds) & set(study.seeds):
        raise ConfigError(f"--tune uses the seeds {seeds[0]} to {seeds[-1]}, which the verdict must not: give other seeds")
    tried = {(arm.label, value): f"{arm.label} {word(key, value)}" for arm in study.arms for value in values}
    arms = [Arm(tried[arm.label, value], with_overrides(arm.overrides, [f"{key}={value}"])) for arm in study.arms for value in values]
    say(f"\ntuning {key} on seeds {seeds[0]} to {seeds[-1]}")
    train(replace(study, options=replace(study.options, baseline="")).arguments(f"{name}-tune", arms=arms, seeds=seeds), conclude=False)
    losses = {arm.label: loss for arm in collect(f"{name}-tune")[0] if (loss := arm.mean(METRIC)) is not None}
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{METRIC} by {key}, mean of {SEEDS} seeds", title_justify="left")
    shown.add_column("arm")
    for value in values:
        shown.add_column(value, justify="right", no_wrap=True)
    best: dict[str, str] = {}
    for arm in study.arms:
        found = {value: losses[tried[arm.label, value]] for value in values if tried[arm.label, value] in losses}
        if not found:
            raise GptlabError(f"--tune: no run of the arm {arm.label!r} was finished, so nothing is known of its best {key}")
        best[arm.label] = min(found, key=lambda v: found[v])
        cells = [
            Text(f"{found[v]:.4f}", style="bold green" if v == best[arm.label] else "") if v in found else Text("failed") for v in values
        ]
        shown.add_row(arm.label, *cells)
    console.print(shown)
    edge = [label for label, value in best.items() if value in (values[0], values[-1])]
    if edge:
        say((f"the best value lies at the edge of those tried for {', '.join(edge)}: try more beyond it", "yellow"))
    return replace(study, arms=[replace(a, overrides=with_overrides(a.overrides, [f"{key}={best[a.label]}"])) for a in study.arms])
