"""The held-out loss: every arm of a study is measured on the same tokens, in the same windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config.schema import Config
from gptlab.data.loader import Batch, held_out_batches, held_out_documents
from gptlab.data.prepared import Prepared
from gptlab.hardware.precision import autocast
from gptlab.hardware.world import World
from gptlab.model.transformer import Transformer
from gptlab.tracker.protocol import Metrics

ALONE = World()
EVALUATION_TOKENS = 8192  # of one forward pass


@dataclass(frozen=True)
class Rows:
    """(rows,) each: the nats and the tokens of every row of a held-out set, and the number of the document it begins in."""

    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]
    document: npt.NDArray[np.int64]

    def __add__(self, other: Rows) -> Rows:
        behind = other.document + (self.document.max() + 1 if len(self.document) else 0)
        pairs = (self.nats, other.nats), (self.tokens, other.tokens), (self.document, behind)
        return Rows(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True)
class Sums:
    """What was measured of a held-out set, to be added to that of another."""

    nats: float
    tokens: int
    bytes: int
    correct: int | None = None  # tokens that were the likeliest; of a generated task alone
    rows: Rows = field(default_factory=lambda: Rows(np.zeros(0), np.zeros(0), np.zeros(0, np.int64)), compare=False)

    def __add__(self, other: Sums) -> Sums:
        correct = None if self.correct is None or other.correct is None else self.correct + other.correct
        return Sums(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes, correct, self.rows + other.rows)

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
    return metrics_of(measured_sets(model, data, config, world))


def metrics_of(sets: Mapping[str, Sums]) -> Metrics:
    """`val/loss`, `val/NAME/loss`, … of what `measured_sets` found."""
    found: Metrics = {}
    for name, sums in sets.items():
        found |= sums.metrics("val" if name == "val" else f"val/{name}")
    return found


def measured_sets(model: Transformer, data: Prepared, config: Config, world: World = ALONE) -> dict[str, Sums]:
    """The sums of every held-out set, `val` first."""
    parts = {name: held_out_sums(model, data, name, config, world) for name in data.validation_names if name != "val" or not data.parts}
    if data.parts:
        whole = Sums(0.0, 0, 0)
        for name in data.parts:
            whole = whole + parts[name]
        parts = {"val": whole, **parts}
    return parts


@torch.inference_mode()
def held_out_sums(model: Transformer, data: Prepared, name: str, config: Config, world: World = ALONE) -> Sums:
    """One set: logits in fp32, sums in float64 and whole numbers, never a mean of means. Each rank measures every so many-th batch."""
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    context = config.model.context_length
    rows = max(1, EVALUATION_TOKENS // context)
    lengths = torch.from_numpy(data.byte_lengths)
    size, correct = 0, 0
    own: list[tuple[int, float, float]] = []  # row, nats, tokens
    limit = config.data.validation_tokens
    batches = held_out_batches(data, name, context, limit, rows, documents=model.sees_documents)
    for number, batch, counts in _dealt(batches, world):
        with autocast(device, config.hardware.precision):
            sums = scored(model, batch.to(device), count_right=data.task is not None).tolist()
        if not counts:
            continue
        weights = [float(batch.targets.shape[1])] * len(sums) if batch.weight is None else batch.weight.sum(1).tolist()
        own += [(number * rows + i, nats, weight) for i, ((nats, _), weight) in enumerate(zip(sums, weights, strict=True))]
        correct += int(sum(right for _, right in sums))
        size += int((lengths[batch.targets] if batch.weight is None else lengths[batch.targets] * (batch.weight > 0)).sum())
    model.train(was_training)
    found = world.gather(size, correct)
    size, correct = (int(sum(r[i] for r in found)) for i in (0, 1))
    told = np.array(sorted(_gathered(own, world)))
    measured = Rows(told[:, 1], told[:, 2], held_out_documents(data, name, context, limit))
    right = correct if data.task is not None else None
    return Sums(math.fsum(measured.nats), int(measured.tokens.sum()), size, right, measured)


def _gathered(own: list[tuple[int, float, float]], world: World) -> list[tuple[float, ...]]:
    """The rows of all ranks."""
    most = int(max(count for (count,) in world.gather(len(own))))
    padded = [value for row in own for value in row] + [-1.0] * 3 * (most - len(own))
    flat = [value for rank in world.gather(*padded) for value in rank]
    return [row for row in zip(flat[::3], flat[1::3], flat[2::3], strict=True) if row[0] >= 0]


def _dealt(batches: Iterator[Batch], world: World) -> Iterator[tuple[int, Batch, bool]]:
    """The batches of this rank, their numbers, and whether each counts: all ranks get equally many, since every pass gathers parameters."""
    for first in itertools.count(0, world.size):
        round_ = list(itertools.islice(batches, world.size))
        if not round_:
            return
        mine = world.rank < len(round_)
        yield first + world.rank, round_[world.rank if mine else 0], mine


def scored(model: Transformer, batch: Batch, *, count_right: bool) -> Tensor:
    """(b, 2) in float64: the summed loss of each row of a batch, and how many of its scored tokens were the likeliest."""
    targets = batch.targets.reshape(-1)
    weight = None if batch.weight is None else batch.weight.reshape(-1)

    def reduce(features: Tensor, within: Transformer) -> Tensor:
        parts = within.logits_by_parts(features.reshape(-1, features.shape[-1]))
        each = [_each(logits, targets[part], None if weight is None else weight[part], count_right) for part, logits in parts]
        return torch.cat(each).view(*batch.targets.shape, 2).sum(1, dtype=torch.float64)

    sums: Tensor = model(batch.inputs, document=batch.document, reduce=reduce)
    return sums


def _each(logits: Tensor, targets: Tensor, weight: Tensor | None, count_right: bool) -> Tensor:
    """(n, 2): the loss of n tokens from logits (n, v), and whether each was right."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    if weight is not None:
        losses = losses * weight
    right = (logits.argmax(-1) == targets) & (weight > 0 if weight is not None else True) if count_right else torch.zeros_like(losses)
    return torch.stack((losses, right.to(losses.dtype)), -1)
