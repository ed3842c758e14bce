"""Documents packed into rows that begin with a document and hold no padding: best fit, and what does not fit is dropped and counted."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import DataError

WINDOW = 1000
_CHUNK = 65_536  # lengths turned into Python's integers at once


@dataclass(frozen=True)
class Packing:
    """Rows of `row` tokens, each a run of segments; a segment is the beginning of a document, and mostly all of it.

    Segments stand in the order of their rows: those of row r are `row_first_segment[r]` up to `row_first_segment[r + 1]`. No
    document appears in two segments. Tokens are dropped in three ways: `dropped_long` behind the first row of a document longer than
    a row, `dropped_cut` of documents cut to fill a row, `dropped_end` of the documents that filled no last row.
    """

    row: int
    row_first_segment: npt.NDArray[np.int64]  # (rows + 1,)
    segment_document: npt.NDArray[np.int64]  # (segments,), which document
    segment_length: npt.NDArray[np.int64]  # (segments,), how many of its first tokens
    total: int  # tokens of all documents
    dropped_long: int
    dropped_cut: int
    dropped_end: int

    @property
    def rows(self) -> int:
        return len(self.row_first_segment) - 1

    @property
    def used(self) -> int:
        """Tokens that stand in a row."""
        return self.rows * self.row

    @property
    def dropped(self) -> int:
        """Tokens that stand in none."""
        return self.dropped_long + self.dropped_cut + self.dropped_end

    @property
    def dropped_share(self) -> float:
        """Dropped tokens as a part of all, 0 to 1."""
        return self.dropped / self.total if self.total else 0.0

    def segments(self, row: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The documents of a row, in order, and how many of each one's first tokens it holds."""
        here = slice(int(self.row_first_segment[row]), int(self.row_first_segment[row + 1]))
        return self.segment_document[here], self.segment_length[here]


def best_fit(lengths: npt.NDArray[np.int64], row: int, *, window: int = WINDOW) -> Packing:
    """Pack documents, given by their lengths in tokens (border included), into rows of exactly `row` tokens.

    A row begins with the oldest document that waits, and takes the longest one that still fits whole until none does; then the
    shortest one that waits is cut to fill the rest, which loses least. At most `window` documents wait, and each row takes the oldest:
    none waits for more than `window` rows, and the order stays near the source's. Of a document longer than a row, one row is kept.

    The rows without padding, by best fit and cutting, are nanochat's idea (Karpathy, 2025); best fit as such is Ding et al.'s, 2024
    (Fewer Truncations Improve Language Modeling). Deterministic; time grows with the number of documents. Documents too few to fill
    a row make no row. Raises DataError when a document has no token.
    """
    if row < 1 or window < 1:
        raise ValueError(f"row={row} and window={window} must be at least 1")
    count = len(lengths)
    if count and int(lengths.min()) < 1:
        raise DataError(f"document {int(lengths.argmin())} has {int(lengths.min())} tokens; to be packed it needs at least 1")
    waiting = _Waiting(lengths, window)
    firsts, documents, kept = array("q", [0]), array("q"), array("q")
    dropped_long = dropped_cut = dropped_end = 0
    while waiting:
        document, length = waiting.oldest()
        begun = len(documents)
        documents.append(document)
        kept.append(min(length, row))
        room, lost_long, lost_cut = row - kept[-1], length - kept[-1], 0
        while room and waiting:
            document, length = waiting.longest_up_to(room) or waiting.shortest()
            documents.append(document)
            kept.append(min(length, room))
            lost_cut += length - kept[-1]
            room -= kept[-1]
        if room:  # only the last row: no document is left to fill it
            dropped_end = row - room
            del documents[begun:], kept[begun:]
        else:
            firsts.append(len(documents))
            dropped_long += lost_long
            dropped_cut += lost_cut
    return Packing(
        row=row,
        row_first_segment=np.array(firsts, np.int64),
        segment_document=np.array(documents, np.int64),
        segment_length=np.array(kept, np.int64),
        total=int(lengths.sum()),
        dropped_long=dropped_long,
        dropped_cut=dropped_cut,
        dropped_end=dropped_end,
    )


class _Waiting:
    """The next `window` documents that stand in no row yet: taken by age, or by length (of equal ones the oldest first)."""

    def __init__(self, lengths: npt.NDArray[np.int64], window: int) -> None:
        self._count, self._lengths = len(lengths), lengths
        self._coming = _integers(lengths)
        # One integer per document, so that the list sorts by length, and among equal lengths the oldest stands last.
        self._keys: list[int] = []
        self._taken, self._oldest, self._next = bytearray(self._count), 0, 0
        for _ in range(window):
            self._refill()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def oldest(self) -> tuple[int, int]:
        """Take the document that has waited longest: (document, length)."""
        self._oldest = self._taken.index(0, self._oldest)
        return self._take(bisect_left(self._keys, self._key(self._oldest, int(self._lengths[self._oldest]))))

    def longest_up_to(self, room: int) -> tuple[int, int] | None:
        """Take the longest document of at most `room` tokens, if there is one: (document, length)."""
        place = bisect_left(self._keys, (room + 1) * self._count) - 1
        return None if place < 0 else self._take(place)

    def shortest(self) -> tuple[int, int]:
        """Take the shortest document: (document, length)."""
        found = self.longest_up_to(self._keys[0] // self._count)
        assert found is not None
        return found

    def _key(self, document: int, length: int) -> int:
        return length * self._count + self._count - 1 - document

    def _take(self, place: int) -> tuple[int, int]:
        length, age = divmod(self._keys.pop(place), self._count)
        document = self._count - 1 - age
        self._taken[document] = 1
        self._refill()
        return document, length

    def _refill(self) -> None:
        length = next(self._coming, None)
        if length is not None:
            insort(self._keys, self._key(self._next, length))
            self._next += 1


def _integers(lengths: npt.NDArray[np.int64]) -> Iterator[int]:
    for start in range(0, len(lengths), _CHUNK):
        yield from lengths[start : start + _CHUNK].tolist()
