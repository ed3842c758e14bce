"""Batches: training rows in their order, and every token of a held-out set once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import DataError
from gptlab.data.conversations import Conversations
from gptlab.data.prepared import GrowingStream, Prepared
from gptlab.data.rows import Fetched, Rows
from gptlab.data.shard import TokenStream
from gptlab.data.sources import Generated, Mixed, Packed

BLOCK_STEPS, BLOCK_TOKENS = 64, 1 << 20  # steps, and at most how many tokens, that are fetched at once: small batches cost overhead
TASK_ROWS = 512  # held-out rows of a generated task, unless data.validation_tokens says how many tokens
HELD_OUT = 1  # the part of a task's rows that is not trained on


@dataclass
class Batch:
    """b rows of t tokens: the token to see, the one to predict, how much it counts (None: all 1), its document (None: not told).

    `extra`: what an objective wants to know of the rows besides, by name: (b, …).
    """

    inputs: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    weight: Float[Tensor, "b t"] | None = None
    document: Int[Tensor, "b t"] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def token_weight(self) -> float:
        """How much its targets count together."""
        return float(self.targets.numel() if self.weight is None else self.weight.sum())

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
            extra = {name: t[here] for name, t in self.extra.items()}
            found.append(Batch(self.inputs[here], self.targets[here], weight, document, extra))
        return found

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        if device.type == "cpu":
            return self

        def moved(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        weight, document = (t if t is None else moved(t) for t in (self.weight, self.document))
        extra = {name: moved(t) for name, t in self.extra.items()}
        return Batch(moved(self.inputs), moved(self.targets), weight, document, extra)


def batch_of(rows: Fetched) -> Batch:
    """Rows as a batch."""
    tokens = torch.from_numpy(rows.tokens)
    weight = None if rows.scored is None else torch.from_numpy(rows.scored.astype(np.float32))
    document = None if rows.document is None else torch.from_numpy(rows.document)
    extra = {name: torch.from_numpy(values) for name, values in rows.extra.items()}
    return Batch(tokens[:, :-1], tokens[:, 1:], weight, document, extra)


class Loader:
    """Training batches of `rows` rows each, or the equal part of them that `rank` of `ranks` trains on.

    `documents`: each token's document is told. Raises DataError when the text is shorter than one batch, unless that may hold it `again`.
    """

    def __init__(self, source: Rows, rows: int, *, documents: bool = False, rank: int = 0, ranks: int = 1, again: bool = False) -> None:
        self.source, self.rows, self.documents, context = source, rows, documents, source.context
        self.own = range(rank * rows // ranks, (rank + 1) * rows // ranks)  # of a batch's rows
        self._steps = max(1, min(BLOCK_STEPS, BLOCK_TOKENS // (len(self.own) * context)))
        self._block, self._batches = -1, list[Batch]()
        short = source.settled and source.epoch_rows < rows and not again
        if short and self.dropped is not None:
            raise DataError(
                f"data.packing=best_fit makes {source.epoch_rows:,} rows of {context} tokens, too few for a batch of {rows}: "
                "each begins with a document of its own; use more documents, a smaller trainer.batch_tokens, or data.packing=concatenate"
            )
        if short:
            raise DataError(
                f"the training text has {source.tokens:,} tokens, too few for one batch of {rows} x {context}, "
                f"which takes {(rows + 1) * context:,}; use more text, a smaller trainer.batch_tokens or a smaller model.context_length"
            )

    @property
    def endless(self) -> bool:
        """Whether nobody knows how long a pass over the text is."""
        return not self.source.known_length

    @property
    def streams(self) -> bool:
        """Whether a batch may have to wait for text that is still being prepared."""
        parts = self.source.parts if isinstance(self.source, Mixed) else [self.source]
        return any(isinstance(getattr(p, "stream", None), GrowingStream) for p in parts)

    @property
    def dropped(self) -> float | None:
        """The share of the text (so far packed) that no row holds; None where packing leaves nothing out."""
        parts = self.source.parts if isinstance(self.source, Mixed) else [self.source]
        counts = [p.dropped() for p in parts if isinstance(p, Packed)]
        return sum(d for d, _ in counts) / max(1, sum(t for _, t in counts)) if counts else None

    @property
    def described(self) -> str:
        """How chats became rows, in words; of text nothing."""
        if isinstance(self.source, Mixed):
            named = zip(self.source.names, self.source.parts, strict=True)
            return "; ".join(f"{name}: {part.described()}" for name, part in named if isinstance(part, Conversations))
        return self.source.described() if isinstance(self.source, Conversations) else ""

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one pass over the text."""
        return self.source.epoch_rows * self.source.context

    def batch(self, number: int) -> Batch:
        """The own rows of a batch; they are counted from 0."""
        if self._block < 0 and not self.source.settled:  # later ones may have to wait for text
            return self._fetch(number, 1, self.own)[0]
        block, place = divmod(number, self._steps)
        if block != self._block:
            self._block, self._batches = block, self._fetch(block * self._steps, self._steps, self.own)
        return self._batches[place]

    def whole(self, number: int) -> Batch:
        """All rows of a batch, those of other ranks too."""
        return self._fetch(number, 1, range(self.rows))[0]

    def _fetch(self, number: int, count: int, own: range) -> list[Batch]:
        index = np.arange(number, number + count, dtype=np.int64)[:, None] * self.rows + np.asarray(own, dtype=np.int64)
        return batch_of(self.source.fetch(self.source.place(index.ravel()), self.documents)).split(len(own))

    def drawn(self, steps: int) -> dict[str, tuple[float, float]]:
        """Of a mix: each source's share of the first steps' tokens, and how often its text was passed through."""
        return self.source.drawn(steps * self.rows) if isinstance(self.source, Mixed) else {}


