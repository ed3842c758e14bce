"""Reinforcement learning from rewarded samples: groups of completions, each judged beside the others of its prompt (GRPO)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.record import record, recording
from gptlab.config.registry import build, component_of, register, suggest
from gptlab.config.slots import Reward as RewardSlot
from gptlab.data.loader import Batch
from gptlab.data.problems import Problems, problems_of
from gptlab.hardware.precision import autocast
from gptlab.model.mode import evaluating
from gptlab.model.transformer import Transformer
from gptlab.objective.advantage import (
    Baseline,
    Normalisation,
    advantages,
    clipped,
    divergence,
    flat_groups,
    ratio,
    shares,
    spread,
    surrogate,
)
from gptlab.objective.answers import answered
from gptlab.objective.protocol import Objective, Training
from gptlab.objective.reward import Reward, exact_answer, scored
from gptlab.objective.rollout import Rollout, as_batch, roll_out, seed_of
from gptlab.objective.transcript import write_rollouts
from gptlab.tracker.protocol import Metrics

EXTRA = ("advantage", "share", "old", "reference")  # what a batch holds besides its rows


class Ragged(Batch):
    """Rows of many lengths: a micro-batch ends behind the last token that it scores, since what follows adds nothing."""

    def split(self, rows: int) -> list[Batch]:
        return [_shorn(part) for part in super().split(rows)]


def _shorn(batch: Batch) -> Batch:
    scored = (batch.extra["share"] > 0).any(0).nonzero()
    end = int(scored.max()) + 1 if len(scored) else 1
    weight, document = (None if t is None else t[:, :end] for t in (batch.weight, batch.document))
    extra = {name: t[:, :end] if t.dim() == 2 else t for name, t in batch.extra.items()}
    return Batch(batch.inputs[:, :end], batch.targets[:, :end], weight, document, extra)


JUDGES = ("exact_answer", "reasoning_gym")  # the rewards that tell a right answer from a wrong one


@register("objective", "grpo")
class GRPO(Objective):
    """Group-relative policy optimisation (Shao et al., 2024): for each prompt `group` samples, rewarded, each against its group's mean.

    A step makes trainer.batch_tokens / model.context_length completions, of `group` for each prompt: so many rows of a context's length are
    counted as its tokens, however short the completions. `rewards` by name (none: exact_answer) are summed by their `weights` (1 unless
    given). The prompts are the problems of the corpus; `temperature` and `max_tokens` (0: what the context holds) are the samples'.

    baseline, by_deviation  what is taken off a reward (group: the group's mean; none), and whether it is divided by the group's deviation
    clip, clip_high         the ratio gains nothing below 1 - clip and above 1 + clip_high (0: as clip)
    kl                      times the divergence from the weights that the run began with, of which a copy is kept (0: none)
    normalisation           token: all tokens of a batch count alike; sequence: all completions; constant: by their sum over the longest
    updates                 of each batch of samples; with more than one the model must have no dropout
    checked                 held-out problems answered greedily with each evaluation: `val/solved` (by the reward exact_answer or
                            reasoning_gym, where there is one; else those of the right text) and `val/reward`
    shown                   steps between rollouts that are written to samples/ and the tracker (0: none)

    REINFORCE is `baseline=none by_deviation=false`; with a baseline, `baseline=group`.
    """

    answers_problems = True

    def __init__(
        self,
        *,
        rewards: dict[str, RewardSlot] = {},  # noqa: B006
        weights: dict[str, float] = {},  # noqa: B006
        group: int = 8,
        temperature: float = 1.0,
        max_tokens: int = 0,
        baseline: Baseline = "group",
        by_deviation: bool = True,
        clip: float = 0.2,
        clip_high: float = 0.0,
        kl: float = 0.0,
        normalisation: Normalisation = "token",
        updates: int = 1,
        checked: int = 256,
        shown: int = 50,
    ) -> None:
        for name, value, least in (("max_tokens", max_tokens, 0), ("updates", updates, 1), ("checked", checked, 0), ("shown", shown, 0)):
            if value < least:
                raise ConfigError(f"objective.{name}={value} must be at least {least}")
        if group < 1 or (group < 2 and (baseline == "group" or by_deviation)):
            raise ConfigError(f"objective.group={group} must be at least 2: a sample is judged beside the others of its group")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"objective.temperature={temperature} must be above 0 and finite: a group of equal samples teaches nothing")
        if not 0 < clip < 1 or not (clip_high == 0 or clip_high >= clip):
            raise ConfigError(f"objective.clip={clip} must be between 0 and 1, and clip_high={clip_high} 0 or at least as large")
        if not 0 <= kl < math.inf:
            raise ConfigError(f"objective.kl={kl} must be at least 0 and finite")
        if unknown := sorted(set(weights) - set(rewards)):
            raise ConfigError(
                f"objective.weights.{unknown[0]}: there is no such reward{suggest(unknown[0], rewards)}; "
                f"there {'are ' + ', '.join(rewards) if rewards else 'is none by name'}"
            )
        self.rewards: dict[str, Reward] = {name: build(options) for name, options in rewards.items()} or {"exact_answer": exact_answer()}
        judge = next((name for name, options in rewards.items() if component_of(options).name in JUDGES), "")
        self.right = self.rewards.get(judge, exact_answer())
        self.weights = {name: float(weights.get(name, 1.0)) for name in self.rewards}
        if bad := next((n for n, w in self.weights.items() if not math.isfinite(w)), None):
            raise ConfigError(f"objective.weights.{bad}={self.weights[bad]} must be finite")
        self.group, self.temperature, self.max_tokens = group, temperature, max_tokens
        self.baseline, self.by_deviation, self.normalisation = baseline, by_deviation, normalisation
        self.low, self.high, self.kl = clip, clip_high or clip, kl
        self.updates, self.checked, self.shown = updates, checked, shown
        self._source: Problems | None = None
        self._reference: Transformer | None = None
        self._kept: Batch | None = None  # the samples of now, where they are used more than once
        self._used = 0  # updates that were made of them
        self._alone = True  # each of several ranks has samples of its own, which no checkpoint keeps: a resume makes new ones
        self._told: dict[str, float] = {}  # what there is to tell of them

    def __call__(self, model: Transformer, batch: Batch) -> Tensor:
        """The sum over the completions' tokens of what is minimised; beside it what parts of the model add to a loss."""
        extra, added = batch.extra, dict[str, Tensor]()
        tell = recording()

        def reduce(features: Tensor, within: Transformer) -> Tensor:
            logits = within.logits(features).float() / self.temperature
            now = _chosen(logits, batch.targets)
            entropies = spread(logits.detach()) if tell else torch.zeros_like(now)
            return torch.stack((now, entropies))

        now, entropies = model(batch.inputs, document=batch.document, losses=added, reduce=reduce)
        # Where the samples are used once, they were drawn by these very weights.
        change = ratio(now, extra["old"] if "old" in extra else now.detach())
        advantage = extra["advantage"][:, None]
        each = -surrogate(change, advantage, self.low, self.high)
        counts = (extra["share"] > 0).float()
        if self.kl:
            apart = divergence(now, extra["reference"])
            each = each + self.kl * apart
        if tell:
            tokens = counts.sum().clamp(min=1)
            record("train/clipped", (clipped(change, advantage, self.low, self.high) * counts).sum() / tokens)
            record("train/entropy", (entropies * counts).sum() / tokens)
            if self.kl:
                record("train/kl", (apart * counts).sum() / tokens)
        total: Tensor = (each * extra["share"]).sum()
        assert batch.weight is not None
        for name, mean in added.items():
            record(f"train/{name}", mean)
            total = total + mean * batch.weight.sum()
        return total

    def outlined(self, batch: Batch) -> Batch:
        ones = torch.ones_like(batch.inputs, dtype=torch.float32)
        extra = {"advantage": ones[:, 0], "share": ones}
        extra |= {"old": ones} if self.updates > 1 else {}
        extra |= {"reference": ones} if self.kl else {}
        return replace(batch, weight=ones, extra=extra)

    def begin(self, training: Training) -> None:
        config, size = training.config, training.world.size
        self._alone = size == 1
        strategy = component_of(config.hardware.strategy).name
        if getattr(component_of(config.hardware.strategy).factory, "sharded", False):
            raise ConfigError(f"objective=grpo writes with whole weights: hardware/strategy={strategy} has none; use single or ddp")
        rows = _rows(training)
        if rows % (self.group * size):
            tokens = max(1, round(rows / (self.group * size))) * self.group * size * config.model.context_length
            raise ConfigError(
                f"trainer.batch_tokens={config.trainer.batch_tokens} makes {rows} completions, which are no whole groups of "
                f"objective.group={self.group}{f' on each of {size} ranks' if size > 1 else ''}; try {tokens}"
            )
        if self.updates > 1 and config.model.dropout:
            raise ConfigError(f"objective.updates={self.updates} compares likelihoods, which dropout would change: set model.dropout=0")
        self._source = problems_of(training.data, config.data, config.model.context_length)
        self._reference = training.initial() if self.kl else None
        if training.number == 0 and self.checked:
            training.record(self.measure(training))

    def experience(self, training: Training, drawn: Batch) -> Batch:
        if self._kept is None or self._used >= self.updates:
            self._kept, self._used = self._rolled_out(training), 0
        self._used += 1
        for name, value in self._told.items():
            record(name, value)
        return self._kept

    def tensors(self) -> dict[str, Tensor]:
        if self._kept is None or self._used >= self.updates or not self._alone:
            return {}
        batch = self._kept
        rows = {"inputs": batch.inputs, "targets": batch.targets, "weight": batch.weight, "document": batch.document, **batch.extra}
        state = {"used": torch.tensor(self._used), "told": torch.tensor(list(self._told.values()), dtype=torch.float64)}
        return state | {name: t.contiguous() for name, t in rows.items() if t is not None}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._kept, self._used = None, int(tensors.get("used", torch.tensor(0)))
        if tensors:
            self._told = dict(zip(self._told_names(), tensors["told"].tolist(), strict=True))
            extra = {name: tensors[name] for name in EXTRA if name in tensors}
            self._kept = Ragged(tensors["inputs"], tensors["targets"], tensors["weight"], tensors.get("document"), extra)

    def measure(self, training: Training) -> Metrics:
        assert self._source is not None
        if not self.checked:
            return {}
        found = answered(
            training,
            self._source,
            self.checked,
            max_tokens=self.max_tokens,
            right=self.right,
            rewards=lambda rollouts: self._rewarded(rollouts)[0].tolist(),
        )
        return {"val/solved": found.solved, "val/reward": found.reward, "val/ended": found.ended}

    def _rolled_out(self, training: Training) -> Batch:
        """Samples of the weights of now, as rows with their advantages."""
        assert self._source is not None
        config, world, model = training.config, training.world, training.trained
        data_seed, own_seed = int(config.seeds.data or 0), int(config.seeds.dropout or 0)
        prompts = _rows(training) // self.group
        first = training.batch_number * prompts
        own = range(first + world.rank * prompts // world.size, first + (world.rank + 1) * prompts // world.size)
        rollouts = roll_out(
            model,
            self._source.problems(own, data_seed),
            training.data.tokenizer,
            [[seed_of(own_seed, number, j) for j in range(self.group)] for number in own],
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            at_once=int(config.hardware.micro_batch),
        )
        rewards, parts = self._rewarded(rollouts)
        groups = rewards.view(len(own), self.group)
        each = advantages(groups, self.baseline, by_deviation=self.by_deviation)
        self._tell(training, rollouts, groups, parts)
        if self.shown and (training.number % self.shown < self.updates) and world.first:
            write_rollouts(training, rollouts, rewards.tolist(), parts, each.flatten().tolist())
        # Rows of like lengths side by side, so that a micro-batch holds little padding.
        order = sorted(range(len(rollouts)), key=lambda row: len(rollouts[row].prompt) + len(rollouts[row].completion), reverse=True)
        batch, mask = as_batch([rollouts[row] for row in order], documents=model.sees_documents)
        longest = self.max_tokens or config.model.context_length
        share, weight = shares(mask, self.normalisation, longest)
        extra = {"advantage": each.flatten().float()[order], "share": share}
        batch = Ragged(batch.inputs, batch.targets, weight, batch.document, extra)
        if self.updates > 1:
            extra["old"] = self._likelihoods(training, model, batch)
        if self._reference is not None:
            extra["reference"] = self._likelihoods(training, self._reference, batch)
        return batch

    def _rewarded(self, rollouts: Sequence[Rollout]) -> tuple[Float[Tensor, " b"], dict[str, list[float]]]:
        """The weighted sum of the rewards of each row, in float64, and each reward alone."""
        samples = [r.sample for r in rollouts]
        parts = {name: scored(name, reward, samples) for name, reward in self.rewards.items()}
        whole = sum(self.weights[name] * torch.tensor(values, dtype=torch.float64) for name, values in parts.items())
        assert isinstance(whole, Tensor)
        return whole, parts

    def _tell(self, training: Training, rollouts: Sequence[Rollout], groups: Float[Tensor, "p g"], parts: dict[str, list[float]]) -> None:
        values = [
            float(groups.mean()),
            float(groups.std(1, correction=0).mean()),
            float(flat_groups(groups).double().mean()),
            sum(len(r.completion) for r in rollouts) / len(rollouts),
            sum(r.sample.ended for r in rollouts) / len(rollouts),
            *(sum(each) / len(each) for each in parts.values() if len(parts) > 1),
        ]
        ranks = training.world.gather(*values)
        self._told = dict(zip(self._told_names(), (sum(each) / len(each) for each in zip(*ranks, strict=True)), strict=True))

    def _told_names(self) -> list[str]:
        names = ["reward", "reward_std", "flat_groups", "completion_tokens", "ended"]
        return [f"train/{name}" for name in (*names, *(f"reward/{name}" for name in self.rewards if len(self.rewards) > 1))]

    @torch.no_grad()
    def _likelihoods(self, training: Training, model: Transformer, batch: Batch) -> Float[Tensor, "b t"]:
        """The log-probability of each target, by the forward pass that training makes: in its micro-batches and number format."""
        found = []
        with evaluating(model):
            for part in batch.split(int(training.config.hardware.micro_batch)):
                part = part.to(training.device)
                with autocast(training.device, training.config.hardware.precision):
                    logits = model(part.inputs, document=part.document)
                here = _chosen(logits.float() / self.temperature, part.targets).cpu()
                found.append(F.pad(here, (0, batch.targets.shape[1] - here.shape[1])))
        return torch.cat(found)


def _chosen(logits: Float[Tensor, "b t v"], targets: Tensor) -> Float[Tensor, "b t"]:
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def _rows(training: Training) -> int:
    """Completions of a step, of all ranks."""
    return int(training.config.trainer.batch_tokens) // training.config.model.context_length
