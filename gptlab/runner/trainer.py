"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.config.errors import DataError, IOFailure
from gptlab.config.record import Recording
from gptlab.config.registry import build
from gptlab.config.resolve import parse_duration
from gptlab.config.schema import Config
from gptlab.data.loader import Batch, Loader
from gptlab.data.prepared import Prepared
from gptlab.data.sources import training_rows
from gptlab.hardware.device import set_up, synchronise
from gptlab.hardware.precision import autocast, in_precision, scaler
from gptlab.hardware.strategy import Strategy
from gptlab.model.transformer import Transformer, count_parameters, flops_per_token, new_model
from gptlab.objective.protocol import Objective, hooked
from gptlab.optimizer.groups import parameter_groups
from gptlab.runner import checkpoint, inherit, sharded
from gptlab.runner.averages import Averages
from gptlab.runner.callback import Callback
from gptlab.runner.guard import Guard
from gptlab.runner.length import length_of
from gptlab.runner.profile import Profile
from gptlab.runner.run import Run
from gptlab.runner.state import State, pack_optimizer, seed_step
from gptlab.runner.stop import Stop, Waiting
from gptlab.runner.writer import Writer
from gptlab.tracker.console import RunProgress
from gptlab.tracker.jsonl import MetricsFile
from gptlab.tracker.none import NoTracker
from gptlab.tracker.protocol import Metrics, Tracker

WARMUP_STEPS = 10  # left out of tokens_per_second: first steps allocate, tune and compile


