"""`gptlab bench checkpoint`: what a checkpoint costs a training, what a resume costs a start, what the guards cost a step."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from gptlab.config.compose import compose
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.hardware.device import machine
from gptlab.runner.resume import resume
from gptlab.runner.run import Run, make_directory
from gptlab.runner.state import seed_step
from gptlab.runner.trainer import Trainer
from gptlab.tracker.console import say

T = TypeVar("T")
GUARD_CALLS = 300


def checkpoint(model: str, *, rounds: int, as_json: bool) -> None:
    """Time steps alone and beside a checkpoint's writing, the stall of a save, a fresh start and a resume."""
    composed = compose([f"model={model}", "data=pydocs", "data/tokenizer=char", "tracker=none", "trainer.budget=1000steps"])
    context = composed.model.context_length
    # GPT-2's vocabulary in size alone: what is trained on does not matter here, how many weights there are does.
    padded = replace(composed.model, pad_vocab_to=50_304) if model.startswith("gpt2") else composed.model
    rows = 1 if model.startswith("gpt2") else 12
    config = resolve(replace(composed, model=padded, trainer=replace(composed.trainer, batch_tokens=rows * context)), machine())
    data = prepare(config.data)
    with tempfile.TemporaryDirectory(prefix="gptlab-bench-") as folder:
        run = Run(Path(folder) / "bench")
        make_directory(run)
        found = _measured(config, data, run, rounds)
    report = {"model": model, "settings": {"batch_tokens": config.trainer.batch_tokens, "precision": config.hardware.precision}, **found}
    print(json.dumps(report, indent=1)) if as_json else _show(report)


def _measured(config: Config, data: Prepared, run: Run, rounds: int) -> dict[str, Any]:
    def built() -> Trainer:
        made = Trainer(config, data, run)
        made.loader.batch(0)
        return made

    fresh, trainer = _timed(built)
    trainer.model.train()

    def step(trainer: Trainer = trainer) -> None:
        trainer.train_step(trainer.loader.batch(trainer.state.batch))
        trainer.state.step += 1
        trainer.state.batch += 1

    step()  # allocates
    stalls, writes, alone, beside = list[float](), list[float](), list[float](), list[float]()
    for _ in range(rounds):
        alone += [_timed(step)[0] for _ in range(3)]
        started = time.perf_counter()
        stalls.append(_timed(trainer.save_checkpoint)[0])
        writing = trainer.writer
        while writing.busy:
            beside.append(_timed(step)[0])
        writing.wait()
        writes.append(time.perf_counter() - started)
        step()
    size = sum(f.stat().st_size for f in next(iter(run.checkpoints.iterdir())).iterdir())
    trainer.writer.background = False
    waiting = _timed(trainer.save_checkpoint)[0]
    guards = _guards(trainer)
    parameters = trainer.parameters
    del trainer, step

    def resumed() -> Trainer:
        made = Trainer(config, data, run)
        resume(made)
        made.loader.batch(made.state.batch)
        return made

    again = min(_timed(resumed)[0] for _ in range(2))
    fresh = min(fresh, _timed(built)[0])
    step_seconds = statistics.median(alone)
    return {
        "parameters": parameters,
        "bytes": size,
        "threads": torch.get_num_threads(),
        "step_seconds": step_seconds,
        "stall_seconds": {"first": stalls[0], "later": statistics.median(stalls[1:] or stalls)},
        "stall_in_steps": max(stalls) / step_seconds,
        "step_beside_writing_seconds": statistics.median(beside) if beside else None,
        "written_after_seconds": statistics.median(writes),
        "without_background_seconds": waiting,
        "start_seconds": fresh,
        "resume_seconds": again,
        "guards_seconds": guards,
        "guards_share": guards / step_seconds,
    }


def _guards(trainer: Trainer) -> float:
    """Seconds a step spends on seeds, signals, the finite check, the loss's statistics, and the look at the writer."""
    started = time.perf_counter()
    for _ in range(GUARD_CALLS):
        seed_step(0, trainer.state.batch, 0)
        loss, bad = trainer._exchange(2.5)
        trainer.guard.judge(loss, 1.0, bad, 1.0)
        if trainer.stop.asked or trainer.state.batch in trainer.passed or trainer._unwritten:
            break
    return (time.perf_counter() - started) / GUARD_CALLS


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def _show(report: dict[str, Any]) -> None:
    step, stall = report["step_seconds"], report["stall_seconds"]
    say(
        (report["model"], "bold"),
        f": {report['parameters']:,} parameters, {report['bytes'] / 1e6:,.0f} MB a checkpoint, "
        f"{report['settings']['batch_tokens']:,} tokens a step, {report['settings']['precision']}, {report['threads']} threads",
    )
    beside, later = report["step_beside_writing_seconds"], report["resume_seconds"] - report["start_seconds"]
    lines = (
        ("a step alone", f"{1000 * step:,.1f} ms"),
        ("a step while a checkpoint is written", f"{1000 * beside:,.1f} ms ({beside / step:.2f} times)" if beside else "(too short)"),
        ("training waits for a checkpoint", f"{1000 * stall['later']:,.1f} ms, the first time {1000 * stall['first']:,.1f} ms"),
        ("", f"at most {report['stall_in_steps']:.2f} steps"),
        ("it is durable after", f"{report['written_after_seconds']:.2f} s"),
        ("without the background it waits", f"{report['without_background_seconds']:.2f} s"),
        ("a fresh start: model and first batch", f"{report['start_seconds']:.2f} s"),
        ("a resume: checked, loaded, first batch", f"{report['resume_seconds']:.2f} s ({later:+.2f} s)"),
        ("seeds, signals, finite check, spikes", f"{1e6 * report['guards_seconds']:,.0f} µs a step ({report['guards_share']:.2%})"),
    )
    for name, value in lines:
        say(f"  {name:<40} {value}")
