"""A validation set that is trained on tells nothing: find it by looking stretches of it up in the training tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import DataError
from gptlab.data.ngrams import hashes, seen, stretches
from gptlab.data.shard import TokenStream

# What two texts share by chance is short: an overlap is more than a tenth of a set's probes, stretches of so many tokens.
PROBES, PROBE_TOKENS = 1000, 64
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
    found = seen(stretches(train, PROBE_TOKENS), sought, PROBE_TOKENS)
    return {name: float(found[np.searchsorted(sought, probes)].mean()) if len(probes) else 0.0 for name, probes in wanted.items()}


def _probes(stream: TokenStream) -> npt.NDArray[np.uint64]:
    """Hashes of up to PROBES stretches of PROBE_TOKENS, spread over a set; a shorter set has none."""
    if len(stream) < PROBE_TOKENS:
        return np.zeros(0, np.uint64)
    starts = np.unique(np.linspace(0, len(stream) - PROBE_TOKENS, PROBES, dtype=np.int64))
    return np.concatenate([hashes(w, PROBE_TOKENS) for w in stream.windows(starts, PROBE_TOKENS)])