class _Step(nn.Module):
    """What a strategy wraps: the loss of a micro-batch, whatever of the model an objective calls."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective(self.model, batch)


class Trainer:
    """Trains one resolved config. `callbacks` do everything that is not a step: evaluation, checkpoints, samples, throughput.

    Under torchrun every rank has a Trainer, and all make the same steps; `world.first` alone writes. `started`: when this session began.
    """

    def __init__(self, config: Config, data: Prepared, run: Run, started: float | None = None) -> None:
        self.config, self.data, self.run = config, data, run
        self.strategy: Strategy = build(config.hardware.strategy)
        self.world = self.strategy.join()
        self.device = set_up(config.hardware)
        seeds, context = config.seeds, config.model.context_length
        self.batch_tokens, self.micro_batch = int(config.trainer.batch_tokens), int(config.hardware.micro_batch)
        init_seed, data_seed, self._dropout_seed = (int(s or 0) for s in (seeds.init, seeds.data, seeds.dropout))
        model = new_model(config.model, data.vocabulary, init_seed)
        self.objective = hooked(build(config.objective))
        self.objective.check(data, config)
        source = training_rows(data, context, config.data.packing, data_seed, config.data.too_long)
        rank, ranks = self.world.rank, self.world.size
        again = self.objective.answers_problems
        self.loader = Loader(source, self.batch_tokens // context, documents=model.sees_documents, rank=rank, ranks=ranks, again=again)
        self.flops_per_token = flops_per_token(model)
        self.parameters = count_parameters(model)["total"]
        self.objective.adapt(model, init_seed, inherit.new_tokens(config, data.vocabulary))
        in_precision(model, config.hardware.precision)
        model.recompute = build(config.hardware.checkpointing)
        self.model: Transformer = self.strategy.place(model, self.device)
        self.optimizer: torch.optim.Optimizer = build(
            config.optimizer, groups=parameter_groups(self.model, self.model.roles(), self.model.widening()), device=self.device
        )
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # The rate that is shown: of the matrices, where the roles have rates of their own.
        self._shown = next((i for i, g in enumerate(self.optimizer.param_groups) if g.get("role") == "matrix"), 0)
        self.scaler = scaler(self.device, config.hardware.precision)
        self.length = length_of(config, self)
        self.steps, self.start = self.length.steps, self.length.start  # start: of a branch the step of its parent's checkpoint, else 0
        self.schedule = build(config.schedule, batch_tokens=self.batch_tokens, steps=self.steps, start=self.start)
        self.callbacks: list[Callback] = [build(options) for options in config.callbacks.values()]
        self.averages = Averages(self)
        self._before_update = [c.before_update for c in self.callbacks if type(c).before_update is not Callback.before_update]
        self._aside = 0.0  # seconds that these took in the last step
        self.profile = Profile(config.trainer.profile if self.world.first else "", run.directory / "profile", self.device, self.steps)
        self._step = self.strategy.wrap(_Step(self.model, self.objective))
        self.forward: Callable[[Batch], Tensor] = torch.compile(self._step) if config.hardware.compile else self._step
        self.state = State()
        self.latest: Metrics = {}  # the newest value of everything measured
        self.measured_on_held_out: tuple[int, float] = (-1, math.nan)  # the last step that was, and its val/loss
        self.writer = Writer(run.checkpoints, self.world, shards=self.strategy.sharded)
        self.guard = Guard(self)
        self.passed = set[int]()  # batches that are not trained on
        self._started = time.perf_counter() if started is None else started
        self.stop = Stop(parse_duration(config.trainer.time_limit))
        self._leaving = 0  # why all ranks leave after this step; 0: they stay
        self._unwritten = list[int]()  # the ranks that could not write their part of a checkpoint
        self.metrics: MetricsFile | None = None  # of rank 0, while it trains
        self.tracker: Tracker = NoTracker()  # of rank 0 the run's own, while it trains
        self._sinks: tuple[Callable[[Metrics], None], ...] = ()

    def train(self, metrics: MetricsFile | None, tracker: Tracker, progress: RunProgress) -> None:
        """Run to the end of the budget; rank 0 alone has a metrics file.

        Raises Stopped after a signal or the time limit (with a checkpoint), DivergedError before an update that is not finite.
        """
        self.metrics, self.tracker = metrics, tracker
        self._sinks = () if metrics is None else (metrics.write, tracker.log, progress.update)
        started, wall, session_start = time.perf_counter(), self.state.wall, self.state.step
        self.model.train()
        with self.stop, self.profile.session():
            self.objective.begin(self)
            self._each("on_start")
            if self.config.trainer.on_nonfinite == "rollback" and self.state.step == self.start:
                self.save_checkpoint()  # something to go back to
            while not self.finished:
                number = self.state.step + 1  # `record` collects where a line will follow, and at first, to refuse what is wrong early
                told = Recording(number % self.config.trainer.log_every == 0 or number in (session_start + 1, self.steps))
                with self.profile, told:
                    before = time.perf_counter()
                    measured = self.train_step(self._next_batch())
                    seconds = time.perf_counter() - before - self._aside
                self.state.batch += measured is not None  # one that was passed over is left out by `_next_batch` from now on
                if measured is not None:
                    self.state.step += 1
                    self.state.tokens += self.batch_tokens
                    self.state.seconds += seconds
                    self.state.wall = wall + time.perf_counter() - started
                    if self.state.step - session_start > WARMUP_STEPS:
                        self.state.timed_tokens += self.batch_tokens
                        self.state.timed_seconds += seconds
                    if self.steps is None:  # all ranks end by the same watch
                        self.state.seconds = self.world.gather(self.state.seconds)[0][0]
                    if self.state.step % self.config.trainer.log_every == 0 or self.finished or "train/spike" in measured:
                        self.record(told.metrics(measured))
                    self._each("on_step")
                if self._unwritten:
                    self.writer.fail(self._unwritten)
                why = self.stop.asked if self.world.size == 1 else self._leaving
                if why and not self.finished:
                    self._leave(why)
            self.state.wall = wall + time.perf_counter() - started
            self._each("on_end")
            self.writer.wait()
            self.state.wall = wall + time.perf_counter() - started

    @property
    def trained(self) -> Transformer:
        """The model, as its objective knows it."""
        return self.model

    @property
    def number(self) -> int:
        """Steps that are done."""
        return self.state.step

    @property
    def batch_number(self) -> int:
        """The number of the batch that is next or being made."""
        return self.state.batch

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.directory

    def initial(self) -> Transformer:
        """A model with the weights that the run began with: what an objective compares with. In evaluation mode, without gradients."""
        return inherit.initial(self)

    @property
    def clock(self) -> float:
        """Seconds since this session began, by rank 0's watch: what all ranks decide by."""
        return self.stop.clock

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.length.finished(self.state)

    @property
    def total_steps(self) -> float:
        """Steps of the whole run; where time is the budget, estimated from the steps so far."""
        return self.length.total(self.state)

    def _next_batch(self) -> Batch:
        """The own rows of this step's batch. Of a stream they may have to be waited for, and a signal ends the waiting."""
        while self.state.batch in self.passed:
            self.state.batch += 1
        batch, failure, why = None, None, 0
        self.stop.waiting = self.loader.streams  # elsewhere a batch takes no time, and all ranks leave where the step ends
        try:
            batch = self.loader.batch(self.state.batch)
        except (DataError, IOFailure) as error:  # there is no text now; nothing of this step was done
            failure = error
        except Waiting:
            why = self.stop.asked
        finally:
            self.stop.waiting = False
        if self.loader.streams:  # the ranks leave together, for the first one's reason
            found = self.world.gather(float(failure is not None), float(why))
            why = next((int(w) for _, w in found if w), 0)
            if failure is None and any(f for f, _ in found):
                failure = IOFailure("another rank found no text to go on with; its own log says why")
        if why:
            self._leave(why)
        if failure is not None:
            if self.loader.streams or self.world.size == 1:
                self.save_checkpoint()
                self.writer.wait()
            raise failure
        assert batch is not None
        return self.objective.experience(self, batch)

    def _leave(self, why: int) -> None:
        self.save_checkpoint()
        self.writer.wait()
        self.world.wait()  # torchrun ends the others as soon as one has left
        self.stop.leave(why, self.state.step)

    def train_step(self, batch: Batch) -> Metrics | None:
        """One update; None where the batch was passed over. The loss is normalised by the token weight of the whole batch, however split.

        Raises DivergedError before a loss or gradient that is not finite can touch the weights.
        """
        seed_step(self._dropout_seed, self.state.batch, self.world.rank)
        weight = batch.token_weight
        share = weight if batch.weight is None else sum(w for (w,) in self.world.gather(weight)) / self.world.size
        total = torch.zeros((), device=self.device)
        parts = batch.split(self.micro_batch)
        for number, part in enumerate(parts, 1):
            with self.strategy.accumulating(self._step, number == len(parts)):
                with autocast(self.device, self.config.hardware.precision):
                    loss = self.forward(part.to(self.device)) / (share or 1.0)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        clip = self.config.trainer.gradient_clip
        norm = sharded.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip if clip > 0 else math.inf)).item()
        loss_value, bad_ranks = self._exchange(total.item())
        told = self.guard.judge(loss_value, norm, bad_ranks, share)
        if told is None:
            self.scaler.update()  # it has looked at these gradients, and would refuse the next ones
            self.optimizer.zero_grad(set_to_none=True)
            return None
        factor = self.schedule(self.state.step, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        started = time.perf_counter()
        for hook in self._before_update:
            hook(self)
        self._aside = time.perf_counter() - started
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._each("after_update")
        synchronise(self.device)
        return {"train/loss": loss_value, "train/learning_rate": self.rates[self._shown] * factor, "train/gradient_norm": norm, **told}

    def _exchange(self, loss: float) -> tuple[float, list[int]]:
        """The batch's loss, and the ranks where it is not finite; beside these what all ranks must agree on before they go on."""
        self.stop.clock = time.perf_counter() - self._started
        parts, reasons, clocks, unwritten = zip(*self.world.gather(loss, self.stop.asked, self.stop.clock, self.writer.failed), strict=True)
        self._leaving = next((int(why) for why in reasons if why), 0)
        self._unwritten = [rank for rank, failed in enumerate(unwritten) if failed]
        self.stop.clock = clocks[0]
        return sum(parts) / self.world.size, [rank for rank, part in enumerate(parts) if not math.isfinite(part)]

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
        if "val/loss" in measured:
            self.measured_on_held_out = (state.step, float(measured["val/loss"]))
        for sink in self._sinks:
            sink(line)

    def save_checkpoint(self) -> None:
        """Hand a checkpoint of this step to the writer; every rank calls it."""
        optimizer, tensors = pack_optimizer(self.optimizer)
        averages, kept = self.averages.saved()
        state: dict[str, Any] = {"state": self.state.to_json(), "optimizer": optimizer, "scaler": self.scaler.state_dict(), **averages}
        step, loss = self.measured_on_held_out
        metrics = {"val/loss": loss} if step == self.state.step else {}
        own = {checkpoint.OBJECTIVE + name: tensor for name, tensor in self.objective.tensors().items()}
        self.writer.save(self.state.step, self.model.state_dict(), tensors | kept | own, state, metrics)

    def _each(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)
