"""`gptlab ablate`: plan the arms of an ablation, train what is missing of them, and give the verdict."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table

from gptlab.cli.equal import at_equal, parse_units
from gptlab.cli.match import KEY, check_kind, matched
from gptlab.cli.plan import duration
from gptlab.cli.scales import at_scales, sizes
from gptlab.cli.train import train
from gptlab.cli.tune import parse_tune, tuned
from gptlab.config import codec
from gptlab.config.arms import Arm, axis, named
from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError, DivergedError
from gptlab.config.resolve import parse_duration, resolve
from gptlab.config.schema import NOT_IDENTITY, Config
from gptlab.config.slots import SLOTS
from gptlab.config.sweep import sweep
from gptlab.config.sweeper import Study, dictionary, quoted
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.hardware.device import machine, resident_memory
from gptlab.model.transformer import count_parameters, meta_model, new_model
from gptlab.runner import branch
from gptlab.runner.forecast import forecast
from gptlab.runner.run import all_runs, read_ablation, write_ablation
from gptlab.study.compare import Comparison, compare
from gptlab.study.report import show
from gptlab.tracker.console import PreparationProgress, console, say

FORECAST_SECONDS = 8.0  # of timed steps, all arms together
LARGEST_DRAWN = 50_000_000  # parameters of a model whose initial weights are drawn to be compared
FIRST_LOOK, GROWTH, MOST_LOOKS = 4, 1.5, 64  # of a sequential study: seeds at its first look, and how they grow


@dataclass(frozen=True)
class Planned:
    """An arm as it will be trained: which seeds are done, the seconds of a run (None: nothing is to be trained), what sets it apart."""

    arm: Arm
    config: Config
    parameters: int
    done: int
    missing: int
    seconds: float | None
    differs: list[str]
    same_weights: float | None  # the share of the baseline's initial weights that it begins with


def ablate(
    overrides: Sequence[str],
    *,
    vary: Sequence[str] = (),
    arms: Sequence[str] = (),
    design: str | None = None,
    seeds: int | None = None,
    baseline: str | None = None,
    effect: float | None = None,
    until_decided: str | None = None,
    budgets: str | None = None,
    match: str | None = None,
    tune: str | None = None,
    scales: int | None = None,
    dry_run: bool = False,
) -> int:
    """Run `gptlab ablate`; returns the exit code. Raises ConfigError."""
    given = _given(overrides, vary, arms, design, baseline, effect)
    looks, units, tuning = _looks(until_decided, seeds), parse_units(budgets), parse_tune(tune)
    check_kind(match)
    asked = sweep([*given[1:], *_seeds(looks[0] if looks else seeds)], multirun=True)
    assert asked.study is not None
    study, name = asked.study, asked.name
    by_size = sizes(study, name, scales)
    with contextlib.ExitStack() as open_data:
        data = _data(study, open_data)
        if match:
            study, resized = matched(study, match, data)
            for arm in resized:
                say(f"{arm.label}: {KEY} {arm.before:.4g} → {arm.after:.4g}, {arm.off:+.2%} off the baseline's {match}")
        if tuning and not dry_run:
            study = tuned(study, name, *tuning)
        planned = _plan(study, data)
    _show_plan(name, study, planned, looks)
    if dry_run:
        return 0
    write_ablation(name, _noted(read_ablation(name), planned))
    code = _until_decided(study, name, looks, _most_seconds(until_decided)) if looks else train(study.arguments(name))
    code = max(code, at_scales(study, by_size)) if by_size else code
    return max(code, at_equal(study, name, units)) if units else code


def _given(
    overrides: Sequence[str], vary: Sequence[str], arms: Sequence[str], design: str | None, baseline: str | None, effect: float | None
) -> list[str]:
    """The arguments of `gptlab train` that make the same sweep."""
    axes, groups = dict(axis(text) for text in vary), dict(named(text) for text in arms)
    found = ["-m", "hydra/sweeper=arms"]
    if axes:
        found.append(dictionary("vary", {key: ",".join(values) for key, values in axes.items()}))
    if groups:
        found.append(dictionary("arms", {name: shlex.join(o) for name, o in groups.items()}))
    if design is not None:
        found.append(f"hydra.sweeper.design={design}")
    if baseline is not None:
        found.append(f"hydra.sweeper.baseline={quoted(baseline)}")
    if effect is not None:
        if not effect > 0:
            raise ConfigError(f"--effect {effect:g} must be above 0: it is the smallest difference of val/loss worth knowing")
        found.append(f"hydra.sweeper.effect={effect}")
    if not any(o.startswith(("study=", "experiment=")) for o in overrides):
        words = [re.split(r"[./]", key)[-1] for key in axes] + list(groups)
        found.append("study=" + (re.sub(r"[^\w-]+", "_", "_x_".join(words)) or "ablation"))
    return [*found, *overrides]


def _seeds(seeds: int | None) -> list[str]:
    if seeds is None:
        return []
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} must be at least 1; a verdict needs 2, a good one 5")
    return [f"hydra.sweeper.seeds={seeds}"]


def _data(study: Study, open_data: contextlib.ExitStack) -> list[Prepared]:
    """The text of each arm, prepared as training would. Raises ConfigError for an arm that cannot be composed."""
    composed = [compose(study.job(arm, study.seeds[0])) for arm in study.arms]
    _distinct(study, [branch.settle(resolve(config, machine()))[0] for config in composed])
    found: dict[str, Prepared] = {}
    for config in composed:
        key = str(codec.encode(config.data))
        if key not in found:
            with PreparationProgress() as progress:
                found[key] = open_data.enter_context(contextlib.closing(prepare(config.data, report=progress.update, background=True)))
    return [found[str(codec.encode(config.data))] for config in composed]


def _plan(study: Study, data: Sequence[Prepared]) -> list[Planned]:
    """Every arm resolved, looked up among the runs that are there, and forecast."""
    composed = [compose(study.job(arm, study.seeds[0])) for arm in study.arms]
    process = resident_memory()
    finished = {run.identity for run in all_runs() if (run.directory / "done.json").exists()}
    base = next((i for i, arm in enumerate(study.arms) if arm.label == study.options.baseline), 0)
    found = []
    resolved = [branch.settle(resolve(config, machine()))[0] for config in composed]
    for arm, config, final, text in zip(study.arms, composed, resolved, data, strict=True):
        done = sum(_identity(replace(config, seed=seed), text) in finished for seed in study.seeds)
        missing = len(study.seeds) - done
        seconds = None
        if missing:
            try:
                made = forecast(config, text, seconds=max(1.0, FORECAST_SECONDS / len(composed)), process=process)
                seconds = made.seconds.total if made.seconds else None
            except DivergedError:  # its first step does: its own run says so, and the other arms go on
                pass
        model = meta_model(final.model, text.vocabulary)
        found.append(
            Planned(
                arm,
                final,
                count_parameters(model)["total"],
                done,
                missing,
                seconds,
                differences(resolved[base], final),
                _same_weights(resolved[base], final, text.vocabulary),
            )
        )
    return found


def _identity(config: Config, data: Prepared) -> str:
    final, _ = branch.settle(resolve(config, machine()))
    return codec.identity(final, data.hash, codec.outside_sources(final))


def _distinct(study: Study, resolved: Sequence[Config]) -> None:
    seen: dict[str, str] = {}
    for arm, config in zip(study.arms, resolved, strict=True):
        key = str((codec.canonical(config), codec.encode(config.data)))
        if key in seen:
            raise ConfigError(f"the arms {seen[key]!r} and {arm.label!r} are the same config: one of them changes nothing")
        seen[key] = arm.label


def differences(base: Config, other: Config) -> list[str]:
    """What an arm's config has otherwise than the baseline's: `model/norm layernorm → rmsnorm`; of another component only its name."""
    one, two = codec.flatten(base), codec.flatten(other)
    changed = [k for k in [*one, *(k for k in two if k not in one)] if one.get(k) != two.get(k)]
    swapped = [k.replace("/", ".") for k in changed if k in SLOTS]
    found = []
    for key in changed:
        place = key.replace("/", ".")
        hidden = any(place == n or place.startswith(f"{n}.") for n in (*NOT_IDENTITY, "callbacks", "seeds"))
        if hidden or any(place.startswith(f"{s}.") for s in swapped):
            continue
        found.append(f"{key} {one.get(key, 'none')} → {two.get(key, 'none')}")
    return found


def _same_weights(base: Config, other: Config, vocabulary: int) -> float | None:
    """The share of this arm's initial weights that are the baseline's of the same seed; None of a model too large to draw."""
    if other.model == base.model:
        return 1.0
    if max(count_parameters(meta_model(c.model, vocabulary))["total"] for c in (base, other)) > LARGEST_DRAWN:
        return None
    one, two = (dict(new_model(c.model, vocabulary, int(c.seeds.init or 0)).named_parameters()) for c in (base, other))
    total = sum(p.numel() for p in two.values())
    shared = sum(int((p == one[n]).sum()) for n, p in two.items() if n in one and one[n].shape == p.shape)
    return shared / total if total else 1.0


def _noted(before: dict[str, Any], planned: Sequence[Planned]) -> dict[str, Any]:
    arms = {p.arm.label: {"differs": p.differs, "same_weights": p.same_weights} for p in planned}
    return before | {"planned": before.get("planned", {}) | arms}


def _show_plan(name: str, study: Study, planned: Sequence[Planned], looks: Sequence[int]) -> None:
    base = study.options.baseline or study.arms[0].label
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("arm", min_width=12)
    for title in ("parameters", "same start", "done", "to train", "a run"):
        shown.add_column(title, justify="right", no_wrap=True)
    for p in planned:
        same = "baseline" if p.arm.label == base else "?" if p.same_weights is None else f"{p.same_weights:.0%}"
        time = duration(p.seconds) if p.seconds is not None else "" if not p.missing else "?"
        shown.add_row(p.arm.label, f"{p.parameters:,}", same, str(p.done), str(p.missing), time)
    console.print(shown)
    for p in planned:
        if p.arm.label != base:
            say(f"  {p.arm.label}: ", ("; ".join(p.differs) or "nothing that changes the numbers", "dim"))
    missing, known = sum(p.missing for p in planned), [p.missing * p.seconds for p in planned if p.seconds is not None]
    if missing:
        took = f", about {duration(sum(known))} one after the other" if len(known) == sum(p.missing > 0 for p in planned) else ""
        say(f"{name}: {len(planned)} arms, {len(study.seeds)} seed{'s' * (len(study.seeds) > 1)} each, {missing} runs to train{took}")
    else:
        say(f"{name}: {len(planned)} arms, {len(study.seeds)} seed{'s' * (len(study.seeds) > 1)} each, all done")
    if looks:
        say(f"looked at after {', '.join(map(str, looks))} seeds, and ended as soon as every arm is decided")
    if len(study.seeds) == 1:
        say(("one seed shows a difference and gives no verdict: --seeds 5", "yellow"))


def _looks(until_decided: str | None, seeds: int | None) -> list[int]:
    """The numbers of seeds at which a sequential study is looked at, fixed before it begins. Raises ConfigError."""
    if until_decided is None:
        return []
    first = seeds if seeds is not None else FIRST_LOOK
    most = int(until_decided) if until_decided.isdigit() else MOST_LOOKS
    if not until_decided.isdigit():
        _most_seconds(until_decided)
    if first < 2 or most < first:
        raise ConfigError(f"--until-decided {until_decided}: give the most seeds (at least {max(2, first)}), or the most time, as in 2h")
    found = [first]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, round(found[-1] * GROWTH))))
    return found


def _most_seconds(until_decided: str | None) -> float | None:
    if until_decided is None or until_decided.isdigit():
        return None
    try:
        found = parse_duration(until_decided)
    except ConfigError:
        found = None
    if not found:
        raise ConfigError(f"--until-decided {until_decided}: give the most seeds, as in 24, or the most time, as in 2h or 30min")
    return found


def _until_decided(study: Study, name: str, looks: Sequence[int], most_seconds: float | None) -> int:
    """Add seeds look by look until every arm is decided, the last look is reached, or the next would take more than the time."""
    spent = 0.0
    for number, look in enumerate(looks):
        before = _wall(name)
        code = train(study.arguments(name, seeds=range(study.seeds[0], study.seeds[0] + look), looks=looks), conclude=False)
        spent += _wall(name) - before
        found = compare(name)
        open_arms = undecided(found)
        if code or not open_arms or number == len(looks) - 1:
            break
        seeds_left = looks[number + 1] - look
        if most_seconds is not None and spent + seeds_left * spent / look > most_seconds:
            say(
                (
                    f"the time is spent: {look} seeds took {duration(spent)}, and {seeds_left} more would exceed {duration(most_seconds)}",
                    "yellow",
                )
            )
            break
        say((f"after {look} seeds undecided: {', '.join(open_arms)}; on to {looks[number + 1]}", "dim"))
    show(found)
    return code


def _wall(name: str) -> float:
    """Seconds that the runs of a study took, all together."""
    from gptlab.study.compare import collect

    try:
        return sum(float(s.get("wall", 0.0)) for arm in collect(name)[0] for s in arm.summaries.values())
    except ConfigError:
        return 0.0


def undecided(comparison: Comparison) -> list[str]:
    """The arms on which there is no verdict yet."""
    return [row.label for row in comparison.rows if row.verdict is not None and row.verdict.kind in ("undecided", "none")]
