"""`gptlab bench train`: our training step on this machine, and in turn with it that of a nanoGPT checkout the user names."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config
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
ROUND_SECONDS, WARMUP_STEPS = 3.0, 3


def train(against: Path | None, *, model: str, rounds: int, as_json: bool) -> None:
    """Time steps of ours (and of nanoGPT's model in nanoGPT's loop) round by round in turn, and print medians and their ratio."""
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} must be at least 1")
    overrides = [f"model={model}", *SETTINGS.get(model, ()), "tracker=none", "trainer.budget=1000000steps"]
    base = compose(overrides)
    data = prepare(base.data)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptlab-bench-"))
        config = resolve(base, machine())
        trainer = Trainer(config, data, Run(Path(folder)))
        steppers: dict[str, Callable[[int], float]] = {f"gptlab {config.hardware.precision}": _ours(trainer)}
        if against is not None:
            for precision in ("fp32", "bf16") if config.hardware.precision == "bf16" else ("fp32",):
                steppers[f"nanoGPT {precision}"] = stack.enter_context(_nanogpt(against, config, data, precision))
        times = _alternate(steppers, rounds)
        report: dict[str, Any] = {
            "model": model,
            "settings": overrides,
            "device": str(trainer.device),
            "threads": torch.get_num_threads(),
            "tokens_per_step": trainer.batch_tokens,
            "parameters": trainer.parameters,
            "step_ms": {name: 1000 * statistics.median(found) for name, found in times.items()},
            "tokens_per_second": {name: trainer.batch_tokens / statistics.median(found) for name, found in times.items()},
        }
        if against is not None:
            report["ratio"] = _ratio(times)
        report["tracking_share"] = _tracking_share(compose([*overrides, "tracker=offline"]), data, Path(folder), trainer)
    print(json.dumps(report, indent=1)) if as_json else _show(report)


def _ours(trainer: Trainer) -> Callable[[int], float]:
    trainer.model.train()

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
    size, shard = config.model, data.manifest["splits"]["train"]["shards"][0]
    assert isinstance(config.trainer.batch_tokens, int)
    job = {
        "folder": str(folder.resolve()),
        "device": config.hardware.device,
        "precision": precision,
        "tokens": str(data.folder / shard["file"]),
        "dtype": data.manifest["dtype"],
        "rows": config.trainer.batch_tokens // size.context_length,
        "model": {
            "block_size": size.context_length,
            "vocab_size": data.manifest["tokenizer"]["vocabulary"],
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


def _alternate(steppers: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each, measured in turn: what disturbs the machine disturbs all alike."""
    counts: dict[str, int] = {}
    for name, steps in steppers.items():
        steps(WARMUP_STEPS)
        counts[name] = max(1, round(ROUND_SECONDS / steps(1)))
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


def _tracking_share(composed: Config, data: Prepared, folder: Path, bare: Trainer) -> float:
    """Share of a step's time that metrics, W&B's offline files, progress and callbacks add to the bare step."""
    from gptlab.config import codec

    steps = 200 if bare.parameters < 2_000_000 else 20
    callbacks = {k: v for k, v in composed.callbacks.items() if k != "evaluation" and k != "samples"}
    config = resolve(replace(composed, trainer=replace(composed.trainer, budget=f"{steps}steps"), callbacks=callbacks), machine())
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
    return (wall - trainer.state.seconds) / trainer.state.seconds


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
    console.print(shown)
    if "ratio" in report:
        ratio = report["ratio"]
        say(f"gptlab makes {ratio['median']:.2f} times nanoGPT's tokens/s ({ratio['lowest']:.2f} to {ratio['highest']:.2f} round by round)")
    say(f"metrics, W&B offline, progress and callbacks add {100 * report['tracking_share']:.1f} % to a step")
