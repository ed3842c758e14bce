"""A run before it begins: its size, its work, its memory, its time; from the model without memory and a few timed steps."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, component_of
from gptlab.config.resolve import Machine, parse_budget, resolve, start_step
from gptlab.config.schema import Config
from gptlab.config.slots import Tracker
from gptlab.data.loader import TASK_ROWS, Batch, Loader
from gptlab.data.prepared import Prepared
from gptlab.data.sources import training_rows
from gptlab.data.tokenizer import Tokenizer
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling
from gptlab.hardware.cards import Card
from gptlab.hardware.device import device_memory, machine, restored, synchronise
from gptlab.hardware.precision import autocast
from gptlab.model.transformer import flops_per_token, meta_model, parameters_by_part
from gptlab.runner import branch
from gptlab.runner.memory import Fit, Memory, fit_micro_batch, forecast_memory, usable, what_fits
from gptlab.runner.run import Run
from gptlab.runner.state import own_randomness
from gptlab.runner.trainer import Trainer
from gptlab.runner.validation import EVALUATION_TOKENS, scored

TIMED_SECONDS = 20.0  # that the timed steps of one run take at most, about
MOST_STEPS = 40
TIMED_RATE = 1e-12  # of learning, while steps are timed
FORWARD_SHARE = 1 / 3  # of a training step's work: its backward pass takes twice as much
COPIED, WRITTEN = 2e9, 0.5e9  # bytes a second of a checkpoint: copied while training waits, and written at the end of a run
SAMPLE_SECONDS = 0.02  # a sampled token on a card: launches, since its products are nothing there
EVALUATIONS = 8  # of a run, unless callbacks.evaluation.every says otherwise
FRESH = 350 << 20  # bytes of a process that has built nothing yet
BUDGET = "1000000steps"  # so many that no schedule ends while steps are timed


@dataclass(frozen=True)
class Seconds:
    """How long a run takes. `step` is one update; `by` says where the figures come from."""

    step: float
    training: float
    evaluation: float
    samples: float
    checkpoints: float
    by: str

    @property
    def total(self) -> float:
        return self.training + self.evaluation + self.samples + self.checkpoints


@dataclass(frozen=True)
class Forecast:
    """What is known of a run beforehand. `steps`, `tokens`: None of a budget by the clock whose steps are not timed; `epochs`: None
    where nobody knows how long the text is. `available` and `room`: bytes of the device, and those a run may count on (0: not known)."""

    config: Config
    device: str
    parameters: dict[str, int]
    tied: bool
    flops_per_token: float
    steps: int | None
    tokens: int | None
    epochs: float | None
    memory: Memory
    available: int
    room: int
    advice: Fit | None
    seconds: Seconds | None

    @property
    def fits(self) -> bool:
        return not self.room or self.memory.total <= self.room


@dataclass(frozen=True)
class _Pace:
    """Seconds of an update, of a token in evaluation and of one in a sample; and where they come from."""

    step: float
    evaluated: float
    sampled: float
    by: str


def planned_vocabulary(config: Config, data: Prepared | None) -> int:
    """The tokens that the model will know. Raises ConfigError where they, or an epoch, are known only when the data are prepared."""
    if data is not None:
        return data.vocabulary
    name = component_of(config.data.corpus).name
    mend = "prepare them first: `gptlab data prepare` with the same overrides"
    if not _streams(config):
        raise ConfigError(f"data/corpus={name}: these data are not prepared, so there is nothing to count; {mend}")
    vocabulary = getattr(config.data.tokenizer, "vocabulary", 0)
    if not vocabulary:
        tokenizer: Tokenizer = build(config.data.tokenizer)
        vocabulary = tokenizer.vocabulary
    if not vocabulary:
        raise ConfigError(f"data/tokenizer={component_of(config.data.tokenizer).name}: its vocabulary is learned from the data; {mend}")
    if parse_budget(config.trainer.budget).unit == "epochs":
        raise ConfigError(f"trainer.budget={config.trainer.budget}: an epoch of data/corpus={name} is not known yet; {mend}")
    return int(vocabulary)


def _streams(config: Config) -> bool:
    corpus: Any = build(config.data.corpus)
    return all(hasattr(source, "held_out_characters") for source in getattr(corpus, "sources", {"": corpus}).values())


def forecast(
    config: Config,
    data: Prepared | None,
    *,
    card: Card | None = None,
    mfu: float = 0.4,
    seconds: float = TIMED_SECONDS,
    process: int | None = None,
) -> Forecast:
    """A composed config's forecast on this machine, by steps timed in about so many `seconds` (0: without); or on a card, at an MFU.

    `data`: None for a stream of which nothing is prepared. `process`: bytes of this process before it built a model, if it has.
    Raises ConfigError.
    """
    auto = config.hardware.micro_batch == "auto"
    if card is None:
        final, _ = branch.settle(resolve(config, machine()))
        available = device_memory(torch.device(final.hardware.device)) if final.hardware.device != "mps" else 0
    else:
        there = Machine(("cuda", "cpu"), gpu_bf16=True, gpu_fp8=card.fp8)
        final, _ = branch.settle(resolve(replace(config, hardware=replace(config.hardware, device="cuda")), there))
        available = card.memory
    vocabulary = planned_vocabulary(final, data)
    if auto:
        final = fit_micro_batch(final, vocabulary, available)
    model = meta_model(final.model, vocabulary)
    room = usable(final.hardware.device, available)
    memory = forecast_memory(final, vocabulary, process=process)
    fits = not room or memory.total <= room
    advice = None if fits else what_fits(final, vocabulary, room, process=process)
    work = flops_per_token(model)
    parameters = parameters_by_part(model)
    pace = None
    if card is not None:
        pace = _by_flops(final, work, card, mfu)
    elif seconds and fits:
        pace = _timed(final, data, vocabulary, seconds)
    steps = _steps(final, data, parameters["total"], work, pace)
    epoch = _epoch_tokens(final, data)
    tokens = None if steps is None else steps * int(final.trainer.batch_tokens)
    return Forecast(
        config=final,
        device=card.name if card else final.hardware.device,
        parameters=parameters,
        tied=not list(model.head.parameters()),
        flops_per_token=work,
        steps=steps,
        tokens=tokens,
        epochs=tokens / epoch if tokens is not None and epoch else None,
        memory=memory,
        available=available,
        room=room,
        advice=advice,
        seconds=None if pace is None or steps is None else _whole(final, data, memory, steps, pace),
    )


def _steps(config: Config, data: Prepared | None, parameters: int, work: float, pace: _Pace | None) -> int | None:
    budget, start = parse_budget(config.trainer.budget), start_step(config)
    if budget.unit == "min":
        return None if pace is None else max(1, round(60 * budget.amount / pace.step))
    epoch = 0
    if budget.unit == "epochs":
        known = _epoch_tokens(config, data)
        if known is None:
            raise ConfigError(
                f"trainer.budget={config.trainer.budget}: this text has no known end; give data.corpus.tokens, or a budget in tokens"
            )
        epoch = known
    size = int(config.trainer.batch_tokens)
    steps = budget.steps(batch_tokens=size, epoch_tokens=epoch, parameters=parameters, flops_per_token=work, start=start)
    return None if steps is None else max(0, steps - start)


def _epoch_tokens(config: Config, data: Prepared | None) -> int | None:
    """Tokens of one pass over the text; None where it has no end, or nobody knows it."""
    if data is None or data.task is not None:
        return None
    source = training_rows(data, config.model.context_length, config.data.packing, int(config.seeds.data or 0), config.data.too_long)
    rows = int(config.trainer.batch_tokens) // config.model.context_length
    loader = Loader(source, rows)
    return None if loader.endless else loader.epoch_tokens


def _by_flops(config: Config, work: float, card: Card, mfu: float) -> _Pace:
    rate = card.peak_flops * mfu
    by = f"{card.name}: {100 * mfu:.0f} % of its bf16 peak of {card.peak_flops / 1e12:,.0f} TFLOP/s assumed (--mfu)"
    return _Pace(int(config.trainer.batch_tokens) * work / rate, FORWARD_SHARE * work / rate, SAMPLE_SECONDS, by)


def _timed(config: Config, data: Prepared | None, vocabulary: int, seconds: float) -> _Pace:
    """Time steps of the run's own trainer, which leaves nothing behind; of a large batch only so many parts as there is time for."""
    callbacks = {k: v for k, v in config.callbacks.items() if getattr(component_of(v).factory, "makes_average", False)}
    none = cast(Tracker, component("tracker", "none").options())
    plain = replace(config.trainer, budget=BUDGET, start="", profile="", mirror="", log_every=1_000_000)
    bare = replace(config, callbacks=callbacks, tracker=none, trainer=plain)
    known = data is not None
    with own_randomness(), restored(), tempfile.TemporaryDirectory(prefix="gptlab-plan-") as folder:
        trainer = Trainer(bare, data if data is not None else _stand_in(config, vocabulary), Run(Path(folder)))
        trainer.rates = [TIMED_RATE for _ in trainer.rates]  # a run that diverges takes its time all the same
        trainer.model.train()
        for callback in trainer.callbacks:
            callback.on_start(trainer)
        micro, context = trainer.micro_batch, config.model.context_length
        parts = trainer.batch_tokens // context // micro

        def step(count: int) -> float:
            rows = count * micro
            if known:
                given = trainer.loader.batch(trainer.state.step)
                weight, document = (None if t is None else t[:rows] for t in (given.weight, given.document))
                batch = Batch(given.inputs[:rows], given.targets[:rows], weight, document)
            else:
                tokens = torch.randint(vocabulary, (rows, context + 1))
                document = torch.zeros(rows, context, dtype=torch.long) if trainer.model.sees_documents else None
                batch = Batch(tokens[:, :-1], tokens[:, 1:], document=document)
            started = time.perf_counter()
            trainer.train_step(batch)
            trainer.state.step += 1
            return time.perf_counter() - started

        begun = time.perf_counter()
        step(1)  # it allocates, and compiles
        one = step(1)
        count = max(1, min(parts, int(seconds / 6 / one)))
        ones, several = [one], list[float]()
        while len(several) < MOST_STEPS and (not several or time.perf_counter() - begun + statistics.median(several) < 0.7 * seconds):
            if count not in (1, parts):
                ones.append(step(1))
            several.append(step(count))
        taken = statistics.median(several)
        if count < parts:  # the update is made once, whatever the parts
            part = taken if count == 1 else (taken - statistics.median(ones)) / (count - 1)
            taken += (parts - count) * max(part, 0.0)
        evaluated = _time_evaluation(trainer, taken / trainer.batch_tokens, seconds)
        sampled = _time_sample(trainer)
    by = f"{len(several)} timed step{'s' * (len(several) > 1)}"
    by += f" of {count} of {parts} micro-batches" if count < parts else ""
    return _Pace(taken, evaluated, sampled, by + ("" if known else ", on random tokens"))


