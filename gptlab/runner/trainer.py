"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError, DataError, DivergedError, IOFailure, Stopped
from gptlab.config.registry import build
from gptlab.config.resolve import parse_budget
from gptlab.config.schema import Config
from gptlab.data.loader import Batch, Loader
from gptlab.data.prepared import Prepared
from gptlab.data.sources import training_rows
from gptlab.hardware.device import set_up, synchronise
from gptlab.hardware.precision import autocast, scaler
from gptlab.model.transformer import Transformer, count_parameters, flops_per_token, new_model
from gptlab.optimizer.groups import parameter_groups
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.run import Run
from gptlab.tracker.console import RunProgress
from gptlab.tracker.jsonl import MetricsFile
from gptlab.tracker.protocol import Metrics, Tracker

WARMUP_STEPS = 10  # left out of tokens_per_second: first steps allocate, tune and compile
UNKNOWN_STEPS = 1e12  # of a run by the clock, before its first step: far from any decay


@dataclass
class State:
    """How far a run is. `seconds` are spent in training steps alone, `wall` counts everything."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wall: float = 0.0
    timed_tokens: int = 0  # tokens and seconds after the warm-up of each session
    timed_seconds: float = 0.0


class Trainer:
    """Trains one resolved config. `callbacks` do everything that is not a step: evaluation, checkpoints, samples, throughput."""

    def __init__(self, config: Config, data: Prepared, run: Run) -> None:
        self.config, self.data, self.run = config, data, run
        self.device = set_up(config.hardware)
        seeds, context = config.seeds, config.model.context_length
        self.batch_tokens, self.micro_batch = int(config.trainer.batch_tokens), int(config.hardware.micro_batch)
        init_seed, data_seed, dropout_seed = (int(s or 0) for s in (seeds.init, seeds.data, seeds.dropout))
        model = new_model(config.model, data.vocabulary, init_seed)
        source = training_rows(data, context, config.data.packing, data_seed)
        self.loader = Loader(source, self.batch_tokens // context, documents=model.sees_documents)
        self.model: Transformer = build(config.hardware.strategy).place(model, self.device)
        self.optimizer: torch.optim.Optimizer = build(
            config.optimizer, groups=parameter_groups(self.model, self.model.roles()), device=self.device
        )
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.schedule = build(config.schedule)
        self.objective = build(config.objective)
        self.scaler = scaler(self.device, config.hardware.precision)
        self.flops_per_token = flops_per_token(self.model)
        self.parameters = count_parameters(self.model)["total"]
        budget = parse_budget(config.trainer.budget)
        if budget.unit == "epochs" and self.loader.endless:
            raise ConfigError(
                f"trainer.budget={config.trainer.budget}: this text has no known end; give data.corpus.tokens, or a budget in tokens"
            )
        self.time_limit = 60 * budget.amount if budget.unit == "min" else math.inf
        self.steps = budget.steps(
            batch_tokens=self.batch_tokens,
            epoch_tokens=self.loader.epoch_tokens if budget.unit == "epochs" else 0,
            parameters=self.parameters,
            flops_per_token=self.flops_per_token,
        )
        self.callbacks: list[Callback] = [build(options) for options in config.callbacks.values()]
        self.forward: Callable[[Batch], Tensor] = torch.compile(self._forward) if config.hardware.compile else self._forward
        self.state = State()
        self.latest: Metrics = {}  # the newest value of everything measured
        self._stop: int | None = None
        self._waiting = False  # for text, where a signal need not wait for the step's end
        self._sinks: tuple[Callable[[Metrics], None], ...] = ()
        torch.manual_seed(dropout_seed)

    def train(self, metrics: MetricsFile, tracker: Tracker, progress: RunProgress) -> None:
        """Run to the end of the budget. Raises Stopped after a signal (with a checkpoint), DivergedError on a loss that is not finite."""
        self._sinks = (metrics.write, tracker.log, progress.update)
        started, wall = time.perf_counter(), self.state.wall
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)} if _in_main_thread() else {}
        self.model.train()
        session_start = self.state.step
        try:
            self._each("on_start")
            while not self.finished:
                before = time.perf_counter()
                try:
                    batch = self._next_batch()
                except (DataError, IOFailure, _Waiting):  # there is no text now; nothing of this step was done
                    self._leave() if self._stop is not None else self.save_checkpoint()
                    raise
                measured = self.train_step(batch)
                seconds = time.perf_counter() - before
                self.state.step += 1
                self.state.tokens += self.batch_tokens
                self.state.seconds += seconds
                self.state.wall = wall + time.perf_counter() - started
                if self.state.step - session_start > WARMUP_STEPS:
                    self.state.timed_tokens += self.batch_tokens
                    self.state.timed_seconds += seconds
                if self.state.step % self.config.trainer.log_every == 0 or self.finished:
                    self.record(measured)
                self._each("on_step")
                if self._stop is not None:
                    self._leave()
            self.state.wall = wall + time.perf_counter() - started
            self._each("on_end")
            self.state.wall = wall + time.perf_counter() - started
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.state.step >= self.steps if self.steps is not None else self.state.seconds >= self.time_limit

    @property
    def total_steps(self) -> float:
        """Steps of the whole run; where time is the budget, estimated from the steps so far."""
        if self.steps is not None:
            return self.steps
        share = self.state.seconds / self.time_limit
        return self.state.step / share if share > 0 else UNKNOWN_STEPS

    def _next_batch(self) -> Batch:
        """The batch of this step; of a stream it may have to be waited for, and a signal ends the waiting."""
        self._waiting = True
        try:
            return self.loader.batch(self.state.step)
        finally:
            self._waiting = False

    def _leave(self) -> NoReturn:
        assert self._stop is not None
        self.save_checkpoint()
        raise Stopped(f"stopped at step {self.state.step} by {signal.Signals(self._stop).name}; the same command resumes it")

    def train_step(self, batch: Batch) -> Metrics:
        """One update. The loss is normalised by the whole batch's token weight, whatever the split into micro-batches.

        Raises DivergedError before a loss or gradient that is not finite can touch the weights.
        """
        weight = float(batch.targets.numel() if batch.weight is None else batch.weight.sum())
        total = torch.zeros((), device=self.device)
        for part in batch.split(self.micro_batch):
            with autocast(self.device, self.config.hardware.precision):
                loss = self.forward(part.to(self.device)) / weight
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        clip = self.config.trainer.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip if clip > 0 else math.inf)
        loss_value, norm_value = total.item(), norm.item()
        # A scaled fp16 gradient may overflow: the scaler then skips the update itself.
        if not math.isfinite(loss_value) or not (math.isfinite(norm_value) or self.scaler.is_enabled()):
            what = f"the loss is {loss_value}" if not math.isfinite(loss_value) else f"the gradient norm is {norm_value}"
            kept = checkpoint.checkpoints(self.run.checkpoints)
            raise DivergedError(
                f"{what} at step {self.state.step + 1}; {f'{kept[0].name} is kept' if kept else 'no checkpoint had been saved yet'}; "
                "a lower optimizer.learning_rate or a longer schedule.warmup would help"
            )
        factor = self.schedule(self.state.step, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        synchronise(self.device)
        return {"train/loss": loss_value, "train/learning_rate": self.rates[0] * factor, "train/gradient_norm": norm_value}

    def _forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.objective(self.model, batch)
        return loss

    def record(self, measured: Metrics) -> None:
        """Write what was measured at this step to metrics.jsonl, the tracker and the terminal."""
        state = self.state
        line: Metrics = {
            "step": state.step,
            "tokens": state.tokens,
            "flops": state.tokens * self.flops_per_token,
            "seconds": round(state.seconds, 4),
            "wall": round(state.wall, 4),
        }
        for callback in self.callbacks:
            callback.on_record(self, measured)
        line.update(measured)
        self.latest.update(line)
        for sink in self._sinks:
            sink(line)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step."""
        optimizer, tensors = checkpoint.pack_optimizer(self.optimizer)
        state: dict[str, Any] = {"state": asdict(self.state), "optimizer": optimizer, "scaler": self.scaler.state_dict()}
        checkpoint.save(self.run.checkpoints, self.state.step, self.model.state_dict(), state, tensors | checkpoint.pack_rng(self.device))

    def resume(self) -> list[str]:
        """Continue from the newest good checkpoint, if there is one. Returns what was wrong with newer ones."""
        complaints: list[str] = []
        found = checkpoint.newest_good(self.run.checkpoints, complaints)
        if found is not None:
            state, tensors = checkpoint.load_state(found)
            self.model.load_state_dict(checkpoint.load_model(found))
            checkpoint.unpack_optimizer(self.optimizer, state["optimizer"], tensors)
            self.scaler.load_state_dict(state["scaler"]) if state["scaler"] else None
            checkpoint.unpack_rng(tensors, self.device)
            self.state = State(**state["state"])
        return complaints

    def _each(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:  # a second signal leaves at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._stop = number
        if self._waiting:
            raise _Waiting


class _Waiting(Exception):
    """A signal came while the next batch was waited for."""


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
