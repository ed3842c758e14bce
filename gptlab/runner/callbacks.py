"""The callbacks that come with gptlab."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, components, register
from gptlab.data.loader import held_out_batches
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling
from gptlab.hardware.device import peak_flops, peak_memory, synchronise
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.held_out import write_rows
from gptlab.runner.validation import measure, measured_sets, metrics_of
from gptlab.tracker.protocol import Metrics

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer


def _cadence(key: str, every: int) -> int:
    if every < 0:
        raise ConfigError(f"{key}={every} must be at least 0")
    return every


@register("callback", "evaluation")
class Evaluation(Callback):
    """The loss on every held-out set, `every` so many steps (0: eight times in a run) and at the end; of an average of the weights too."""

    def __init__(self, *, every: int = 0) -> None:
        self.every = _cadence("callbacks.evaluation.every", every)
        self._measured = -1

    def on_start(self, trainer: Trainer) -> None:
        if not self.every:
            self.every = max(1, math.ceil(trainer.steps / 8)) if trainer.steps else 500

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step % self.every == 0:
            self._measure(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._measured != trainer.state.step:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        self._measured = trainer.state.step
        averages = trainer.averages
        with averages.using("default"):
            sets = measured_sets(trainer.model, trainer.data, trainer.config, trainer.world)
            found = metrics_of(sets) | trainer.objective.measure(trainer)
        if trainer.finished and trainer.world.first:
            write_rows(trainer.run, sets["val"].rows)
        if averages.beside:
            with averages.using("average"):
                average = measure(trainer.model, trainer.data, trainer.config, trainer.world)
            found |= {averages.beside + name.removeprefix("val"): value for name, value in average.items()}
        trainer.record(found)
        trainer.guard.judge_held_out(float(found["val/loss"]))


@register("callback", "checkpoint")
class Checkpoint(Callback):
    """A checkpoint every `minutes`, `every` so many steps (0: by time alone), at each lowest held-out loss so far, and at the end.

    The last `keep` stay, the `best`, and for good every `keep_every`-th step. They are written in the `background` from a copy.
    """

    def __init__(
        self, *, minutes: float = 5.0, every: int = 0, keep: int = 2, keep_every: int = 0, best: bool = True, background: bool = True
    ) -> None:
        self.minutes, self.every, self.keep = minutes, _cadence("callbacks.checkpoint.every", every), keep
        self.keep_every, self.best, self.background = _cadence("callbacks.checkpoint.keep_every", keep_every), best, background
        if keep < 1 or minutes <= 0:
            raise ConfigError(f"callbacks.checkpoint: keep={keep} must be at least 1 and minutes={minutes} positive")

    def on_start(self, trainer: Trainer) -> None:
        self._last = trainer.clock
        folder, writer = trainer.run.checkpoints, trainer.writer
        writer.background = self.background
        self._lowest = trainer.world.share(lambda: checkpoint.lowest_loss(folder, trainer.state.step)) if self.best else -math.inf

        def clean(made: Path) -> None:
            checkpoint.clean(folder, checkpoint.step_of(made), keep=self.keep, keep_every=self.keep_every, best=self.best)

        writer.after.insert(0, clean)  # before a mirror looks at what there is

    def on_step(self, trainer: Trainer) -> None:
        step, loss = trainer.measured_on_held_out
        best = step == trainer.state.step and loss < self._lowest
        if best:
            self._lowest = loss
        due = any(every and trainer.state.step % every == 0 for every in (self.every, self.keep_every))
        if not trainer.finished and (best or due or trainer.clock - self._last > 60 * self.minutes):
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint()
        self._last = trainer.clock


@register("callback", "throughput")
class Throughput(Callback):
    """Tokens a second in training steps, the share of a known GPU's bf16 peak (MFU), and peak memory."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._tokens, self._seconds = trainer.state.tokens, trainer.state.seconds
        self._peak = peak_flops(trainer.device)

    def on_record(self, trainer: Trainer, metrics: Metrics) -> None:
        tokens, seconds = trainer.state.tokens - self._tokens, trainer.state.seconds - self._seconds
        if "train/loss" not in metrics or seconds <= 0:
            return
        metrics["train/tokens_per_second"] = tokens / seconds
        if self._peak:
            metrics["train/mfu"] = tokens / seconds * trainer.flops_per_token / (self._peak * trainer.world.size)
        metrics["memory/peak_bytes"] = peak_memory(trainer.device)
        self._tokens, self._seconds = trainer.state.tokens, trainer.state.seconds