def _time_evaluation(trainer: Trainer, a_token: float, seconds: float) -> float:
    """Seconds of an evaluated token: timed, or where one pass would take long the forward share of a step."""
    context = trainer.config.model.context_length
    rows = max(1, EVALUATION_TOKENS // context)
    if rows * context * a_token * FORWARD_SHARE > 0.1 * seconds:
        return a_token * FORWARD_SHARE
    tokens = torch.zeros(rows, context + 1, dtype=torch.long, device=trainer.device)
    document = torch.zeros(rows, context, dtype=torch.long, device=trainer.device) if trainer.model.sees_documents else None
    times = []
    trainer.model.eval()
    with torch.inference_mode(), autocast(trainer.device, trainer.config.hardware.precision):
        for _ in range(3):
            started = time.perf_counter()
            scored(trainer.model, Batch(tokens[:, :-1], tokens[:, 1:], document=document), count_right=False)
            synchronise(trainer.device)
            times.append(time.perf_counter() - started)
    trainer.model.train()
    return statistics.median(times) / (rows * context)


def _time_sample(trainer: Trainer) -> float:
    made = generate(trainer.model, [[0]], Sampling(max_tokens=6))
    next(made)
    started = time.perf_counter()
    count = sum(1 for _ in made)
    return (time.perf_counter() - started) / max(1, count)


def _stand_in(config: Config, vocabulary: int) -> Prepared:
    """Data for a trainer that is given its batches: nothing of it is read."""
    task = build(component("data/corpus", "copy").options())
    tokenizer: Tokenizer = build(component("data/tokenizer", "byte").options())
    manifest: Mapping[str, Any] = {"tokenizer": {"vocabulary": vocabulary}, "splits": {"val": {}}, "dtype": "<u4"}
    return Prepared(Path(), dict(manifest), tokenizer, task=task)


def _whole(config: Config, data: Prepared | None, memory: Memory, steps: int, pace: _Pace) -> Seconds:
    every = {component_of(options).name: options for options in config.callbacks.values()}
    training = steps * pace.step
    evaluations, saved = 0, 0.0
    if "evaluation" in every:
        cadence = getattr(every["evaluation"], "every", 0) or max(1, math.ceil(steps / EVALUATIONS))
        evaluations = math.ceil(steps / cadence)
    samples = 0
    if "samples" in every:
        options: Any = every["samples"]
        samples = options.tokens * (1 + (steps // options.every if options.every else 0))
    if "checkpoint" in every:
        size = memory.weights + memory.optimizer
        chosen: Any = every["checkpoint"]
        count = max(evaluations * chosen.best, steps // chosen.every if chosen.every else 0, int(training / 60 / chosen.minutes)) + 1
        saved = count * size / COPIED + size / WRITTEN
    return Seconds(
        pace.step, training, evaluations * _held_out_tokens(config, data) * pace.evaluated, samples * pace.sampled, saved, pace.by
    )


def _held_out_tokens(config: Config, data: Prepared | None) -> int:
    """Tokens of one evaluation, all sets together."""
    limit = config.data.validation_tokens
    if data is None:
        return limit
    if data.task is not None:
        return limit or TASK_ROWS * config.model.context_length
    lengths = (len(data.stream(name)) - 1 for name in data.validation_names if name != "val" or not data.parts)
    return sum(min(limit, length) if limit else length for length in lengths)


def advice_when_full(config: Config, vocabulary: int, memory: int) -> str:
    """What would have fitted, for a run whose memory is used up: overrides and their forecast; '' where nothing is known to fit."""
    room = usable(config.hardware.device, memory)
    config = replace(config, callbacks={})  # a step failed, and neither an evaluation nor a checkpoint
    now = forecast_memory(config, vocabulary, process=FRESH)  # this process is full
    room = min(room, int(0.9 * now.total))  # it was said to fit, and did not
    fit = what_fits(config, vocabulary, room, process=FRESH)
    if fit is None or not fit.overrides:
        return ""
    return f"{' '.join(fit.overrides)} ({fit.memory.total / 1e9:.1f} GB by forecast, where it now takes {now.total / 1e9:.1f})"


def same_but_seed(config: Config) -> Config:
    """A config less what tells two seeds of an arm apart, and its name: their forecasts are the same."""
    return replace(config, seed=0, seeds=type(config.seeds)(), name="")
