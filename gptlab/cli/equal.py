"""`gptlab ablate --budgets`: the arms again, each as long as makes them equal in tokens, FLOPs or seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich import box
from rich.table import Table

from gptlab.cli.train import train
from gptlab.config.arms import with_overrides
from gptlab.config.errors import ConfigError
from gptlab.config.registry import suggest
from gptlab.config.sweeper import Study
from gptlab.study.compare import Arm, Comparison, collect, compare
from gptlab.study.report import difference
from gptlab.tracker.console import console, say

UNITS = ("steps", "tokens", "flops", "seconds")
ALONE = 0.15  # of the machine's processors that other work may take of a run whose seconds count


def parse_units(text: str | None) -> list[str]:
    """`tokens,flops,seconds` as a list. Raises ConfigError."""
    found = [word.strip() for word in (text or "").split(",") if word.strip()]
    for word in found:
        if word not in UNITS:
            raise ConfigError(f"--budgets {word}: arms can be equal in {', '.join(UNITS)}{suggest(word, UNITS)}")
    return list(dict.fromkeys(found))


def equal_steps(arms: Sequence[Arm], base: Arm, unit: str) -> dict[str, int]:
    """How many steps each arm takes to spend as much of a unit as the baseline did. Raises ConfigError where seconds are not known."""
    amount = _per_step(base, unit) * _steps(base)
    return {arm.label: _steps(arm) if arm is base else max(1, round(amount / _per_step(arm, unit))) for arm in arms}


def _steps(arm: Arm) -> int:
    return round(arm.mean("step") or 0)


def _per_step(arm: Arm, unit: str) -> float:
    if unit == "steps":
        return 1.0
    summaries = list(arm.summaries.values())
    if unit == "seconds":
        summaries = [s for s in summaries if float(s.get("machine/other_load", 1.0)) <= ALONE]
        if not summaries:
            least = min(float(s.get("machine/other_load", 1.0)) for s in arm.summaries.values())
            raise ConfigError(
                f"--budgets seconds: no run of the arm {arm.label!r} had the machine to itself (other work took {least:.0%} of it at the "
                "least): leave seconds out, or remove its runs (gptlab runs rm RUN) and ablate again while nothing else runs"
            )
    return sum(float(s[unit]) / float(s["step"]) for s in summaries) / len(summaries)


def at_equal(study: Study, name: str, units: Sequence[str]) -> int:
    """Train what is missing for each unit in a study of its own (`NAME-flops`), and show the verdicts side by side; the exit code."""
    own = {arm.label: arm for arm in study.arms}
    arms = [arm for arm in collect(name)[0] if arm.label in own]
    base = next(arm for arm in arms if arm.label == (study.options.baseline or study.arms[0].label))
    found: dict[str, Comparison] = {}
    code, unknown = 0, None
    for unit in units:
        try:
            steps = equal_steps(arms, base, unit)
        except ConfigError as error:  # the other units are known
            unknown = error
            continue
        place = name if all(steps[a.label] == _steps(a) for a in arms) else f"{name}-{unit}"
        if place != name:
            say(f"\nequal {unit}: " + ", ".join(f"{label} {count:,} steps" for label, count in steps.items()))
            lengthened = [
                replace(own[label], overrides=with_overrides(own[label].overrides, [f"trainer.budget={count}steps"]))
                for label, count in steps.items()
            ]
            code = max(code, train(study.arguments(place, arms=lengthened), conclude=False))
        found[unit] = compare(place)
    if found:
        _show(name, found)
    if unknown is not None:
        raise unknown
    return code


def _show(name: str, found: Mapping[str, Comparison]) -> None:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{name}: difference of val/loss at equal budgets", title_justify="left")
    shown.add_column("arm")
    for unit in found:
        shown.add_column(f"equal {unit}", justify="right", no_wrap=True)
        shown.add_column("", justify="left", no_wrap=True)
    first = next(iter(found.values()))
    for row in first.rows:
        cells: list[str] = []
        for comparison in found.values():
            same = next((r for r in comparison.rows if r.label == row.label), None)
            if same is None:
                cells += ["not trained", ""]
            elif same.baseline:
                cells += [f"{same.loss.mean:.4f}", f"{same.steps:,.0f} steps"]
            else:
                cells += [difference(same.difference), f"{same.verdict.kind if same.verdict else ''}, {same.steps:,.0f} steps"]
        shown.add_row(row.label, *cells)
    console.print(shown)
