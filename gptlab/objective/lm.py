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
def lm(*, z_loss: float = 0.0) -> Objective:
    """Next-token cross-entropy in nats, summed over the batch's tokens by their weight; logits in fp32.

    `z_loss` times the square of log Z, the logits' log-sum-exp, is added for each token (Chowdhery et al., 2022, at 1e-4): it keeps the
    logits from drifting. `train/loss` is then the sum of both, `train/z_loss` the second alone; `val/loss` never holds it.
    """
    if not 0 <= z_loss < math.inf:
        raise ConfigError(f"objective.z_loss={z_loss} must be at least 0 and finite")
    return partial(with_z_loss, share=z_loss) if z_loss else next_token_loss


def with_z_loss(model: Transformer, batch: Batch, *, share: float) -> Tensor:
    """Sum of the weighted cross-entropies and of `share` times their squared log-partition functions."""
    logits = model(batch.inputs, document=batch.document)
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), batch.targets.reshape(-1)
    partition = flat.logsumexp(-1)
    right = flat.gather(-1, targets[:, None])[:, 0]
    weight = torch.ones_like(partition) if batch.weight is None else batch.weight.reshape(-1)
    z = share * (partition.square() * weight).sum()
    record("train/z_loss", z.detach() / weight.sum().clamp(min=1e-9))
    total: Tensor = ((partition - right) * weight).sum() + z
    return total


def next_token_loss(model: Transformer, batch: Batch) -> Tensor:
    """Sum of the weighted cross-entropies of a batch."""
    logits = model(batch.inputs, document=batch.document)
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), batch.targets.reshape(-1)
    if batch.weight is None:
        return F.cross_entropy(flat, targets, reduction="sum")
    losses = F.cross_entropy(flat, targets, reduction="none")
    return (losses * batch.weight.reshape(-1)).sum()