@register("callback", "sources")
class Sources(Callback):
    """Of a mix: each source's share of the tokens so far, and how many times its text was passed through."""

    def on_record(self, trainer: Trainer, metrics: Metrics) -> None:
        if "train/loss" in metrics:
            for name, (share, epochs) in trainer.loader.drawn(trainer.state.step).items():
                metrics[f"data/share/{name}"], metrics[f"data/epochs/{name}"] = share, epochs


@register("callback", "samples")
class Samples(Callback):
    """A text from the model in samples/, at the end and `every` so many steps (0: at the end alone), by its `weights`."""

    def __init__(
        self,
        *,
        every: int = 0,
        tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        prompt: str = "\n",
        weights: Literal["default", "trained", "average"] = "default",
    ) -> None:
        self.every, self.tokens, self.weights = _cadence("callbacks.samples.every", every), tokens, weights
        self.temperature, self.top_k, self.prompt = temperature, top_k, prompt

    def on_start(self, trainer: Trainer) -> None:
        with trainer.averages.using(self.weights):  # what is not there is said now, and not when the run is over
            pass

    def on_step(self, trainer: Trainer) -> None:
        if self.every and trainer.state.step % self.every == 0:
            self._write(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        tokenizer = trainer.data.tokenizer
        count = self.tokens
        if trainer.data.task is None:
            prompt, shown = tokenizer.encode(self.prompt).tolist(), ""
        else:  # the first half of a row that was not trained on
            row = next(held_out_batches(trainer.data, "val", trainer.config.model.context_length, 1, 1)).inputs[0].tolist()
            prompt = row[: len(row) // 2]
            shown, count = tokenizer.decode(prompt) + " > ", len(row) - len(prompt)
        with trainer.averages.using(self.weights):
            settings = Sampling(max_tokens=count, temperature=self.temperature, top_k=self.top_k)
            ids = [made.token for made in generate(trainer.model, [prompt], settings)]
        if not trainer.world.first:  # every rank writes the text, since each holds a part of a sharded model; one keeps it
            return
        folder, text = trainer.run.directory / "samples", shown + tokenizer.decode(ids)
        folder.mkdir(exist_ok=True)
        (folder / f"step-{trainer.state.step:09d}.txt").write_text(text + "\n", encoding="utf-8")
        trainer.tracker.text(trainer.state.step, f"{self.weights} weights" if self.weights != "default" else "sample", text)


@register("callback", "kernels")
class Kernels(Callback):
    """At the end, the trained model's forward pass under every kernel: largest difference of a logit, and milliseconds."""

    def __init__(self, *, repeats: int = 5) -> None:
        self.repeats = repeats

    def on_end(self, trainer: Trainer) -> None:
        with trainer.averages.using("default"):
            self._compare(trainer)

    @torch.inference_mode()
    def _compare(self, trainer: Trainer) -> None:
        model, config = trainer.model, trainer.config
        batch = next(held_out_batches(trainer.data, "val", config.model.context_length, 0, trainer.micro_batch)).to(trainer.device)
        attentions: list[Any] = [m for m in model.modules() if hasattr(m, "kernel")]
        if not attentions:
            raise ConfigError("callback=kernels compares attention kernels; this model has none")
        own = [attention.kernel for attention in attentions]
        model.eval()
        reference = model(batch.inputs)
        found: Metrics = {}
        for component in components("model/kernel"):
            for attention in attentions:
                attention.kernel = build(component.options())
                if attention.kernel.materialises_pattern:
                    attention.scores, attention.pattern = torch.nn.Identity(), torch.nn.Identity()
            model(batch.inputs)
            times = []
            for _ in range(self.repeats):
                started = time.perf_counter()
                logits = model(batch.inputs)
                synchronise(trainer.device)
                times.append(time.perf_counter() - started)
            found[f"kernel/{component.name}/difference"] = float((logits - reference).abs().max())
            found[f"kernel/{component.name}/forward_ms"] = 1000 * sorted(times)[len(times) // 2]
        for attention, kernel in zip(attentions, own, strict=True):
            attention.kernel = kernel
        model.train()
        trainer.record(found)
