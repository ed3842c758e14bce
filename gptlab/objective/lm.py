"""Language modelling: the cross-entropy of the next token."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from gptlab.config.registry import register
from gptlab.data.loader import Batch
from gptlab.model.transformer import Transformer

Objective = Callable[[Transformer, Batch], Tensor]


@register("objective", "lm")
def lm() -> Objective:
    """Next-token cross-entropy in nats, summed over the batch's tokens by their weight; logits in fp32."""
    return next_token_loss


def next_token_loss(model: Transformer, batch: Batch) -> Tensor:
    """Sum of the weighted cross-entropies of a batch."""
    logits = model(batch.inputs, document=batch.document)
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), batch.targets.reshape(-1)
    if batch.weight is None:
        return F.cross_entropy(flat, targets, reduction="sum")
    losses = F.cross_entropy(flat, targets, reduction="none")
    return (losses * batch.weight.reshape(-1)).sum()
