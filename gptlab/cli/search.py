"""What a search found: its settings by their held-out loss, and how to go on with the best."""

from __future__ import annotations

import json
import shlex
from typing import Any

from rich import box
from rich.table import Table

from gptlab.config.explain import short_key
from gptlab.config.folders import study_folder
from gptlab.config.halving import HISTORY
from gptlab.config.search import PRUNED, found_trials, overrides_of
from gptlab.tracker.console import console, say

SHOWN = 10  # of the trials, the best


def show_search(search: str, study: str) -> None:
    """The table of a study that was searched by optuna or by halving."""
    if search == "halving":
        _show_halving(study)
    else:
        _show_trials(study)


def _show_trials(study: str) -> None:
    from optuna.trial import TrialState

    trials = found_trials(study)
    done = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: (t.value, t.number))
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    failed = [t for t in trials if t.state == TrialState.FAIL]
    if not done:
        say(("no trial was trained to its end", "yellow"))
        return
    axes = sorted(done[0].params)
    shown = Table(
        box=box.SIMPLE, title=f"{study}: {len(done)} trial{'s' * (len(done) != 1)} by val/loss at the last step", title_justify="left"
    )
    shown.add_column("trial", justify="right")
    for axis in axes:
        shown.add_column(short_key(axis))
    shown.add_column("val/loss", justify="right")
    for trial in done[:SHOWN]:
        values = [_value(trial.params[axis]) for axis in axes]
        first = " (as configured)" if trial.number == 0 and trial.system_attrs.get("fixed_params") else ""
        shown.add_row(f"{trial.number}{first}", *values, f"{trial.value:.4f}")
    console.print(shown)
    if len(done) > SHOWN:
        say((f"and {len(done) - SHOWN} more", "dim"))
    if pruned:
        steps = ", ".join(f"{t.number} at step {t.user_attrs.get(PRUNED, '?')}" for t in pruned)
        say((f"given up by their curves: {steps}", "dim"))
    if failed:
        say((f"failed: trial {', '.join(str(t.number) for t in failed)}", "yellow"))
    _say_importance(study)
    base = next((t for t in trials if t.number == 0 and t.system_attrs.get("fixed_params")), None)
    if base is not None and base.value is not None:
        gained = base.value - done[0].value
        if gained <= 0:
            say("nothing beat the settings as configured")
            return
        say(f"the best is {gained:.4f} below the settings as configured, by one seed of each")
    _say_further(overrides_of(done[0].params))


def _say_importance(study: str) -> None:
    """Which setting mattered, where there are trials enough to say so (PED-ANOVA, Watanabe et al., 2023)."""
    from gptlab.config.search import importances

    found = importances(study)
    if found:
        say("of the spread among the better half: " + ", ".join(f"{short_key(key)} {100 * share:.0f} %" for key, share in found.items()))


def _show_halving(study: str) -> None:
    rows: list[dict[str, Any]] = json.loads((study_folder(study) / HISTORY).read_text(encoding="utf-8"))
    for rung in sorted({row["rung"] for row in rows}):
        own = [row for row in rows if row["rung"] == rung]
        shown = Table(box=box.SIMPLE, title=f"rung {rung}: {len(own)} settings for {own[0]['budget']}", title_justify="left")
        shown.add_column("setting")
        shown.add_column("val/loss", justify="right")
        shown.add_column("")
        last = rung == max(row["rung"] for row in rows)
        for row in own:
            loss = "failed" if row["loss"] is None else f"{row['loss']:.4f}"
            shown.add_row(row["setting"], loss, ("best" if last else "goes on") if row["stays"] else "")
        console.print(shown)
    if best := next((row for row in own if row["stays"]), None):  # of the last rung: none where all of it failed
        _say_further(shlex.split(best["setting"]))


def _say_further(overrides: list[str]) -> None:
    arm = shlex.quote(f"found={shlex.join(overrides)}")
    say(f"whether it holds on other seeds: gptlab ablate --arm {arm} --seeds 5 … with the rest of this search's overrides")


def _value(value: Any) -> str:
    return format(value, ".4g") if isinstance(value, float) else str(value)
