"""Which row comes when: a pure function of (data seed, epoch, global index), so that a loader's whole state is one integer."""

from __future__ import annotations

import hashlib

import numpy as np

from gptlab.data.shard import Tokens

_U64 = np.uint64
_ROUNDS = 6
MIX_ROWS = 4096  # rows in which each source of a mix has exactly its share


def key(*parts: int) -> int:
    """A key of 64 bits for what the numbers name."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "little")


def permute(index: Tokens, n: int, key: int) -> Tokens:
    """Where a permutation of 0…n-1 sends each index: a Feistel network with cycle walking (Black & Rogaway, 2002).

    Costs the same for a billion rows as for ten, and needs no table.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = _U64((1 << bits) - 1)
    keys = [_U64(int.from_bytes(hashlib.sha256(f"{key}:{r}".encode()).digest()[:8], "little")) for r in range(_ROUNDS)]
    value = index.astype(_U64)
    walking = np.ones(len(value), bool)
    while walking.any():
        left, right = value[walking] >> _U64(bits), value[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (mixed(right ^ round_key) & mask)
        value[walking] = (left << _U64(bits)) | right
        walking &= value >= _U64(n)
    return value.astype(np.int64)


def mixed(x: np.typing.NDArray[np.uint64]) -> np.typing.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def quotas(weights: list[float]) -> list[int]:
    """How many of MIX_ROWS rows each source has: its share by largest remainder, and at least one where its weight is above 0."""
    exact = [w * MIX_ROWS for w in weights]
    found = [max(int(e), 1 if e > 0 else 0) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (exact[i] - found[i], -i), reverse=True)
    at = 0
    while (short := MIX_ROWS - sum(found)) != 0:
        place = by_remainder[at % len(exact)] if short > 0 else max(range(len(found)), key=found.__getitem__)
        if exact[place] > 0:
            found[place] += 1 if short > 0 else -1
        at += 1
    return found


def drawn(index: Tokens, share: list[int], seed: int) -> tuple[Tokens, Tokens]:
    """For global row numbers: the source of each, and which of that source's rows it is, counted from 0 without end."""
    block, place = np.divmod(index, MIX_ROWS)
    borders = np.cumsum([0, *share])
    source = np.empty(len(index), np.int64)
    rank = np.empty(len(index), np.int64)
    for number in np.unique(block):
        here = block == number
        slot = permute(place[here], MIX_ROWS, key(seed, int(number), len(share)))
        source[here] = np.searchsorted(borders, slot, side="right") - 1
        # A row's rank among its source's rows of the block is by slot: any order will do, since the source permutes its own.
        rank[here] = number * np.array(share)[source[here]] + slot - borders[source[here]]
    return source, rank


def drawn_so_far(rows: int, share: list[int], seed: int) -> list[int]:
    """How many of the first `rows` rows came from each source."""
    block, rest = divmod(rows, MIX_ROWS)
    found = np.array(share) * block
    if rest:
        source, _ = drawn(np.arange(block * MIX_ROWS, rows, dtype=np.int64), share, seed)
        found = found + np.bincount(source, minlength=len(share))
    return [int(n) for n in found]
