"""Language modelling: the cross-entropy of the next token."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.record import record
from gptlab.config.registry import register
from gptlab.data.loader import Batch
from gptlab.model.transformer import Transformer

Objective = Callable[[Transformer, Batch], Tensor]


@register("objective", "lm")
def lm(*, z_loss: float = 0.0, chunk: int = 0) -> Objective:
    """Next-token cross-entropy in nats, summed over the batch's tokens by their weight; logits in fp32.

    `z_loss` times the square of log Z, the logits' log-sum-exp, is added for each token (Chowdhery et al., 2022, at 1e-4): it keeps the
    logits from drifting. `train/loss` is then the sum of both, `train/z_loss` the second alone; `val/loss` never holds it. The same
    goes for what parts of the model add, as a load balance: `train/NAME`.
    With `chunk` the logits of so many tokens are held at a time, and not those of the whole micro-batch (0): the same loss and
    gradients in less memory.
    """
    if not 0 <= z_loss < math.inf:
        raise ConfigError(f"objective.z_loss={z_loss} must be at least 0 and finite")
    if chunk < 0:
        raise ConfigError(f"objective.chunk={chunk} must be at least 1 token (0: all at once)")
    return partial(next_token_loss, z_loss=z_loss, chunk=chunk)


def next_token_loss(model: Transformer, batch: Batch, *, z_loss: float = 0.0, chunk: int = 0) -> Tensor:
    """Sum of the weighted losses of a batch: cross-entropy, `z_loss` times the squared log Z, and what the model's parts add."""
    added: dict[str, Tensor] = {}
    targets = batch.targets.reshape(-1)
    weight = None if batch.weight is None else batch.weight.reshape(-1)

    def reduce(features: Tensor, within: Transformer) -> Tensor:
        rows = features.reshape(-1, features.shape[-1])
        if chunk and len(rows) > chunk:
            from gptlab.objective.chunked import summed_by_chunks  # imports torch's compiler, which takes a while

            by_chunks: Tensor = summed_by_chunks(rows, targets, weight, within, partial(token_losses, z_loss=z_loss), chunk)
            return by_chunks
        return token_losses(within.logits(rows), targets, weight, z_loss)

    sums: Tensor = model(batch.inputs, document=batch.document, losses=added, reduce=reduce)
    entropy, z = sums if z_loss else (sums, sums)
    counted: float | Tensor = batch.targets.numel() if weight is None else weight.sum().clamp(min=1e-9)
    total: Tensor = entropy + z if z_loss else entropy  # the chunks' sums have one gradient
    if z_loss:
        record("train/z_loss", z.detach() / counted)
    for name, mean in added.items():
        record(f"train/{name}", mean)
        total = total + mean * counted
    return total


def token_losses(logits: Tensor, targets: Tensor, weight: Tensor | None, z_loss: float) -> Tensor:
    """The sum over n tokens of the cross-entropy; with `z_loss` (2,), beside it that of `z_loss` · log² Z.

    logits (n, v); weight (n,), or None: all 1.
    """
    logits = logits.float()
    if not z_loss:
        entropy = F.cross_entropy(logits, targets, reduction="sum" if weight is None else "none")
        return entropy if weight is None else (entropy * weight).sum()
    partition = logits.logsumexp(-1)
    entropies, z = partition - logits.gather(-1, targets[:, None])[:, 0], z_loss * partition.square()
    return torch.stack([(values if weight is None else values * weight).sum() for values in (entropies, z)])
