"""How far a difference depends on the held-out text: a bootstrap over its documents."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptlab.runner.held_out import read_rows
from gptlab.runner.run import Run
from gptlab.study.statistics import CONFIDENCE

FEWEST_DOCUMENTS = 20  # with fewer, as with a single book, stretches of equal length are drawn instead
STRETCHES, MOST_UNITS = 40, 400
RESAMPLES = 2_000


@dataclass(frozen=True)
class TextInterval:
    """The interval of a difference over `units` documents, or stretches, of the held-out set, with these seeds."""

    low: float
    high: float
    units: int
    kind: str


def text_interval(arm: Mapping[int, Run], base: Mapping[int, Run]) -> TextInterval | None:
    """Of the seeds that both have; None where their rows were not kept, or are not the same."""
    rows = [(read_rows(arm[s]), read_rows(base[s])) for s in sorted(arm.keys() & base.keys())]
    kept = [(one, two) for one, two in rows if one is not None and two is not None]
    if not kept or len(kept) < len(rows):
        return None
    first = kept[0][1]
    if any(not np.array_equal(part[key], first[key]) for pair in kept for part in pair for key in ("tokens", "document")):
        return None
    difference = np.mean([one["nats"] - two["nats"] for one, two in kept], axis=0)
    unit, kind = _units(first["document"])
    nats, tokens = (np.bincount(unit, weights=values) for values in (difference, first["tokens"]))
    if len(nats) < 2:
        return None
    drawn = _draws(len(nats))
    low, high = np.quantile(drawn @ nats / np.maximum(drawn @ tokens, 1e-12), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return TextInterval(float(low), float(high), len(nats), kind)


@functools.lru_cache(maxsize=4)
def _draws(units: int) -> npt.NDArray[np.int64]:
    """(RESAMPLES, units): how often each unit is drawn, the same for every arm."""
    return np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)


def _units(document: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], str]:
    """Of each row the number of the unit that is drawn with it."""
    found, unit = np.unique(document, return_inverse=True)
    if len(found) > MOST_UNITS:
        return unit * MOST_UNITS // len(found), "groups of documents"
    if len(found) >= FEWEST_DOCUMENTS:
        return unit, "documents"
    count = min(STRETCHES, len(document))
    return np.arange(len(document)) * count // max(1, len(document)), "stretches"
