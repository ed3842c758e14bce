"""Beam search: of many texts at once the likeliest, by the sum of its tokens' log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptlab.config.errors import ConfigError
from gptlab.model.transformer import Transformer


@dataclass(frozen=True)
class Beam:
    """A text after the prompt, without its end token, and its log-probability with it. `score` is what texts are ranked by."""

    tokens: list[int]
    logprob: float
    score: float


@torch.inference_mode()
def beam_search(
    model: Transformer, prompt: Sequence[int], *, beams: int, max_tokens: int, end: int | None = None, length_penalty: float = 1.0
) -> list[Beam]:
    """The best `beams` texts, the best first. A text's score is its log-probability over its length to the `length_penalty` (Wu et al.,
    2016; 0: long texts are not favoured).

    Raises ConfigError for counts below 1, an empty prompt, or more tokens than the context holds after it.
    """
    context, device = model.config.context_length, model.embedding.weight.device
    for name, value in (("beams", beams), ("max-tokens", max_tokens)):
        if value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    if not len(prompt):
        raise ConfigError("the prompt is empty; give at least one character")
    if len(prompt) + max_tokens - 1 > context:
        raise ConfigError(f"--beams: a prompt of {len(prompt)} tokens and {max_tokens} new ones do not fit the context of {context}")
    was_training = model.training
    model.eval()
    cache = model.new_cache(1, context)
    logits = model(torch.tensor([list(prompt)], device=device), cache=cache)[:, -1]
    open_, finished = [(list[int](), 0.0)], list[Beam]()
    for step in range(1, max_tokens + 1):
        totals = torch.tensor([total for _, total in open_], device=device)[:, None] + logits.float().log_softmax(-1)
        # Twice as many as there are beams: if all of these end, as many go on.
        best, places = totals.flatten().topk(min(2 * beams, totals.numel()))
        kept: list[tuple[int, int, float]] = []
        for total, place in zip(best.tolist(), places.tolist(), strict=True):
            row, token = divmod(place, totals.shape[1])
            if token == end or step == max_tokens:
                tokens = open_[row][0] + [token] * (token != end)
                finished.append(Beam(tokens, total, total / step**length_penalty))
            elif len(kept) < beams:
                kept.append((row, token, total))
        finished = sorted(finished, key=lambda b: -b.score)[:beams]
        if not kept:
            break
        # What is open can at best stay as likely as it is, and is as long as it may become where that helps.
        ahead = kept[0][2] / (max_tokens if length_penalty > 0 else step) ** length_penalty
        if len(finished) == beams and finished[-1].score >= ahead:
            break
        open_ = [(open_[row][0] + [token], total) for row, token, total in kept]
        cache.select([row for row, _, _ in kept])
        logits = model(torch.tensor([[token] for _, token, _ in kept], device=device), cache=cache)[:, -1]
    model.train(was_training)
    return finished
