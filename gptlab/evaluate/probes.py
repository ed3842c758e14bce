"""Probes that need no download: choices between texts of which one is right, scored by the model's log-likelihood of each whole text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gptlab.config.errors import ConfigError, GptlabError
from gptlab.config.registry import suggest
from gptlab.data.loader import Batch
from gptlab.data.tokenizer import Tokenizer
from gptlab.evaluate import skills
from gptlab.evaluate.losses import judged
from gptlab.evaluate.pairs import PHENOMENA, pairs
from gptlab.evaluate.results import Score, share
from gptlab.model.transformer import Transformer
from gptlab.runner.validation import EVALUATION_TOKENS

TEXTS: dict[str, Callable[[], Sequence[skills.Texts]]] = {
    **{name: (lambda name=name: pairs(name)) for name in PHENOMENA},  # type: ignore[misc]
    "facts/english": lambda: skills.facts("english"),
    "facts/german": lambda: skills.facts("german"),
    "arithmetic": skills.arithmetic,
    **{f"addition/{n}": (lambda n=n: skills.addition(n)) for n in (1, 2, 3)},  # type: ignore[misc]
    "recall/english": lambda: skills.recall("english"),
    "recall/german": lambda: skills.recall("german"),
}
TOKENS = ("induction", *(f"copying/{distance}" for distance in skills.DISTANCES))
NAMES = (*TEXTS, *TOKENS)
GROUPS = tuple(dict.fromkeys(name.partition("/")[0] for name in NAMES))
POOLED = ("english", "german")  # all phenomena of a language together, as one figure


@dataclass(frozen=True)
class _Items:
    name: str
    items: list[tuple[skills.Ids, ...]]  # of each the right text first
    skipped: int = 0


def chosen(asked: Sequence[str]) -> list[str]:
    """The names of probes from names and groups of them, or `all`. Raises ConfigError, naming the nearest."""
    found: dict[str, None] = {}
    for one in asked:
        here = [name for name in NAMES if one in ("all", name, name.partition("/")[0])]
        if not here:
            raise ConfigError(f"probes {one!r}: no such probe{suggest(one, (*GROUPS, *NAMES))}; there are all, {', '.join(GROUPS)}")
        found |= dict.fromkeys(here)
    return list(found)


def probe(model: Transformer, tokenizer: Tokenizer, asked: Sequence[str] = ("all",), *, limit: int = 0) -> list[Score]:
    """The share of each probe's items in which the right text is likelier than every other, half a point where two are equally likely.

    Of a text longer than the context each token is seen behind at least half a context. What the tokeniser cannot write is skipped, and
    counted; of a probe that is left without an item there is no score. `limit`: items of each at most (0: all).
    Raises ConfigError for an unknown probe, or where no item at all is left.
    """
    sets = [_items(name, tokenizer, model.config.context_length, limit) for name in chosen(asked)]
    sets = [one for one in sets if one.items or one.skipped]
    if not any(one.items for one in sets):
        raise ConfigError(f"probes {', '.join(asked)}: the tokeniser cannot write a single one of their texts, or the context is too short")
    texts = [text for one in sets for item in one.items for text in item]
    likely = iter(log_likelihoods(model, begin_ids(tokenizer), texts).tolist())
    marks = {one.name: [_mark([next(likely) for _ in item]) for item in one.items] for one in sets}
    found = []
    for one in sets:
        if one.items:
            found.append(share(one.name, marks[one.name], chance=1 / len(one.items[0]), skipped=one.skipped))
    for language in POOLED:
        parts = [one for one in sets if one.name in PHENOMENA and one.name.startswith(f"{language}/") and one.items]
        if len(parts) > 1:
            together = [mark for one in parts for mark in marks[one.name]]
            place = next(i for i, score in enumerate(found) if score.task.startswith(f"{language}/"))
            found.insert(place, share(language, together, chance=0.5, skipped=sum(one.skipped for one in parts)))
    return found


def _items(name: str, tokenizer: Tokenizer, context: int, limit: int) -> _Items:
    if name in TEXTS:
        found, skipped = [], 0
        for texts in TEXTS[name]()[: limit or None]:
            try:
                found.append(tuple(tuple(int(token) for token in tokenizer.encode(text)) for text in texts))
            except GptlabError:  # a character that it lacks
                skipped += 1
        return _Items(name, found, skipped)
    if name == "induction":
        return _Items(name, skills.induction(tokenizer, context)[: limit or None])
    distance = int(name.partition("/")[2])
    return _Items(name, skills.copying(tokenizer, distance)[: limit or None] if distance + 1 <= context else [])


def _mark(likely: Sequence[float]) -> float:
    right, best = likely[0], max(likely)
    return 1 / likely.count(best) if right == best else 0.0


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """What stands before every text: the token for that, that which ends texts, or a new line; nothing where there is none of them."""
    for token in (getattr(tokenizer, "begin_of_text", None), tokenizer.end_of_text):
        if token is not None:
            return [int(token)]
    try:
        return [int(token) for token in tokenizer.encode("\n")]
    except GptlabError:
        return []


@torch.inference_mode()
def log_likelihoods(model: Transformer, begin: Sequence[int], texts: Sequence[skills.Ids]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(n,): the log-probability of each text's tokens behind `begin`; without it the first token is seen and not scored."""
    was_training = model.training
    model.eval()
    device, context = model.embedding.weight.device, model.config.context_length
    windows = [(number, part, known) for number, text in enumerate(texts) for part, known in _windows((*begin, *text), context)]
    windows.sort(key=lambda window: len(window[1]))
    found = np.zeros(len(texts))
    for batch in _batches(windows):
        length = len(batch[-1][1])
        rows = torch.tensor([[*part, *[0] * (length - len(part))] for _, part, _ in batch], device=device)
        nats, _, _ = judged(model, Batch(inputs=rows[:, :-1], targets=rows[:, 1:], weight=None, document=None))
        for (number, part, known), row in zip(batch, nats, strict=True):
            found[number] -= float(row[known : len(part) - 1].sum())
    model.train(was_training)
    return found


def _windows(ids: Sequence[int], context: int) -> Iterator[tuple[Sequence[int], int]]:
    """(tokens, how many of their predictions are scored elsewhere) of windows that score every token once."""
    stride = max(1, context // 2)
    for start in range(0, max(1, len(ids) - 1 - context + stride), stride):
        part = ids[start : start + context + 1]
        if len(part) > 1:
            yield part, context - stride if start else 0


def _batches(windows: Sequence[tuple[int, Sequence[int], int]]) -> Iterator[Sequence[tuple[int, Sequence[int], int]]]:
    """Windows sorted by length in batches of so many tokens at most."""
    start = 0
    while start < len(windows):
        end = start + 1
        while end < len(windows) and (end + 1 - start) * len(windows[end][1]) <= EVALUATION_TOKENS:
            end += 1
        yield windows[start:end]
        start = end
