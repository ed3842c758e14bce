"""Batches. The order is a pure function of (data seed, epoch, index), so a loader's whole state is one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import DataError
from gptlab.data.shard import TokenStream

_U64 = np.uint64
_ROUNDS = 6
BLOCK = 64  # steps whose order is computed at once


@dataclass
class Batch:
    """b rows of t tokens: the token to see, the one to predict, how much it counts (None: all 1), its document (None: not told)."""

    inputs: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    weight: Float[Tensor, "b t"] | None = None
    document: Int[Tensor, "b t"] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return self.targets.numel() if self.weight is None else int((self.weight > 0).sum())

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of `rows` rows."""
        if rows >= len(self.inputs):
            return [self]
        found: list[Batch] = []
        for start in range(0, len(self.inputs), rows):
            here = slice(start, start + rows)
            weight, document = (t[here] if t is not None else None for t in (self.weight, self.document))
            found.append(Batch(self.inputs[here], self.targets[here], weight, document))
        return found

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        if device.type == "cpu":
            return self
        moved = [
            t.pin_memory().to(device, non_blocking=True) if t is not None and device.type == "cuda" else t if t is None else t.to(device)
            for t in (self.inputs, self.targets, self.weight, self.document)
        ]
        return Batch(*moved)  # type: ignore[arg-type]


class Loader:
    """Training batches of `rows` windows of `context` tokens.

    Each epoch cuts the text at its own phase into windows that do not overlap and visits each once, in a permuted order.
    Raises DataError when the text is shorter than one batch.
    """

    def __init__(self, stream: TokenStream, context: int, rows: int, seed: int) -> None:
        self.stream, self.context, self.rows, self.seed = stream, context, rows, seed
        self._block, self._starts = -1, list[int]()
        self.windows = (len(stream) - context) // context  # a phase of up to context-1 tokens must fit
        if self.windows < rows:
            raise DataError(
                f"the training text has {len(stream):,} tokens, too few for one batch of {rows} x {context}, "
                f"which takes {(rows + 1) * context:,}; use more text, a smaller trainer.batch_tokens or a smaller model.context_length"
            )

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        block, place = divmod(step, BLOCK)
        if block != self._block:  # the order costs as much for many steps as for one
            first = block * BLOCK * self.rows
            self._block, self._starts = block, self.starts(np.arange(first, first + BLOCK * self.rows, dtype=np.int64))
        starts = self._starts[place * self.rows : (place + 1) * self.rows]
        tokens = torch.from_numpy(np.stack([self.stream.window(start, self.context + 1) for start in starts]))
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def starts(self, index: npt.NDArray[np.int64]) -> list[int]:
        """First token of the windows with these global indices."""
        epochs = index // self.windows
        found = np.empty(len(index), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = _key(self.seed, int(epoch))
            phase = key % self.context
            found[here] = permute(index[here] % self.windows, self.windows, key) * self.context + phase
        return [int(s) for s in found]


def _key(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "little")


def permute(index: npt.NDArray[np.int64], n: int, key: int) -> npt.NDArray[np.int64]:
    """Where a permutation of 0…n-1 sends each index: a Feistel network with cycle walking (Black & Rogaway, 2002).

    Costs the same for a billion windows as for ten, and needs no table.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = _U64((1 << bits) - 1)
    keys = [_U64(int.from_bytes(hashlib.sha256(f"{key}:{r}".encode()).digest()[:8], "little")) for r in range(_ROUNDS)]
    value = index.astype(_U64)
    walking = np.ones(len(value), bool)
    while walking.any():
        left, right = value[walking] >> _U64(bits), value[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        value[walking] = (left << _U64(bits)) | right
        walking &= value >= _U64(n)
    return value.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def evaluation_batches(stream: TokenStream, context: int, limit: int, rows: int) -> Iterator[Batch]:
    """Every token of a held-out set once as a target, in windows of `context`; or exactly `limit` of them, spread evenly.

    Only the last window may be shorter than `context`; it comes in a batch of its own.
    """
    targets = len(stream) - 1
    if targets < 1:
        raise DataError(f"a validation set has {len(stream)} tokens; it needs at least 2")
    scored = min(limit, targets) if limit else targets
    full, rest = divmod(scored, context)  # windows of `context` targets, and a shorter one
    windows = full + (rest > 0)
    room = -(-targets // context)
    starts = [i * room // windows * context for i in range(windows)]
    for i in range(0, full, rows):
        tokens = torch.from_numpy(np.stack([stream.window(s, context + 1) for s in starts[i : min(i + rows, full)]]))
        yield Batch(tokens[:, :-1], tokens[:, 1:])
    if rest:
        tokens = torch.from_numpy(stream.window(starts[-1], rest + 1))[None]
        yield Batch(tokens[:, :-1], tokens[:, 1:])
