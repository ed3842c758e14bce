"""The held-out loss: every arm of a study is measured on the same tokens, in the same windows."""

from __future__ import annotations

import torch

from gptlab.config.schema import Config
from gptlab.data.loader import evaluation_batches
from gptlab.data.shard import TokenStream
from gptlab.hardware.precision import autocast
from gptlab.model.transformer import Transformer
from gptlab.objective.lm import next_token_loss

EVALUATION_TOKENS = 8192  # of one forward pass


@torch.inference_mode()
def validation_loss(model: Transformer, stream: TokenStream, config: Config) -> float:
    """Mean cross-entropy in nats a token: logits in fp32, sum and count in float64, never a mean of means."""
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    context = config.model.context_length
    total, count = 0.0, 0
    for batch in evaluation_batches(stream, context, config.data.validation_tokens, max(1, EVALUATION_TOKENS // context)):
        with autocast(device, config.hardware.precision):
            total += float(next_token_loss(model, batch.to(device)).double())
        count += batch.tokens
    model.train(was_training)
    return total / count
