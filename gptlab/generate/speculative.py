"""Speculative decoding: something cheap proposes several tokens, the model judges them all in one pass, and what comes out is exactly
what the model alone would have drawn from (Leviathan et al., 2023; Chen et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.generate.sampling import Sampling, distribution
from gptlab.model.cache import KVCache
from gptlab.model.input import Smear
from gptlab.model.transformer import Transformer

LONGEST_MATCH = 3  # tokens of the text's end that prompt look-up looks for


class Proposer(Protocol):
    """Whatever says what may come next."""

    def propose(self, tokens: Sequence[int], count: int, generator: torch.Generator) -> tuple[list[int], Float[Tensor, "n v"]]:
        """Up to `count` tokens after these, and the probabilities that each was drawn from."""
        ...


@dataclass
class Told:
    """What speculating came to: tokens made, passes of the model, and of the proposed tokens how many were taken."""

    tokens: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0


class _Reader:
    """A model that has read a text, and reads on from wherever it goes on as before."""

    def __init__(self, model: Transformer, prompt: int) -> None:
        self.model, self.context = model, model.config.context_length
        self._cache: KVCache = model.new_cache(1, self.context)
        self._read: list[int] = []
        self._begin = max(0, prompt - self.context)  # of the text, what came before is forgotten

    def room(self, tokens: Sequence[int]) -> int:
        """How many more tokens the context holds after these. Where they are too many their older half is forgotten, as the engine does."""
        if len(tokens) - self._begin > self.context:
            self._begin = len(tokens) - max(1, self.context // 2)
            self._cache, self._read = self.model.new_cache(1, self.context), []
        return self.context - (len(tokens) - self._begin)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], count: int) -> Float[Tensor, "n v"]:
        """Logits of the token after each of the last `count` tokens, which fit the context."""
        seen = list(tokens[self._begin :])
        known = 0
        for a, b in zip(self._read, seen, strict=False):
            if a != b:
                break
            known += 1
        known = min(known, len(seen) - count)
        if known < len(self._read):
            self._cache.rewind([known])
        new = torch.tensor([seen[known:]], device=self.model.embedding.weight.device)
        self._read = seen
        found: Tensor = self.model(new, cache=self._cache, reduce=lambda features, model: model.logits(features[0, -count:]))
        return found


class Draft:
    """A smaller model of the same tokens proposes what it would draw itself, by the same settings."""

    def __init__(self, model: Transformer, settings: Sampling) -> None:
        _check(model)
        self._reader, self._settings = _Reader(model, 0), settings

    def propose(self, tokens: Sequence[int], count: int, generator: torch.Generator) -> tuple[list[int], Float[Tensor, "n v"]]:
        text, rows = list(tokens), [torch.zeros(0, self._reader.model.vocabulary, device=self._reader.model.embedding.weight.device)]
        for _ in range(count):
            self._reader.room(text)
            p = _spread(self._reader.logits(text, 1), self._settings, [text])
            rows.append(p)
            text.append(_drawn(p[0], generator))
        return text[len(tokens) :], torch.cat(rows)


class Lookup:
    """What followed when the text's last few tokens stood there before: for texts that repeat themselves or their prompt (Saxena, 2023)."""

    def __init__(self, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self._vocabulary, self._device = vocabulary, device

    def propose(self, tokens: Sequence[int], count: int, generator: torch.Generator) -> tuple[list[int], Float[Tensor, "n v"]]:
        text = list(tokens)
        for length in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
            end = text[-length:]
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == end:
                    found = text[start + length : start + length + count]
                    certain = torch.zeros(len(found), self._vocabulary, device=self._device)
                    certain[range(len(found)), found] = 1.0
                    return found, certain
        return [], torch.zeros(0, self._vocabulary, device=self._device)


def speculate(
    model: Transformer,
    prompt: Sequence[int],
    settings: Sampling,
    proposer: Proposer,
    *,
    ahead: int = 4,
    end: int | None = None,
    told: Told | None = None,
) -> Iterator[int]:
    """Token ids after a prompt, distributed as the model alone would draw them; `told` counts what it took. `ahead`: tokens proposed
    at a time.

    Raises ConfigError for settings that mean nothing, or a model that cannot go back in its text (a sliding window, model/input=smear).
    """
    settings.check()
    _check(model)
    if not len(prompt):
        raise ConfigError("the prompt is empty; give at least one character")
    if not 1 <= ahead < model.config.context_length // 2:
        raise ConfigError(f"--ahead {ahead} must be at least 1 and less than half of the context of {model.config.context_length}")
    told, generator = told or Told(), torch.Generator().manual_seed(settings.seed)
    reader, text, made = _Reader(model, len(prompt)), list(prompt), 0
    while made < settings.max_tokens:
        proposed, q = proposer.propose(text, min(ahead, settings.max_tokens - made - 1, reader.room(text)), generator)
        logits = reader.logits([*text, *proposed], len(proposed) + 1)
        told.passes, told.proposed = told.passes + 1, told.proposed + len(proposed)
        p = _spread(logits, settings, [[*text, *proposed[:i]] for i in range(len(proposed) + 1)])
        for token in _judged(p, q, proposed, generator, told):
            if token == end:
                return
            yield token
            text.append(token)
            made += 1
            told.tokens += 1


def _judged(p: Tensor, q: Tensor, proposed: Sequence[int], generator: torch.Generator, told: Told) -> Iterator[int]:
    """The proposed tokens up to the first that is refused, and one that the model draws in its place, or after them."""
    for i, token in enumerate(proposed):
        if float(torch.rand(1, generator=generator)) * float(q[i, token]) >= float(p[i, token]):
            yield _drawn((p[i] - q[i]).clamp_min(0), generator)
            return
        told.accepted += 1
        yield token
    yield _drawn(p[-1], generator)


def _spread(logits: Float[Tensor, "n v"], settings: Sampling, seen: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
    p, places = distribution(logits, settings, seen)
    return torch.zeros(logits.shape, device=p.device, dtype=p.dtype).scatter(1, places, p)


def _drawn(weights: Float[Tensor, " v"], generator: torch.Generator) -> int:
    """A token by weights that need not sum to one."""
    bounds = weights.double().cumsum(0)
    number = torch.rand(1, generator=generator, dtype=torch.float64).to(bounds.device) * bounds[-1]
    place = int(torch.searchsorted(bounds, number, right=True))
    return min(place, int(weights.nonzero()[-1]))


def _check(model: Transformer) -> None:
    cache = model.new_cache(1, model.config.context_length)
    if any(size < cache.capacity for size in cache.sizes):
        raise ConfigError("a model with a sliding window (model.attention.window) cannot take proposed tokens back: it forgets")
    if isinstance(model.input, Smear):
        raise ConfigError("model/input=smear cannot take proposed tokens back: it keeps the last token alone")
