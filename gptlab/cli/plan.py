"""`gptlab plan`: what a run, or each point of a sweep, will take: parameters, work, memory, time and money, before anything is trained."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich import box
from rich.table import Table

from gptlab.config import codec
from gptlab.config.compose import compose, name_of, prepare
from gptlab.config.errors import ConfigError, GptlabError
from gptlab.config.registry import component, component_of
from gptlab.config.schema import Config
from gptlab.config.slots import Callback, Tracker
from gptlab.config.sweep import Point, points
from gptlab.data.prepare import find_prepared
from gptlab.data.prepared import Prepared
from gptlab.hardware.cards import Card, card_named
from gptlab.hardware.device import resident_memory
from gptlab.runner.forecast import TIMED_SECONDS, Forecast, forecast, same_but_seed
from gptlab.runner.memory import forecast_memory
from gptlab.runner.run import Run
from gptlab.runner.train import train
from gptlab.runner.validation import EVALUATION_TOKENS
from gptlab.tracker.console import console, say

MEASURED_STEPS, MEASURED_SECONDS = (4, 20), 60.0  # of --measure: least and most, and what they may take
LONGEST_MEASURED = 30.0  # seconds of a step


_MOMENTS = {"backward": "in training", "update": "in the update", "evaluation": "in evaluation", "checkpoint": "when it is saved"}


@dataclass(frozen=True)
class Price:
    """Money an hour: `1.29/h`, `$1.29/h`, `2 EUR/h`."""

    amount: float
    before: str = ""
    after: str = ""

    def of(self, seconds: float) -> str:
        """What so many seconds cost."""
        return f"{self.before}{self.amount * seconds / 3600:,.2f}{self.after}"


def parse_price(text: str) -> Price:
    """Raises ConfigError for a price that does not say by what it is counted."""
    match = re.fullmatch(r"\s*([^\d\s./-]*)\s*(\d+\.?\d*|\.\d+)\s*([^\d\s./-]*)\s*(?:/\s*(h|hour|day|min))?\s*", text)
    if match is None or not match[4]:
        raise ConfigError(f"--price {text} has no unit: money an hour is 1.29/h or $1.29/h (also /day and /min)")
    hours = {"h": 1.0, "hour": 1.0, "day": 24.0, "min": 1 / 60}[match[4]]
    return Price(float(match[2]) / hours, match[1], f" {match[3]}" if match[3] else "")


def plan(
    overrides: Sequence[str],
    *,
    card: str | None = None,
    mfu: float = 0.4,
    price: str | None = None,
    as_json: bool = False,
    measure: bool = False,
) -> None:
    """Print the forecast of `gptlab train OVERRIDES`. Raises ConfigError."""
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu} is a share of the card's peak: above 0 and at most 1")
    cost = parse_price(price) if price is not None else None
    there = card_named(card) if card is not None else None
    if measure and there is not None:
        raise ConfigError("--measure trains on this machine, and --card plans for another; give one of them")
    found = points(overrides, what="plan forecasts runs it knows beforehand")
    if measure and len(found) > 1:
        raise ConfigError(f"--measure trains one run, and these overrides make {len(found)}; give the values of one")
    forecasts = _forecasts(found, there, mfu)
    if measure:
        _measured(forecasts[0], as_json=as_json)
    elif as_json:
        print(json.dumps([_as_data(point, made, cost) for point, made in zip(found, forecasts, strict=True)], indent=1))
    elif len(found) == 1:
        _show(forecasts[0], cost)
    else:
        _show_sweep(found, forecasts, cost)


def _forecasts(found: Sequence[Point], card: Card | None, mfu: float) -> list[Forecast]:
    """One for each point; points that differ in their seed alone share theirs."""
    configs = [compose(point.overrides) for point in found]
    keys = [json.dumps(codec.to_json(same_but_seed(config)), sort_keys=True) for config in configs]
    seconds = max(3.0, TIMED_SECONDS / len(set(keys)))
    known: dict[str, Forecast] = {}
    data = _data(configs[0])  # it imports what training would
    process = resident_memory()
    for key, config in zip(keys, configs, strict=True):
        if key not in known:
            known[key] = forecast(
                config, data if config is configs[0] else _data(config), card=card, mfu=mfu, seconds=seconds, process=process
            )
    return [known[key] for key in keys]


def _data(config: Config) -> Prepared | None:
    return find_prepared(config.data)


def _as_data(point: Point, made: Forecast, price: Price | None) -> dict[str, Any]:
    config, seconds = made.config, made.seconds
    found: dict[str, Any] = {
        "name": name_of(point.chosen) or config.name or "base",
        "device": made.device,
        "precision": config.hardware.precision,
        "micro_batch": config.hardware.micro_batch,
        "parameters": made.parameters,
        "flops_per_token": made.flops_per_token,
        "batch_tokens": config.trainer.batch_tokens,
        "steps": made.steps,
        "tokens": made.tokens,
        "epochs": made.epochs,
        "flops": None if made.tokens is None else made.tokens * made.flops_per_token,
        "memory": asdict(made.memory),
        "available_bytes": made.available,
        "fits": made.fits,
        "would_fit": None if made.advice is None else {"overrides": made.advice.overrides, "bytes": made.advice.memory.total},
        "seconds": None if seconds is None else asdict(seconds) | {"total": seconds.total},
    }
    if price is not None and seconds is not None:
        found["cost"] = price.amount * seconds.total / 3600
    return found


def _show(made: Forecast, price: Price | None) -> None:
    config, memory, seconds = made.config, made.memory, made.seconds
    hardware = config.hardware
    say(f"{config.name or 'this run'}: {made.device}, {hardware.precision}, batches of {_batches(made)}")
    total = made.parameters["total"]
    rows = [(part, f"{count:,}", f"{100 * count / total:.1f}") for part, count in _parts(made).items()]
    _table(("parameters", "", "%"), rows, ("together", f"{total:,}", "100.0"))
    if (active := made.parameters["active"]) != total:
        say(f"a token goes through {active:,} of them, {100 * active / total:.0f} %")
    if made.tied:
        say("the head is the token embedding")
    work = f"{made.flops_per_token / 1e6:,.1f} MFLOP a token"
    if made.steps is not None and made.tokens is not None:
        work += f", {made.steps:,} steps, {made.tokens:,} tokens ({_epochs(made)}), {_engineering(made.tokens * made.flops_per_token)}FLOP"
    say(work)
    held = [("weights", memory.weights), ("gradients", memory.gradients), ("optimizer state", memory.optimizer)]
    held += [("activations and temporaries", memory.activations), ("logits and loss", memory.logits)]
    held += [("a checkpoint's copy", memory.copies)] if memory.copies else []
    held += [("Python and libraries" if hardware.device == "cpu" else "cuBLAS workspace", memory.process)]
    held += [("gaps and libraries' buffers", memory.gaps)] if memory.gaps else []
    _table(
        (f"memory at its peak, {_MOMENTS[memory.moment]}", "GB", "%"),
        [(n, f"{b / 1e9:.3f}", f"{100 * b / memory.total:.1f}") for n, b in held],
        ("together", f"{memory.total / 1e9:.3f}", "100.0"),
    )
    _verdict(made)
    if seconds is None:
        return
    parts = [(f"{made.steps:,} steps of {duration(seconds.step)}", seconds.training), ("evaluations", seconds.evaluation)]
    parts += [("samples", seconds.samples), ("checkpoints", seconds.checkpoints)]
    _table(
        ("time", "", "%"),
        [(n, duration(s), f"{100 * s / seconds.total:.1f}") for n, s in parts],
        ("together", duration(seconds.total), "100.0"),
    )
    say((f"steps: {seconds.by}; the rest is estimated", "dim"))
    if price is not None:
        say(f"cost: {price.of(seconds.total)} at {price.of(3600)} an hour")


def _parts(made: Forecast) -> dict[str, int]:
    return {part: count for part, count in made.parameters.items() if part not in ("total", "active")}


def _batches(made: Forecast) -> str:
    config = made.config
    tokens, micro, context = int(config.trainer.batch_tokens), int(config.hardware.micro_batch), config.model.context_length
    split = tokens // context // micro
    return f"{tokens:,} tokens" + (f" in {split} micro-batches of {micro} x {context}" if split > 1 else f" ({micro} x {context} at once)")


def _epochs(made: Forecast) -> str:
    if made.epochs is None:
        return "epochs not known"
    return f"{made.epochs:,.2f} epochs" if made.epochs < 100 else f"{made.epochs:,.0f} epochs"


def _verdict(made: Forecast) -> None:
    needed, has = f"{made.memory.total / 1e9:.1f}", f"{made.available / 1e9:.1f} GB"
    if not made.available:
        say(f"it needs {needed} GB; how much memory there is, is not known")
    elif made.fits:
        say((f"fits: {needed} of {has}", "green"))
    else:
        say((f"does not fit: {needed} GB, and of {has} a run may count on {made.room / 1e9:.1f}", "red"))
        if made.advice is None:
            say("nothing here makes it fit: take a smaller model.width, model.depth or model.context_length, or hardware/strategy=fsdp")
        else:
            say(f"would fit, with {made.advice.memory.total / 1e9:.1f} GB: {' '.join(made.advice.overrides)}")


def _show_sweep(found: Sequence[Point], forecasts: Sequence[Forecast], price: Price | None) -> None:
    first = forecasts[0]
    formats = dict.fromkeys(made.config.hardware.precision for made in forecasts)
    say(f"{len(found)} runs: {first.device}, {' and '.join(formats)}")
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("run", overflow="fold")
    for name in ("parameters", "memory GB", "time", *(["cost"] if price else [])):
        shown.add_column(name, justify="right", no_wrap=True)
    for point, made in zip(found, forecasts, strict=True):
        seconds = made.seconds
        row = [name_of(point.chosen), f"{made.parameters['total']:,}", f"{made.memory.total / 1e9:.2f}{'' if made.fits else ' !'}"]
        row.append("?" if seconds is None else duration(seconds.total))
        shown.add_row(*row, *([] if price is None else ["?" if seconds is None else price.of(seconds.total)]))
    known = [made.seconds.total for made in forecasts if made.seconds is not None]
    shown.add_section()
    most = max(made.memory.total for made in forecasts)
    shown.add_row("together", "", f"at most {most / 1e9:.2f}", duration(sum(known)), *([] if price is None else [price.of(sum(known))]))
    console.print(shown)
    poor = next((made for made in forecasts if not made.fits), None)
    _verdict(poor or max(forecasts, key=lambda made: made.memory.total))
    if first.seconds is not None:
        say((f"steps: {first.seconds.by}; the rest is estimated; runs that differ in their seed alone are forecast once", "dim"))


def _measured(made: Forecast, *, as_json: bool) -> None:
    """Train a few steps in a process of their own, and print the forecast of just these beside what they took."""
    if made.seconds is None:
        raise ConfigError("--measure: this run is not forecast to fit, so it is not tried; the plan without --measure says what would")
    step = made.seconds.step
    if step > LONGEST_MEASURED:
        raise ConfigError(f"--measure: a step takes {duration(step)} here; try a smaller trainer.batch_tokens")
    steps = min(MEASURED_STEPS[1], max(MEASURED_STEPS[0], round(MEASURED_SECONDS / step)))
    config = _shortened(made.config, steps)
    predicted = forecast_memory(config, _vocabulary(made), process=made.memory.process)
    with tempfile.TemporaryDirectory(prefix="gptlab-plan-") as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(codec.to_json(config)), encoding="utf-8")
        command = [sys.executable, "-m", "gptlab.cli.plan", str(file)]
        environment = {**os.environ, "GPTLAB_RUNS": str(Path(folder) / "runs")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GptlabError(f"--measure: the run failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        run = Run(next((Path(folder) / "runs").glob("*/*/done.json")).parent)
        summary = cast(dict[str, Any], run.read("done.json"))["summary"]
        seconds = [float(m["seconds"]) for m in run.metrics() if "train/loss" in m]
    each = [after - before for before, after in itertools.pairwise(seconds[1:])]  # the first two allocate
    measured = {"memory": float(summary["memory/peak_bytes"]), "step": statistics.median(each)}
    expected = {"memory": float(predicted.total), "step": step}
    if as_json:
        print(json.dumps({"steps": steps, "predicted": expected, "measured": measured}, indent=1))
        return
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column(f"{steps} steps", min_width=20)
    for name in ("predicted", "measured", "off by"):
        shown.add_column(name, justify="right", min_width=10)
    forms: dict[str, tuple[str, Callable[[float], str]]] = {
        "memory": ("peak memory, GB", lambda b: f"{b / 1e9:.3f}"),
        "step": ("a step, ms", lambda s: f"{1000 * s:,.1f}"),
    }
    for key, (title, form) in forms.items():
        off = expected[key] / measured[key] - 1
        shown.add_row(title, form(expected[key]), form(measured[key]), f"{100 * off:+.1f} %")
    console.print(shown)


def _vocabulary(made: Forecast) -> int:
    data = _data(made.config)
    if data is None:
        raise ConfigError(
            "--measure trains on the data, which are not prepared; prepare them first: `gptlab data prepare` with the same overrides"
        )
    return data.vocabulary


def _shortened(config: Config, steps: int) -> Config:
    """The run cut short: evaluated (on one batch) and saved half-way too, so that all that a run ever holds is held."""
    callbacks = {
        key: replace(cast(Any, options), every=steps // 2) if component_of(options).name in ("evaluation", "checkpoint") else options
        for key, options in config.callbacks.items()
        if component_of(options).name != "samples"
    }
    tokens = min(config.data.validation_tokens or EVALUATION_TOKENS, max(EVALUATION_TOKENS, config.model.context_length))
    return replace(
        config,
        callbacks=cast(dict[str, Callback], callbacks),
        data=replace(config.data, validation_tokens=tokens),
        tracker=cast(Tracker, component("tracker", "none").options()),
        trainer=replace(config.trainer, budget=f"{steps}steps", log_every=1, start="", profile="", mirror="", time_limit=""),
    )


def _table(titles: tuple[str, str, str], rows: Sequence[tuple[str, str, str]], last: tuple[str, str, str]) -> None:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column(titles[0], min_width=30)
    for title in titles[1:]:
        shown.add_column(title, justify="right", min_width=12 if title != "%" else 6)
    for row in rows:
        shown.add_row(*row)
    shown.add_section()
    shown.add_row(*last)
    console.print(shown)


def _engineering(value: float) -> str:
    """A number with a prefix of a thousand: `8.6 E`."""
    power = min(7, max(0, (len(f"{value:.0f}") - 1) // 3))
    return f"{value / 1000**power:,.1f} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}"


def duration(seconds: float) -> str:
    """`12 ms`, `3.4 s`, `12 min`, `2.5 h`."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.001 or not seconds else "1 ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


if __name__ == "__main__":
    prepare()
    train(codec.from_json(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[1]))
