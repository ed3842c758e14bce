"""A validation set that is trained on tells nothing: find it by looking stretches of it up in the training tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import DataError
from gptlab.data.shard import TokenStream

# What two texts share by chance is short: an overlap is more than a tenth of a set's probes, stretches of so many tokens.
PROBES, PROBE_TOKENS = 1000, 64
STRETCH = 1 << 20  # tokens hashed at once
SHARE = 0.1


def refuse_overlap(train: TokenStream, sets: Mapping[str, TokenStream]) -> None:
    """Raise DataError when a held-out set is trained on."""
    for name, share in overlaps(train, sets).items():
        if share > SHARE:
            raise DataError(
                f"data.validation.{name}: {share:.0%} of it stands in the training text too; "
                "a validation set must be text that is not trained on"
            )


def overlaps(train: TokenStream, sets: Mapping[str, TokenStream]) -> dict[str, float]:
    """The share of each set's probes that stand in the training tokens."""
    wanted = {name: _probes(stream) for name, stream in sets.items()}
    if not any(len(p) for p in wanted.values()):
        return dict.fromkeys(wanted, 0.0)
    sought = np.unique(np.concatenate(list(wanted.values())))
    seen = np.zeros(len(sought), bool)
    for tokens in _stretches(train):
        here = _window_hashes(tokens)
        place = np.minimum(np.searchsorted(sought, here), len(sought) - 1)
        seen[place[sought[place] == here]] = True
    return {name: float(seen[np.searchsorted(sought, probes)].mean()) if len(probes) else 0.0 for name, probes in wanted.items()}


def _probes(stream: TokenStream) -> npt.NDArray[np.uint64]:
    """Hashes of up to PROBES stretches of PROBE_TOKENS, spread over a set; a shorter set has none."""
    if len(stream) < PROBE_TOKENS:
        return np.zeros(0, np.uint64)
    starts = np.unique(np.linspace(0, len(stream) - PROBE_TOKENS, PROBES, dtype=np.int64))
    return np.concatenate([_window_hashes(w) for w in stream.windows(starts, PROBE_TOKENS)])


def _stretches(stream: TokenStream) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(stream) - PROBE_TOKENS + 1, STRETCH):
        yield stream.window(start, min(STRETCH + PROBE_TOKENS - 1, len(stream) - start))


def _window_hashes(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A hash of each stretch of PROBE_TOKENS (a power of 2), made by joining neighbours of 1, 2, 4 … tokens."""
    found, width, factor = tokens.astype(np.uint64) + np.uint64(1), 1, 0x9E3779B97F4A7C15
    while width < PROBE_TOKENS:
        found = found[:-width] * np.uint64(factor) + found[width:]
        width, factor = 2 * width, factor * factor % (1 << 64)
    return found