def evaluation_batches(stream: TokenStream, context: int, limit: int, rows: int, *, documents: bool = False) -> Iterator[Batch]:
    """Every token of a held-out set once as a target, in windows of `context`; or exactly `limit` of them, spread evenly.

    Only the last window may be shorter than `context`; it comes in a batch of its own.
    """
    starts, full, rest = _evaluation_windows(stream, context, limit)

    def fetched(starts: np.typing.NDArray[np.int64], length: int) -> Batch:
        document = stream.documents(starts, length) if documents else None
        return batch_of(Fetched(stream.windows(starts, length + 1), document))

    for i in range(0, full, rows):
        yield fetched(starts[i : min(i + rows, full)], context)
    if rest:
        yield fetched(starts[-1:], rest)


def _evaluation_windows(stream: TokenStream, context: int, limit: int) -> tuple[np.typing.NDArray[np.int64], int, int]:
    """Where each window begins, how many have `context` targets, and how many targets a shorter one behind them has."""
    targets = len(stream) - 1
    if targets < 1:
        raise DataError(f"a validation set has {len(stream)} tokens; it needs at least 2")
    scored = min(limit, targets) if limit else targets
    full, rest = divmod(scored, context)
    windows = full + (rest > 0)
    room = -(-targets // context)
    return np.arange(windows, dtype=np.int64) * room // windows * context, full, rest


def held_out_documents(data: Prepared, name: str, context: int, limit: int) -> np.typing.NDArray[np.int64]:
    """(rows,): of each row of `held_out_batches`, the number of the document that it begins in; of a task its own."""
    if data.task is not None:
        return np.arange(-(-limit // context) if limit else TASK_ROWS)
    if data.chat:
        return np.arange(held_out_rows(held_out_chats(data, name, context), limit))
    stream = data.stream(name)
    starts, _, _ = _evaluation_windows(stream, context, limit)
    return np.searchsorted(stream.document_starts(), starts, side="right")


def held_out_batches(data: Prepared, name: str, context: int, limit: int, rows: int, *, documents: bool = False) -> Iterator[Batch]:
    """The batches of a held-out set: of a text as in `evaluation_batches`, of chats every one once, of a task rows never trained on."""
    if data.chat:
        chats = held_out_chats(data, name, context)
        count = held_out_rows(chats, limit)
        for first in range(0, count, rows):
            place = chats.place(np.arange(first, min(first + rows, count), dtype=np.int64))
            yield batch_of(chats.chosen(place) if chats.pairs else chats.fetch(place, documents))
        return
    if data.task is None:
        yield from evaluation_batches(data.stream(name), context, limit, rows, documents=documents)
        return
    source = Generated(data.task, context, 0, HELD_OUT)
    count = -(-limit // context) if limit else TASK_ROWS
    for first in range(0, count, rows):
        yield batch_of(source.fetch(np.arange(first, min(first + rows, count), dtype=np.int64), documents))


def held_out_chats(data: Prepared, name: str, context: int) -> Conversations:
    """The rows of a held-out set of chats, packed once: a chat too long for a row is cut at a turn's end."""
    part = data.parts.get(name, data)
    if context not in part.packed:
        part.packed[context] = Conversations(part, "val", context, 0, "cut")
    found: Conversations = part.packed[context]
    return found


def held_out_rows(chats: Conversations, limit: int) -> int:
    """How many rows of held-out chats are measured: of at most `limit` tokens, 0: all. They are taken in the rows' permuted order: packed,
    the longest come first."""
    return min(chats.epoch_rows, -(-limit // chats.context)) if limit else chats.epoch_rows
