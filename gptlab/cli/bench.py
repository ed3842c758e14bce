"""`gptlab bench train`: our training step on this machine and its parts, in turn with it that of a nanoGPT checkout the user names."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich import box
from rich.table import Table

from gptlab.cli.bench_parts import breakdown
from gptlab.cli.bench_parts import show as show_parts
from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, component_of
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config
from gptlab.config.slots import Tracker
from gptlab.config.sweep import points
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.hardware.device import machine
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from gptlab.tracker.console import RunProgress, console, say
from gptlab.tracker.jsonl import MetricsFile
from gptlab.tracker.protocol import RunInfo

# nanoGPT's two published character settings: the README's CPU one, and config/train_shakespeare_char.py's.
SETTINGS = {
    "nano": ("trainer.batch_tokens=768", "model.bias=false", "model/ffn=gelu_exact"),
    "char": ("trainer.batch_tokens=16384", "model/ffn=gelu_exact"),
}
ROUND_SECONDS, ALONE_SECONDS, WARMUP_STEPS = 3.0, 2.0, 3  # of a round, beside nanoGPT and without it
TRACKED_STEPS = 200, 20  # of a small model, and of one above LARGE parameters
LARGE = 2_000_000
BUDGET = "1000000steps"  # so many that no schedule ends while its steps are timed


def train(against: Path | None, *, overrides: Sequence[str] = (), model: str | None = None, rounds: int = 7, as_json: bool = False) -> None:
    """Time steps of ours and of nanoGPT's model in nanoGPT's loop, round by round in turn; print medians, their ratio, our step's parts.

    `overrides` are those of `gptlab train`; of a sweep the first point is timed.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} must be at least 1")
    name, settings, note = _settings(overrides, model)
    composed = compose(settings)
    base = replace(composed, tracker=_tracker("none"), trainer=replace(composed.trainer, budget=BUDGET))
    data = prepare(base.data)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptlab-bench-"))
        # The bare step has none of the callbacks, but for one that averages the weights after each update: that is part of a recipe.
        averaging = {k: v for k, v in base.callbacks.items() if getattr(component_of(v).factory, "makes_average", False)}
        config = resolve(replace(base, callbacks=averaging), machine())
        trainer = Trainer(config, data, Run(Path(folder)))
        steps = _ours(trainer)
        ours = f"gptlab {config.hardware.precision}"
        steppers: dict[str, Callable[[int], float]] = {ours: steps}
        if against is not None:
            for precision in _precisions(config):
                steppers[f"nanoGPT {precision}"] = stack.enter_context(_nanogpt(against, config, data, precision))
        times = _alternate(steppers, rounds, ALONE_SECONDS if against is None else ROUND_SECONDS)
        report: dict[str, Any] = {
            "model": name,
            "settings": settings,
            "note": note,
            "device": str(trainer.device),
            "threads": torch.get_num_threads(),
            "tokens_per_step": trainer.batch_tokens,
            "parameters": trainer.parameters,
            "step_ms": {name: 1000 * statistics.median(found) for name, found in times.items()},
            "tokens_per_second": {name: trainer.batch_tokens / statistics.median(found) for name, found in times.items()},
        }
        if against is not None:
            report["ratio"] = _ratio(times)
        report["breakdown"] = breakdown(trainer, steps)
        report["tracking_share"] = _tracking_share(base, data, Path(folder), trainer)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    _show(report)
    show_parts(report["breakdown"], report["tokens_per_second"][ours])


def _settings(overrides: Sequence[str], model: str | None) -> tuple[str, list[str], str]:
    """What is timed, the overrides that make it, and a note for the user. Raises ConfigError where there is no one setting to time.

    Beside a recipe that nanoGPT publishes a setting for, that setting comes first and what the user gives wins.
    """
    chosen = {key: value for key, _, value in (o.partition("=") for o in overrides) if key in ("model", "experiment")}
    if model is not None and chosen.get("model", model) != model:
        raise ConfigError(f"--model {model} and model={chosen['model']} differ; give one of them")
    wanted = chosen.get("model", model)
    if "experiment" in chosen:
        name, settings = f"experiment={chosen['experiment']}", [*([f"model={wanted}"] if wanted else []), *overrides]
    else:
        name = wanted or "nano"
        settings = [f"model={name}", *SETTINGS.get(name, ()), *overrides]
    first = points(settings, what="bench train times one setting")[0]
    return name, first.overrides, f"of a sweep its first point is timed: {' '.join(first.chosen)}" if first.chosen else ""


def _tracker(name: str) -> Tracker:
    return cast(Tracker, component("tracker", name).options())


def _precisions(config: Config) -> tuple[str, ...]:
    """nanoGPT's on a GPU is ours; on the CPU it has fp32, and where ours is bf16 its autocast is timed too."""
    own = config.hardware.precision
    return ("fp32", "bf16") if config.hardware.device == "cpu" and own == "bf16" else (own,)


