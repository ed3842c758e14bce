"""Sampling: from logits to the next token, and from a prompt to a text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.model.transformer import Transformer


def check_settings(max_tokens: int, temperature: float, top_k: int) -> None:
    """Raise ConfigError for settings that mean nothing."""
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature {temperature} must be at least 0 (0: always the likeliest token)")
    if top_k < 0:
        raise ConfigError(f"--top-k {top_k} must be at least 0 (0: all tokens)")


def next_token(logits: Float[Tensor, v], temperature: float, top_k: int, generator: torch.Generator) -> int:  # noqa: F821
    """Draw one token id. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu() / temperature
    if 0 < top_k < logits.numel():
        best, places = logits.topk(top_k)
        return int(places[torch.multinomial(best.softmax(-1), 1, generator=generator)])
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Token ids after a prompt, one by one. The model sees the last context_length tokens; `stop` ends the text.

    While everything fits the context a cache feeds each token once; beyond it the window slides and is read anew.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    context = model.config.context_length
    tokens = list(prompt)
    cache = model.new_cache(1, context) if model.config.depth and len(tokens) <= context else None
    pending: Int[Tensor, "1 t"] = torch.tensor([tokens[-context:]], device=device)
    try:
        for _ in range(max_tokens):
            logits = model(pending, cache=cache)[0, -1]
            token = next_token(logits, temperature, top_k, generator)
            if token == stop:
                return
            yield token
            tokens.append(token)
            if cache is not None and len(tokens) <= context:
                pending = torch.tensor([[token]], device=device)
            else:
                cache, pending = None, torch.tensor([tokens[-context:]], device=device)
    finally:
        model.train(was_training)
