"""One dial for size: what `model=dial` leaves open is set from its depth by the rules of this page. `resolve` calls it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.config.schema import Config, ModelConfig

# Width grows with depth: the loss at a given number of parameters hardly depends on their ratio near 64 (Kaplan et al., 2020, figure 5;
# GPT-2's four sizes have 64, 43, 36 and 33).
WIDTH_PER_LAYER = 64
# As in every GPT-2. It stays, and heads grow in number: muP then has nothing to correct in the scores.
HEAD_WIDTH = 64
# Compute-optimal for one pass over web text (Hoffmann et al., 2022).
TOKENS_PER_PARAMETER = 20
# Best batch, in tokens, for a compute of C FLOPs (embeddings left out): 0.2920 · C^0.3271 (Bi et al., 2024, DeepSeek LLM, equation 1;
# fitted from 1e17 to 2e19 FLOPs: dials of about 9 to 20. Smaller ones extrapolate it).
BATCH_FACTOR, BATCH_POWER = 0.2920, 0.3271
# AdamW's rate at RATE_WIDTH: experiment=mup_rates has its best at 8e-3 to 16e-3 at every width. muP makes it hold: each matrix gets it
# times RATE_WIDTH / width, which along the dial is 1 / depth; Bi et al. found C^-0.125, which along the dial is depth^-0.75.
LEARNING_RATE, RATE_WIDTH = 1e-2, 64
CHOICES = ("", "all", "sizes")


def turned(config: Config, ranks: int = 1) -> Config:
    """The config with what its dial sets: width and heads where they are 0, batch and budget where they are `auto`, and with `all` the
    rate of an AdamW that stands at its default. Without a dial the config as it is.

    `ranks`: processes that share a batch evenly. Raises ConfigError for a depth below 1, and a dial that is none of CHOICES.
    """
    model, trainer = config.model, config.trainer
    if model.dial not in CHOICES:
        raise ConfigError(f"model.dial={model.dial} is not one of all, sizes (the learning rate is given) or '' (no dial)")
    if not model.dial:
        return config
    if model.depth < 1:
        raise ConfigError(f"model.depth={model.depth} gives a dial no size: it needs at least 1 (model=bigram has no blocks)")
    width = model.width or width_of(model.depth, max(0, model.heads))
    if width < 1:
        return config  # `resolve` refuses it
    sized = replace(model, width=width, heads=model.heads or heads_of(width))
    free = trainer.batch_tokens == "auto" and model.context_length > 0
    batch = batch_of(sized, ranks) if free else trainer.batch_tokens
    budget = f"{TOKENS_PER_PARAMETER}x" if trainer.budget == "auto" else trainer.budget
    optimizer: Any = config.optimizer
    is_adamw = component_of(optimizer).name == "adamw"  # others' own rates are those of other papers, which muP holds all the same
    if model.dial == "all" and is_adamw and optimizer.learning_rate == type(optimizer)().learning_rate:
        optimizer = replace(optimizer, learning_rate=rate_of(sized))
    return replace(config, model=sized, optimizer=optimizer, trainer=replace(trainer, batch_tokens=batch, budget=budget))


def width_of(depth: int, heads: int = 0) -> int:
    """64 · depth; where the heads are given, the nearest width that gives each an even share (positions that rotate turn pairs)."""
    wanted = WIDTH_PER_LAYER * depth
    return wanted if not heads else max(1, round(wanted / (2 * heads))) * 2 * heads


def heads_of(width: int) -> int:
    """Heads nearest to 64 wide, of an even width where there is one."""
    shares = [h for h in range(1, width + 1) if width % h == 0]
    even = [h for h in shares if width // h % 2 == 0]
    return min(even or shares, key=lambda h: abs(math.log(width / h / HEAD_WIDTH)))


def batch_of(model: ModelConfig, ranks: int = 1) -> int:
    """Tokens of an update: the law's, as the nearest power of two of whole contexts, so that micro-batches divide it.

    Its compute is that of the horizon: 20 tokens for each weight of the blocks, 12 · depth · width², at 72 · depth · width² +
    12 · depth · width · context FLOPs a token, the law's own measure.
    """
    weights = 12 * model.depth * model.width**2
    compute = (6.0 * weights + 12 * model.depth * model.width * model.context_length) * TOKENS_PER_PARAMETER * weights
    rows = 1 << max(0, round(math.log2(BATCH_FACTOR * compute**BATCH_POWER / model.context_length)))
    return -(-rows // ranks) * ranks * model.context_length


def rate_of(model: ModelConfig) -> float:
    """AdamW's rate: one for all widths where the model is parametrised for that; else that of every role falls as 1/width."""
    holds = component_of(model.parametrisation).name != "standard"
    return LEARNING_RATE if holds else LEARNING_RATE * RATE_WIDTH / model.width


def described(config: Config, steps: int | None) -> str:
    """What a resolved config's dial is at, for the terminal."""
    model, rate = config.model, getattr(config.optimizer, "learning_rate", math.nan)
    in_steps = steps is not None and not config.trainer.budget.endswith(("step", "steps"))
    length = f"{config.trainer.budget} = {steps:,} steps" if in_steps else config.trainer.budget
    sizes = f"width {model.width}, {model.heads} head{'s' if model.heads > 1 else ''}"
    return f"dial {model.depth}: {sizes}, batch {int(config.trainer.batch_tokens):,} tokens, learning rate {rate:g}, {length}"