def _ours(trainer: Trainer) -> Callable[[int], float]:
    trainer.model.train()
    for callback in trainer.callbacks:
        callback.on_start(trainer)

    def steps(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            trainer.train_step(trainer.loader.batch(trainer.state.step))
            trainer.state.step += 1
        return time.perf_counter() - started

    return steps


@contextlib.contextmanager
def _nanogpt(folder: Path, config: Config, data: Prepared, precision: str) -> Iterator[Callable[[int], float]]:
    """nanoGPT in a process of its own, as its users run it: a function from a number of steps to their seconds."""
    if not (folder / "model.py").is_file():
        raise ConfigError(f"--against {folder}: it holds no model.py; give a nanoGPT checkout")
    size, shards = config.model, data.manifest.get("splits", {}).get("train", {}).get("shards")
    if not shards:
        raise ConfigError("--against: nanoGPT reads one file, and this training text is a stream, a mix or made up; try data=text")
    vocabulary = data.manifest["tokenizer"]["vocabulary"]
    assert isinstance(config.trainer.batch_tokens, int)
    job = {
        "folder": str(folder.resolve()),
        "device": config.hardware.device,
        "precision": precision,
        "compile": config.hardware.compile,
        "tokens": str(data.folder / shards[0]["file"]),
        "dtype": data.manifest["dtype"],
        "rows": config.hardware.micro_batch,
        "micro_batches": config.trainer.batch_tokens // size.context_length // int(config.hardware.micro_batch),
        "model": {
            "block_size": size.context_length,
            "vocab_size": 50_304 if vocabulary == 50_257 else vocabulary,  # it pads GPT-2's
            "n_layer": size.depth,
            "n_head": size.heads,
            "n_embd": size.width,
            "dropout": size.dropout,
            "bias": size.bias,
        },
    }
    command = [sys.executable, "-m", "gptlab.cli.bench_peer", json.dumps(job)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        to, answers = process.stdin, process.stdout
        assert to is not None
        assert answers is not None

        def steps(count: int) -> float:
            to.write(f"{count}\n")
            to.flush()
            line = answers.readline()
            if not line:
                raise ConfigError(f"--against {folder}: its model could not be trained; its error stands above")
            return float(line)

        yield steps
        to.close()


def _alternate(steppers: dict[str, Callable[[int], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a step of each, measured in turn: what disturbs the machine disturbs all alike."""
    counts: dict[str, int] = {}
    for name, steps in steppers.items():
        steps(WARMUP_STEPS)
        counts[name] = max(1, round(seconds / steps(1)))
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, steps in steppers.items():
            times[name].append(steps(counts[name]) / counts[name])
    return times


def _ratio(times: dict[str, list[float]]) -> dict[str, float]:
    """Our tokens/s over nanoGPT's, round by round; the median, against nanoGPT's better precision."""
    ours = next(found for name, found in times.items() if name.startswith("gptlab"))
    theirs = min((found for name, found in times.items() if name.startswith("nanoGPT")), key=statistics.median)
    pairs = sorted(t / o for t, o in zip(theirs, ours, strict=True))
    return {"median": statistics.median(pairs), "lowest": pairs[0], "highest": pairs[-1]}


def _tracking_share(base: Config, data: Prepared, folder: Path, bare: Trainer) -> float:
    """Share of a step's time that metrics, W&B's offline files, progress and callbacks add to the bare step."""
    from gptlab.config import codec

    steps = TRACKED_STEPS[bare.parameters > LARGE]
    callbacks = {k: v for k, v in base.callbacks.items() if k != "evaluation" and k != "samples"}
    limited = replace(base.trainer, budget=f"{steps}steps")
    config = resolve(replace(base, trainer=limited, callbacks=callbacks, tracker=_tracker("offline")), machine())
    trainer = Trainer(config, data, Run(folder))
    saving = [0.0]
    keep = trainer.save_checkpoint

    def save() -> None:  # the final checkpoint is paid once a run, not at each step
        started = time.perf_counter()
        keep()
        saving[0] += time.perf_counter() - started

    trainer.save_checkpoint = save  # type: ignore[method-assign]
    tracker = build(config.tracker)
    tracker.start(RunInfo("bench", "bench", "bench", folder, codec.flatten(config), -1))
    with RunProgress("bench", steps) as progress:
        started = time.perf_counter()
        trainer.train(MetricsFile(folder / "metrics.jsonl", 0), tracker, progress)
        wall = time.perf_counter() - started - saving[0]
    tracker.finish({}, 0)
    state = trainer.state  # the first steps, which may compile, are left out of the timed ones
    return (wall - state.seconds) / steps / (state.timed_seconds * trainer.batch_tokens / state.timed_tokens)


def _show(report: dict[str, Any]) -> None:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "ms a step", "tokens/s"):
        shown.add_column(name, justify="left" if not name else "right")
    for name, milliseconds in report["step_ms"].items():
        shown.add_row(name, f"{milliseconds:.1f}", f"{report['tokens_per_second'][name]:,.0f}")
    say(
        f"{report['model']}: {report['parameters']:,} parameters, {report['tokens_per_step']:,} tokens a step, "
        f"{report['device']}, {report['threads']} threads"
    )
    if report["note"]:
        say(report["note"])
    console.print(shown)
    if "ratio" in report:
        ratio = report["ratio"]
        say(f"gptlab makes {ratio['median']:.2f} times nanoGPT's tokens/s ({ratio['lowest']:.2f} to {ratio['highest']:.2f} round by round)")
    say(f"metrics, W&B offline, progress and callbacks add {100 * report['tracking_share']:.1f} % to a step")
