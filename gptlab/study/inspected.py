"""What the arms of a study hold within: the measures of callback=insight of every finished run, and their differences over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptlab.config.errors import ConfigError, DataError
from gptlab.data.loader import Batch, held_out_batches
from gptlab.data.prepared import Prepared
from gptlab.interpret.heads import LONGEST, repeat_length, repeated_tokens
from gptlab.interpret.insight import of_heads, of_text
from gptlab.interpret.own_text import own_text
from gptlab.model.transformer import meta_model
from gptlab.runner.load import Loaded, load
from gptlab.study.compare import Arm, base_of, collect, tokenizers
from gptlab.study.statistics import Interval, mean_interval, paired
from gptlab.study.tables import markdown as as_markdown
from gptlab.study.tables import table as as_table

TOKENS, LENS_TOKENS, ROWS = 4096, 1024, 8
MEASURES = {
    "induction": "induction score, best head",
    "previous_token": "previous-token score, best head",
    "duplicate_token": "duplicate-token score, best head",
    "entropy": "attention entropy, nats",
    "lens_depth": "lens depth, layers",
    "in_context_loss": "in-context loss, nats",
    "residual_norm": "norm of the last stream",
    "weight_norm": "norm of the weights",
}
HEAD = ("measure, mean with 95 %", "arm", "seeds", "mean", "difference")


@dataclass(frozen=True)
class Measured:
    """One measure of one arm: over its seeds, and its paired difference from the baseline's (None of the baseline)."""

    measure: str
    arm: str
    mean: Interval
    difference: Interval | None


def inspect_study(study: str, *, baseline: str | None = None) -> tuple[list[Measured], list[str]]:
    """Every measure of every arm, and notes. Each finished run is opened at its newest checkpoint.

    Raises ConfigError for an unknown study or baseline, and for arms with two tokenisers, whose tokens are not the same.
    """
    arms, _ = collect(study)
    if not arms:
        raise ConfigError(f"study {study!r} has no finished run to look into yet")
    if len(tokenizers(arms)) > 1:
        names = " and ".join(repr(arm.label) for arm in arms)
        raise ConfigError(f"--inspect: the arms {names} do not share one tokeniser: scores on other tokens, and texts of other lengths, "
                          "cannot be compared; give arms of one tokeniser")  # fmt: skip
    base = base_of(study, arms, baseline)
    notes: dict[str, None] = {}
    length = _length(arms)
    found = {arm.key: {seed: _measure(load(run), length, notes) for seed, run in arm.runs.items()} for arm in arms}
    told = []
    for name in MEASURES:
        for arm in (base, *(a for a in arms if a is not base)):
            values = {seed: one[name] for seed, one in found[arm.key].items() if name in one}
            if values:
                against = {seed: one[name] for seed, one in found[base.key].items() if name in one}
                made = None if arm is base else paired(values, against)
                told.append(Measured(name, arm.label, mean_interval(list(values.values())), made.interval() if made else None))
    return told, list(notes)


def _length(arms: Sequence[Arm]) -> int | None:
    """Of the random tokens that stand twice: the smallest that a model with heads would have, since their length alone changes scores."""
    configs = [run.config().model for arm in arms for run in arm.runs.values()]
    lengths = [repeat_length(meta_model(config, LONGEST)) for config in configs if config.depth]
    return min((length for length in lengths if length >= 2), default=None)


def _measure(loaded: Loaded, length: int | None, notes: dict[str, None]) -> dict[str, float]:
    """The measures that a model has; of what it has not, a note says why. `length`: of the random tokens that stand twice."""
    model = loaded.model
    found: dict[str, torch.Tensor] = {}
    try:
        own = repeat_length(model)
        found |= of_heads(model, repeated_tokens(model, rows=ROWS, length=own if length is None else min(own, length)))
    except ConfigError as error:
        notes[f"no scores of heads: {error}"] = None
    try:
        prepared, name = own_text(loaded)
    except DataError as error:
        notes[f"no lens depth and no in-context loss of a run: {error}"] = None
    else:
        found |= of_text(model, _batch(loaded, prepared, name), LENS_TOKENS, chat=prepared.chat)
        if model.blocks:
            found["residual_norm"] = found[f"residual_norm/{len(model.blocks) - 1}"]
    numbers = {name: float(value) for name, value in found.items() if name in MEASURES}
    return numbers | {"weight_norm": math.sqrt(math.fsum(float(p.detach().double().square().sum()) for p in model.parameters()))}


def _batch(loaded: Loaded, prepared: Prepared, name: str) -> Batch:
    """The run's held-out text, always the same."""
    context = loaded.config.model.context_length
    rows = max(1, TOKENS // context)
    return next(held_out_batches(prepared, name, context, rows * context, rows, documents=loaded.model.sees_documents))


def _lines(found: Sequence[Measured]) -> list[tuple[str, ...]]:
    def told(interval: Interval | None, sign: str = "") -> str:
        if interval is None:
            return ""
        return f"{interval.mean:{sign}.4f}" + ("" if interval.half is None else f" ± {interval.half:.4f}")

    first = {m.measure: m.arm for m in reversed(found)}
    return [
        (
            MEASURES[m.measure] if first[m.measure] == m.arm else "",
            m.arm,
            str(m.mean.n),
            told(m.mean),
            "baseline" if first[m.measure] == m.arm and m.difference is None else told(m.difference, "+"),
        )
        for m in found
    ]


TITLE = "within the models (scores on random tokens twice over, the rest on held-out text)"


def table(found: Sequence[Measured]) -> Any:
    """For a terminal."""
    return as_table(TITLE, HEAD, _lines(found))


def markdown(found: Sequence[Measured]) -> str:
    """In markdown, with its title above it."""
    return as_markdown(TITLE, HEAD, _lines(found))
