"""Rows of tokens by their global number: windows of a text, documents packed to rows, a generated task, or a mix of several texts."""

from __future__ import annotations

import bisect

import numpy as np

from gptlab.config.errors import DataError
from gptlab.data.conversations import Conversations
from gptlab.data.order import drawn, drawn_so_far, key, permute, quotas
from gptlab.data.packing import Packing, best_fit
from gptlab.data.prepared import FIRST_STRIPE, LARGEST_STRIPE, GrowingStream, Prepared, stripes
from gptlab.data.rows import Fetched, Rows
from gptlab.data.shard import Tokens, TokenStream
from gptlab.data.synthetic import Task

GENERATED_AT_ONCE = 256  # rows of a task
GENERATED_EPOCH = 1 << 40  # rows: a task never repeats itself


class Windows:
    """Windows of `context` tokens of one long text (GPT-2's way: documents joined by a border, cut anywhere).

    Each epoch cuts the text at its own phase into windows that do not overlap and visits each once, in a permuted order. A stream is
    permuted stripe by stripe, so that its order does not depend on how much of it is there.
    """

    def __init__(self, stream: TokenStream, context: int, seed: int) -> None:
        self.stream, self.context, self.seed = stream, context, seed
        self.striped = isinstance(stream, GrowingStream)
        if isinstance(stream, GrowingStream):
            stream.reach(min(FIRST_STRIPE, stream.limit or FIRST_STRIPE))

    @property
    def tokens(self) -> int:
        return len(self.stream)

    @property
    def settled(self) -> bool:
        return not isinstance(self.stream, GrowingStream) or self.stream.complete

    @property
    def known_length(self) -> bool:
        return self.settled or (isinstance(self.stream, GrowingStream) and self.stream.limit is not None)

    @property
    def epoch_rows(self) -> int:
        tokens = len(self.stream)
        if isinstance(self.stream, GrowingStream) and not self.stream.complete and self.stream.limit is not None:
            tokens = self.stream.limit
        return (tokens - self.context) // self.context  # a phase of up to context-1 tokens must fit

    def place(self, index: Tokens) -> Tokens:
        """First token of each window."""
        if not self.striped:
            return self._epochs(index, [0, self.epoch_rows])
        if not self.settled:
            self._await(int(index.max()))
        return self._epochs(index, [b // self.context for b in stripes(len(self.stream))])

    def _await(self, last: int) -> None:
        """Wait until the stripe of a row of the first epoch is there, or the stream has ended."""
        assert isinstance(self.stream, GrowingStream)
        borders = stripes((last + 2) * self.context + 2 * LARGEST_STRIPE)
        stripe = bisect.bisect_right([b // self.context for b in borders], last)
        needed = borders[min(stripe, len(borders) - 1)] + 2 * self.context
        self.stream.reach(needed)

    def _epochs(self, index: Tokens, borders: list[int]) -> Tokens:
        """`borders`: of the stripes, in windows."""
        rows = self.epoch_rows
        epochs, place = (index // rows, index % rows) if self.settled else (np.zeros_like(index), index)
        stripe = np.searchsorted(borders, place, side="right") - 1
        found = np.empty(len(index), np.int64)
        for epoch, number in _pairs(epochs, stripe):
            here = (epochs == epoch) & (stripe == number)
            low = borders[number]
            high = min(borders[number + 1], rows) if number + 1 < len(borders) else rows
            whole = key(self.seed, epoch)  # of the epoch: its phase, and the order of its first stripe
            order = whole if number == 0 else key(self.seed, epoch, number)
            found[here] = (permute(place[here] - low, high - low, order) + low) * self.context + whole % self.context
        return found

    def fetch(self, place: Tokens, documents: bool) -> Fetched:
        document = self.stream.documents(place, self.context) if documents else None
        return Fetched(self.stream.windows(place, self.context + 1), document)


def _pairs(epochs: Tokens, stripes: Tokens) -> list[tuple[int, int]]:
    """The different pairs of epoch and stripe."""
    room = int(stripes.max()) + 1
    return [divmod(int(both), room) for both in np.unique(epochs * room + stripes)]


class Packed:
    """Rows that begin with a document and are filled by others, best-fit; a document cut to fill a row loses its rest.

    Documents are packed stripe by stripe of a stream, and all together of other text; each epoch visits every row once, permuted.
    """

    def __init__(self, stream: TokenStream, context: int, seed: int) -> None:
        self.stream, self.context, self.seed = stream, context, seed
        self.packings: list[tuple[Packing, Tokens]] = []  # of each stripe: its rows, and where its documents begin
        self.borders = [0]  # in rows
        self._tokens = 0  # of the stripes that are packed
        self._lost = 0  # of them: the rests of documents that a stripe's border cuts
        self._pack(0)
        if self.borders[-1] < 1:
            raise DataError(
                f"no documents of the training text fill a row of {context + 1} tokens; use more text or a smaller model.context_length"
            )

    @property
    def settled(self) -> bool:
        return not isinstance(self.stream, GrowingStream) or self.stream.complete

    @property
    def known_length(self) -> bool:
        return self.settled

    @property
    def epoch_rows(self) -> int:
        if isinstance(self.stream, GrowingStream):
            self.stream.reach(1 << 62)
        self._pack(1 << 62)
        return self.borders[-1]

    @property
    def tokens(self) -> int:
        return len(self.stream)

    def dropped(self) -> tuple[int, int]:
        """Tokens that no row holds, and all tokens, of what is packed so far."""
        return sum(p.dropped for p, _ in self.packings) + self._lost, self._tokens

    def _pack(self, row: int) -> None:
        """Pack stripes until there is such a row, or no more text."""
        while self.borders[-1] <= row:
            if isinstance(self.stream, GrowingStream):
                end = next(b for b in stripes(self._tokens + 2 * LARGEST_STRIPE) if b > self._tokens)
                end = min(end, self.stream.reach(end))
            else:
                end = len(self.stream)
            if end <= self._tokens:
                return
            starts = self.stream.document_starts(self._tokens, end)
            packing = best_fit(np.diff([*starts, end]).astype(np.int64), self.context + 1)
            self.packings.append((packing, starts))
            self.borders.append(self.borders[-1] + packing.rows)
            self._lost += (int(starts[0]) if len(starts) else end) - self._tokens
            self._tokens = end

    def place(self, index: Tokens) -> Tokens:
        """The number of each row among the packed ones."""
        self._pack(int(index.max()))
        complete = self.settled and (not isinstance(self.stream, GrowingStream) or self._tokens >= len(self.stream))
        if int(index.max()) >= self.borders[-1] and not complete:
            self._pack(1 << 62)
            complete = True
        rows = self.borders[-1]
        epochs, place = (index // rows, index % rows) if complete else (np.zeros_like(index), index)
        stripe = np.searchsorted(self.borders, place, side="right") - 1
        found = np.empty(len(index), np.int64)
        for epoch, number in _pairs(epochs, stripe):
            here = (epochs == epoch) & (stripe == number)
            low, high = self.borders[number], self.borders[number + 1]
            found[here] = permute(place[here] - low, high - low, key(self.seed, epoch, number)) + low
        return found

    def fetch(self, place: Tokens, documents: bool) -> Fetched:
        tokens = np.empty((len(place), self.context + 1), np.int64)
        document = np.zeros((len(place), self.context), np.int64)
        for row, number in enumerate(place.tolist()):
            stripe = bisect.bisect_right(self.borders, number) - 1
            packing, starts = self.packings[stripe]
            at = 0
            for count, (which, length) in enumerate(zip(*packing.segments(number - self.borders[stripe]), strict=True)):
                tokens[row, at : at + length] = self.stream.window(int(starts[which]), int(length))
                document[row, at : at + length] = count
                at += int(length)
        return Fetched(tokens, document if documents else None)


class Generated:
    """Rows of a task: each is made from the seed and its number, and none comes twice."""

    epoch_rows = GENERATED_EPOCH
    settled, known_length = True, False
    tokens = 0

    def __init__(self, task: Task, context: int, seed: int, part: int = 0) -> None:
        self.task, self.context, self.seed, self.part = task, context, seed, part
        self._block, self._rows = -1, (np.zeros((0, 0), np.int64), np.zeros((0, 0), bool))

    def place(self, index: Tokens) -> Tokens:
        return index

    def fetch(self, place: Tokens, documents: bool) -> Fetched:
        tokens = np.empty((len(place), self.context + 1), np.int64)
        scored = np.empty((len(place), self.context), bool)
        for block in np.unique(place // GENERATED_AT_ONCE).tolist():
            if block != self._block:
                draw = np.random.default_rng([self.seed, self.part, block])
                self._block, self._rows = block, self.task.rows(GENERATED_AT_ONCE, self.context, draw)
            here = place // GENERATED_AT_ONCE == block
            tokens[here], scored[here] = (a[place[here] % GENERATED_AT_ONCE] for a in self._rows)
        return Fetched(tokens, np.zeros_like(tokens[:, :-1]) if documents else None, scored)


class Mixed:
    """Rows of several texts by weight: of every 4,096 rows each text gives its share, in an order drawn from the seed.

    A text whose rows are used up begins its next epoch; an epoch of the mix is as many rows as its texts have together.
    """

    def __init__(self, parts: dict[str, Rows], weights: dict[str, float], seed: int) -> None:
        self.names, self.parts, self.seed = list(parts), list(parts.values()), seed
        self.share = quotas([weights[n] for n in self.names])
        self.context = self.parts[0].context

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.parts)

    @property
    def settled(self) -> bool:
        return all(p.settled for p in self.parts)

    @property
    def known_length(self) -> bool:
        return all(p.known_length for p in self.parts)

    @property
    def epoch_rows(self) -> int:
        return sum(p.epoch_rows for p, share in zip(self.parts, self.share, strict=True) if share)

    def place(self, index: Tokens) -> Tokens:
        """(n, 2): the source of each row, and its place there."""
        source, rank = drawn(index, self.share, self.seed)
        found = np.stack([source, rank], 1)
        for number in np.unique(source).tolist():
            here = source == number
            found[here, 1] = self.parts[number].place(rank[here])
        return found

    def fetch(self, place: Tokens, documents: bool) -> Fetched:
        found: Fetched | None = None
        for number in np.unique(place[:, 0]).tolist():
            here = place[:, 0] == number
            part = self.parts[number].fetch(place[here, 1], documents)
            if found is None:
                tokens = np.empty((len(place), part.tokens.shape[1]), np.int64)
                scored = None if part.scored is None else np.empty((len(place), self.context), bool)
                found = Fetched(tokens, None if part.document is None else np.empty_like(tokens[:, :-1]), scored)
            found.tokens[here] = part.tokens
            for of_all, own in ((found.document, part.document), (found.scored, part.scored)):
                if of_all is not None and own is not None:
                    of_all[here] = own
        assert found is not None
        return found

    def drawn(self, rows: int) -> dict[str, tuple[float, float]]:
        """Of the first `rows` rows: each source's share, and how many epochs of it that is."""
        counts = drawn_so_far(rows, self.share, self.seed)
        found = {}
        for name, part, count in zip(self.names, self.parts, counts, strict=True):
            found[name] = (count / max(1, rows), count / part.epoch_rows if part.settled else 0.0)
        return found


def training_rows(prepared: Prepared, context: int, packing: str, seed: int, too_long: str = "cut") -> Rows:
    """The training rows of prepared data; `too_long`: of chats. Raises DataError when there is too little text."""
    if prepared.task is not None:
        return Generated(prepared.task, context, seed)
    if prepared.parts:
        used = {n: p for n, p in prepared.parts.items() if prepared.weights[n] > 0}
        parts = {n: training_rows(p, context, packing, seed, too_long) for n, p in used.items()}
        return Mixed(parts, prepared.weights, seed)
    if prepared.chat:
        return Conversations(prepared, "train", context, seed, too_long)
    stream = prepared.stream("train")
    return Packed(stream, context, seed) if packing == "best_fit" else Windows(stream, context, seed)
