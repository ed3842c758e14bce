"""`gptlab bench train`: our training step on this machine, and in turn with it that of a nanoGPT checkout the user names."""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config
from gptlab.data.shard import Prepared, prepare
from gptlab.hardware.device import machine, set_up, synchronise
from gptlab.hardware.precision import autocast
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
ROUND_SECONDS = 3.0


def train(against: Path | None, *, model: str, rounds: int, as_json: bool) -> None:
    """Time steps of ours (and of nanoGPT's model in nanoGPT's loop) round by round in turn, and print medians and their ratio."""
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} must be at least 1")
    overrides = [f"model={model}", *SETTINGS.get(model, ()), "tracker=none", "trainer.budget=1000000steps"]
    base = compose(overrides)
    data = prepare(base.data)
    with tempfile.TemporaryDirectory(prefix="gptlab-bench-") as folder:
        config = resolve(base, machine())
        trainer = Trainer(config, data, Run(Path(folder)))
        steppers: dict[str, Callable[[], object]] = {f"gptlab {config.hardware.precision}": _ours(trainer)}
        if against is not None:
            for precision in ("fp32", "bf16") if config.hardware.precision == "bf16" else ("fp32",):
                steppers[f"nanoGPT {precision}"] = _nanogpt(against, config, data, precision)
        times = _alternate(steppers, rounds, trainer.device)
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


def _ours(trainer: Trainer) -> Callable[[], object]:
    trainer.model.train()

    def step() -> None:
        trainer.train_step()
        trainer.state.step += 1

    return step


def _nanogpt(folder: Path, config: Config, data: Prepared, precision: str) -> Callable[[], object]:
    """One iteration of nanoGPT's training loop (its train.py): its model, its optimizer, its way of drawing a batch."""
    source = _load(folder)
    size, device = config.model, torch.device(config.hardware.device)
    assert isinstance(config.trainer.batch_tokens, int)
    arguments = source.GPTConfig(
        block_size=size.context_length,
        vocab_size=data.manifest["tokenizer"]["vocabulary"],
        n_layer=size.depth,
        n_head=size.heads,
        n_embd=size.width,
        dropout=size.dropout,
        bias=size.bias,
    )
    model = source.GPT(arguments).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    rows, context = config.trainer.batch_tokens // size.context_length, size.context_length
    file = data.folder / data.manifest["splits"]["train"]["shards"][0]["file"]

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = np.memmap(file, np.dtype(data.manifest["dtype"]), "r")
        starts = torch.randint(len(tokens) - context, (rows,)).tolist()
        pairs = [torch.from_numpy(tokens[s : s + context + 1].astype(np.int64)) for s in starts]
        return torch.stack([p[:-1] for p in pairs]).to(device), torch.stack([p[1:] for p in pairs]).to(device)

    waiting = draw()

    def step() -> None:
        nonlocal waiting
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        with autocast(device, precision):
            _, loss = model(*waiting)
        waiting = draw()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def _load(folder: Path) -> ModuleType:
    file = folder / "model.py"
    if not file.is_file():
        raise ConfigError(f"--against {folder}: it holds no model.py; give a nanoGPT checkout")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _alternate(steppers: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step of each, measured in turn: what disturbs the machine disturbs all alike."""
    counts: dict[str, int] = {}
    for name, step in steppers.items():
        for _ in range(3):
            step()
        started = time.perf_counter()
        step()
        synchronise(device)
        counts[name] = max(1, round(ROUND_SECONDS / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, step in steppers.items():
            started = time.perf_counter()
            for _ in range(counts[name]):
                step()
            synchronise(device)
            times[name].append((time.perf_counter() - started) / counts[name])
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
    config = resolve(
        replace(composed, trainer=replace(composed.trainer, budget=f"{steps}steps"), callbacks=callbacks), machine()
    )
    set_up(config.hardware)
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
