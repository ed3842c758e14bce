"""From logits to the next token: what may be drawn, and how likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError, DivergedError


@dataclass(frozen=True)
class Sampling:
    """How a text is drawn.

    The model's logits, after the `repetition_penalty` (Keskar et al., 2019: of what the text holds already), are divided by the
    `temperature` (0: always the likeliest). Then only the `top_k` likeliest tokens are kept (0: all), of these the likeliest that
    together have `top_p` of the probability (Holtzman et al., 2020), and of these the ones at least `min_p` times as likely as the
    likeliest (Nguyen et al., 2024). The text ends after `max_tokens`, before any of the `stop` strings, or at the end-of-text token.
    """

    max_tokens: int = 200
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self, prefix: str = "--") -> Sampling:
        """Itself. Raises ConfigError for a setting that means nothing, by its name: `--top-p 2 must be …`."""
        finite = {name: math.isfinite(getattr(self, name)) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        rules = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (finite["temperature"] and self.temperature >= 0, "at least 0 (0: always the likeliest token)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (finite["top_p"] and 0 < self.top_p <= 1, "above 0 and at most 1 (1: all tokens)"),
            "min_p": (finite["min_p"] and 0 <= self.min_p <= 1, "between 0 and 1 (0: all tokens)"),
            "repetition_penalty": (finite["repetition_penalty"] and self.repetition_penalty > 0, "above 0 (1: none)"),
            "stop": (all(self.stop), "texts of at least one character"),
        }
        for name, (fine, rule) in rules.items():
            if not fine:
                shown = name.replace("_", "-") if prefix else name
                raise ConfigError(f"{prefix}{shown} {getattr(self, name)} must be {rule}")
        return self

    @cached_property  # asked for with every token of every row
    def shape(self) -> Sampling:
        """What decides the distribution, without what is each request's own."""
        return replace(self, max_tokens=1, seed=0, stop=())


def distribution(
    logits: Float[Tensor, "b v"], settings: Sampling, seen: Sequence[Sequence[int]] = ()
) -> tuple[Float[Tensor, "b c"], Int[Tensor, "b c"]]:
    """The probabilities that are drawn from, the likeliest first where some are left out, and the tokens they are of.

    `seen`: what each row's text holds already, for the repetition penalty.
    """
    logits = logits.float()
    if settings.repetition_penalty != 1:
        logits = logits.clone()
        for row, tokens in enumerate(seen):
            known = torch.tensor(sorted(set(tokens)), device=logits.device, dtype=torch.long)
            old = logits[row, known]
            logits[row, known] = torch.where(old > 0, old / settings.repetition_penalty, old * settings.repetition_penalty)
    v = logits.shape[-1]
    if settings.temperature == 0:
        value, best = logits.max(-1, keepdim=True)
        return 1 + 0 * value, best  # no number where the score is none
    logits = logits / settings.temperature
    if 0 < settings.top_k < v:
        logits, places = logits.topk(settings.top_k)
    elif settings.top_p < 1 or settings.min_p > 0:
        logits, places = logits.sort(descending=True)
    else:
        places = torch.arange(v, device=logits.device).expand_as(logits)
    p = logits.softmax(-1)
    if settings.top_p < 1:
        p = torch.where(p.cumsum(-1) - p < settings.top_p, p, 0.0)  # the one that reaches it is kept
    if settings.min_p > 0:
        p = torch.where(p >= settings.min_p * p[:, :1], p, 0.0)
    return p / p.sum(-1, keepdim=True), places


def draw(
    logits: Float[Tensor, "b v"], settings: Sequence[Sampling], generators: Sequence[torch.Generator], seen: Sequence[Sequence[int]] = ()
) -> list[int]:
    """One token a row, each by its own settings and from its own generator: what a row draws does not depend on its neighbours."""
    found = [0] * len(settings)
    groups: dict[Sampling, list[int]] = {}
    for row, own in enumerate(settings):
        groups.setdefault(own.shape, []).append(row)
    for shape, rows in groups.items():
        of = logits if len(rows) == len(settings) else logits[rows]
        p, places = distribution(of, shape, [seen[row] for row in rows] if seen else ())
        if p[:, 0].isnan().any():
            raise DivergedError("what the model says of the next token is not a number: the training that made its weights has diverged")
        if shape.temperature == 0:
            chosen = places[:, 0]
        else:
            uniform = torch.stack([torch.rand(1, generator=generators[row]) for row in rows]).to(p.device)
            bounds = p.double().cumsum(-1)
            # The last that has any probability, where rounding leaves the sum below the number drawn.
            place = torch.searchsorted(bounds, uniform * bounds[:, -1:], right=True).clamp_max((p > 0).sum(-1, keepdim=True) - 1)
            chosen = places.gather(-1, place)[:, 0]
        for row, token in zip(rows, chosen.tolist(), strict=True):
            found[row] = token
    return found
