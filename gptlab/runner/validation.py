"""The held-out loss: every arm of a study is measured on the same tokens, in the same windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config.schema import Config
from gptlab.data.loader import Batch, held_out_batches
from gptlab.data.prepared import Prepared
from gptlab.hardware.precision import autocast
from gptlab.hardware.world import World
from gptlab.model.transformer import Transformer
from gptlab.tracker.protocol import Metrics

ALONE = World()
EVALUATION_TOKENS = 8192  # of one forward pass
EVALUATION_LOGITS = 1 << 26  # held at a time; a larger vocabulary's are made in parts


@dataclass(frozen=True)
class Sums:
    """What was measured of a held-out set, to be added to that of another."""

    nats: float
    tokens: int
    bytes: int
    correct: int | None = None  # tokens that were the likeliest; of a generated task alone

    def __add__(self, other: Sums) -> Sums:
        correct = None if self.correct is None or other.correct is None else self.correct + other.correct
        return Sums(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes, correct)

    def metrics(self, prefix: str) -> Metrics:
        """The mean loss in nats a token and in bits a byte of text; of a task the loss and the share of right answers."""
        found: Metrics = {f"{prefix}/loss": self.nats / self.tokens}
        if self.correct is not None:
            found[f"{prefix}/accuracy"] = self.correct / self.tokens
        elif self.bytes:
            found[f"{prefix}/bits_per_byte"] = self.nats / (self.bytes * math.log(2))
        return found


def measure(model: Transformer, data: Prepared, config: Config, world: World = ALONE) -> Metrics:
    """Every held-out set: `val/loss`, `val/NAME/loss`, … Of a mix, `val` is all its sources' sets together. The ranks share the work."""
    found: Metrics = {}
    parts = {name: held_out_sums(model, data, name, config, world) for name in data.validation_names if name != "val" or not data.parts}
    if data.parts:
        whole = Sums(0.0, 0, 0)
        for name in data.parts:
            whole = whole + parts[name]
        found |= whole.metrics("val")
    for name, sums in parts.items():
        found |= sums.metrics("val" if name == "val" else f"val/{name}")
    return found


@torch.inference_mode()
def held_out_sums(model: Transformer, data: Prepared, name: str, config: Config, world: World = ALONE) -> Sums:
    """One set: logits in fp32, sums in float64 and whole numbers, never a mean of means. Each rank measures every so many-th batch."""
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    context = config.model.context_length
    rows = max(1, EVALUATION_TOKENS // context)
    lengths = torch.from_numpy(data.byte_lengths)
    nats, tokens, size, correct = 0.0, 0, 0, 0
    batches = held_out_batches(data, name, context, config.data.validation_tokens, rows, documents=model.sees_documents)
    for batch, counts in _dealt(batches, world):
        with autocast(device, config.hardware.precision):
            loss, right = scored(model, batch.to(device), count_right=data.task is not None).tolist()
        if not counts:
            continue
        nats, correct = nats + loss, correct + int(right)
        tokens += batch.tokens
        size += int(lengths[batch.targets].sum())
    model.train(was_training)
    found = world.gather(nats, tokens, size, correct)
    nats, tokens, size, correct = sum(r[0] for r in found), *(int(sum(r[i] for r in found)) for i in (1, 2, 3))
    return Sums(nats, tokens, size, correct if data.task is not None else None)


def _dealt(batches: Iterator[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """The batches of this rank, and whether each counts: all ranks get equally many, since every pass gathers sharded parameters."""
    while round_ := list(itertools.islice(batches, world.size)):
        mine = world.rank < len(round_)
        yield round_[world.rank if mine else 0], mine


def scored(model: Transformer, batch: Batch, *, count_right: bool) -> Tensor:
    """(2,) in float64: the summed loss of a batch, and how many of its scored tokens were the likeliest."""
    targets = batch.targets.reshape(-1)
    weight = None if batch.weight is None else batch.weight.reshape(-1)

    def reduce(features: Tensor, within: Transformer) -> Tensor:
        rows, size = features.reshape(-1, features.shape[-1]), max(1, EVALUATION_LOGITS // within.vocabulary)
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        return torch.stack(
            [
                _sums(within.logits(rows[part]).float(), targets[part], None if weight is None else weight[part], count_right)
                for part in parts
            ]
        ).sum(0)

    sums: Tensor = model(batch.inputs, document=batch.document, reduce=reduce)
    return sums


def _sums(logits: Tensor, targets: Tensor, weight: Tensor | None, count_right: bool) -> Tensor:
    """(2,) in float64: the summed loss of n tokens from logits (n, v), and how many were right."""
    losses = F.cross_entropy(logits, targets, reduction="sum" if weight is None else "none")
    if weight is not None:
        losses = (losses * weight).sum(dtype=torch.float64)
    right = (logits.argmax(-1) == targets) & (weight > 0 if weight is not None else True) if count_right else losses.new_zeros(())
    return torch.stack((losses.double(), right.sum(dtype=torch.float64)))
