"""Supervised fine-tuning: the next token's cross-entropy, on what the assistant wrote alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.config.schema import Config
from gptlab.data.loader import Batch
from gptlab.data.prepared import Prepared
from gptlab.model.lora import add_adapters
from gptlab.model.transformer import Transformer
from gptlab.objective.lm import next_token_loss
from gptlab.objective.protocol import Objective


class Adapting(Objective):
    """An objective that trains a model that was trained before: all of it, all but its embeddings, or adapters beside it."""

    def __init__(self, embeddings: str, lora_rank: int, lora_alpha: float, lora_targets: tuple[str, ...]) -> None:
        if lora_rank < 0:
            raise ConfigError(f"objective.lora_rank={lora_rank} must be at least 0 (0: no adapters, all weights are trained)")
        if not 0 < lora_alpha < math.inf:
            raise ConfigError(f"objective.lora_alpha={lora_alpha} must be above 0 and finite")
        self.embeddings, self.lora_rank, self.lora_alpha, self.lora_targets = embeddings, lora_rank, lora_alpha, lora_targets

    def adapt(self, model: Transformer, seed: int, new_tokens: int) -> None:
        """Raises ConfigError where new tokens would stay frozen as they were made: all alike, so that none is ever told from another."""
        if self.embeddings == "freeze" and new_tokens > 1:
            raise ConfigError(
                f"objective.embeddings=freeze: {new_tokens} tokens are new to this model, and their embeddings are all the mean of the "
                "others; objective.embeddings=auto trains them"
            )
        if self.lora_rank:
            add_adapters(model, self.lora_rank, self.lora_alpha, self.lora_targets, seed)
        train = {"train": True, "freeze": False}.get(self.embeddings, not self.lora_rank or new_tokens > 0)
        roles = model.roles()
        for path, parameter in model.named_parameters():
            if roles[path] in ("embedding", "head"):  # beside adapters those of tokens alone, and not of positions
                parameter.requires_grad_(train and (not self.lora_rank or path.startswith(("embedding.", "head."))))


@register("objective", "sft")
class SFT(Adapting):
    """Next-token cross-entropy in nats on the assistant's tokens alone; for chats (data/corpus=chat, smoltalk, …).

    embeddings    `train`, `freeze`, or `auto`: trained, but beside adapters only where there are tokens that are new to the model
    lora_rank     above 0: adapters of that rank are trained and the rest stays (Hu et al., 2021); whoever opens the run finds them merged
    lora_alpha    adapters are scaled by alpha / rank
    lora_targets  which products have one: attention, ffn
    chunk         as of objective=lm
    """

    def __init__(
        self,
        *,
        embeddings: Literal["auto", "train", "freeze"] = "auto",
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_targets: tuple[str, ...] = ("attention", "ffn"),
        chunk: int = 0,
    ) -> None:
        super().__init__(embeddings, lora_rank, lora_alpha, lora_targets)
        if chunk < 0:
            raise ConfigError(f"objective.chunk={chunk} must be at least 1 token (0: all at once)")
        self.chunk = chunk

    def __call__(self, model: Transformer, batch: Batch) -> Tensor:
        return next_token_loss(model, batch, chunk=self.chunk)

    def outlined(self, batch: Batch) -> Batch:
        """Chats are told apart, and their tokens weighed."""
        return Batch(batch.inputs, batch.targets, torch.ones_like(batch.inputs, dtype=torch.float32), torch.zeros_like(batch.inputs))

    def check(self, data: Prepared, config: Config) -> None:
        super().check(data, config)
        if not data.chat:
            raise ConfigError(
                "objective=sft learns from an assistant's answers, and this data is text; choose data/corpus=chat, or objective=lm"
            )
