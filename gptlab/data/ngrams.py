"""Which stretches of some tokens stand in others, millions of them: by hashes of all stretches of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from gptlab.data.shard import TokenStream

Hashes = npt.NDArray[np.uint64]
STRETCH = 1 << 20  # tokens hashed at once
_BASE, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # odd: the first has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)


def hashes(tokens: npt.NDArray[np.int64], n: int) -> Hashes:
    """(len - n + 1,): a hash of each stretch of n tokens, a polynomial modulo 2^64 (Karp & Rabin, 1987) of mixed token ids."""
    if len(tokens) < n:
        return np.zeros(0, np.uint64)
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_MIX)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(_BASE)
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mixed * _powers(_BASE, len(tokens)), dtype=np.uint64)))
    found: Hashes = (sums[n:] - sums[:-n]) * _powers(_INVERSE, len(tokens) - n + 1)
    return found


def _powers(base: int, count: int) -> Hashes:
    found = np.full(count, base, np.uint64)
    found[0] = 1
    powers: Hashes = np.cumprod(found, dtype=np.uint64)
    return powers


def seen(parts: Iterable[npt.NDArray[np.int64]], sought: Hashes, n: int) -> npt.NDArray[np.bool_]:
    """Of each hash in `sought`, sorted and different, whether a stretch of n tokens within one of the parts has it."""
    found = np.zeros(len(sought), bool)
    for tokens in parts if len(sought) else ():
        here = hashes(tokens, n)
        place = np.minimum(np.searchsorted(sought, here), len(sought) - 1)
        found[place[sought[place] == here]] = True
    return found


def stretches(stream: TokenStream, n: int) -> Iterator[npt.NDArray[np.int64]]:
    """The stream in parts that share their ends, so that every stretch of n tokens lies whole in one of them."""
    for start in range(0, len(stream) - n + 1, STRETCH):
        yield stream.window(start, min(STRETCH + n - 1, len(stream) - start))
