"""The work of preparation: a section of a corpus cut into units, tokenised on every core, written in order, and gone on with after a stop.

    corpus ─ pieces ─ section ─ units of about a million characters ─ threads ─ filter ─ shards and their record

Every unit knows where the source stands behind it, so the record of a stopped preparation is enough to write what an undisturbed
one would have written, byte for byte.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import DataError
from gptlab.data.corpus import Corpus, Cursor
from gptlab.data.filter import Filter, Look
from gptlab.data.reader import Piece
from gptlab.data.shard import SplitWriter, Tokens
from gptlab.data.tokenizer import Tokenizer

UNIT = 1 << 20  # characters encoded at once
COMMIT_SECONDS = 2.0  # between two records of how far it is
# Where a text may be cut without changing its tokens: before a space between letters, between a letter and a stop, after a
# newline between visible characters (o200k joins a newline and a slash). Holds for gpt2, cl100k and o200k, and a test checks it.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_]|[,.;:!?、。，；：！？…])|(?<=\S\n)(?=[^\s/])")


class Place(NamedTuple):
    """Where a source stands: JSON data."""

    cursor: Cursor
    at: int  # characters of the corpus before the piece that follows the cursor
    drop: int  # characters of that piece that are known
    inside: bool  # whether a document of this section has begun before it


START = Place(None, 0, 0, False)


@dataclass(frozen=True)
class Section:
    """A part of a corpus, by characters: [start, end). `whole`: by whole documents, each where it begins."""

    corpus: Corpus
    start: int = 0
    end: int | None = None
    whole: bool = False


@dataclass
class Unit:
    """Work for one thread."""

    pieces: list[Piece] = field(default_factory=list)
    begins: bool = True  # whether its first piece begins a document
    behind: Place = START


def pieces_from(corpus: Corpus, cursor: Cursor) -> Iterator[tuple[Piece, Cursor]]:
    """The pieces of a corpus after a cursor; of one that has no cursors, after as many pieces."""
    resume = getattr(corpus, "pieces_from", None)
    if resume is not None:
        yield from resume(cursor)
        return
    for count, piece in enumerate(corpus.pieces(), 1):
        if count > (cursor or 0):
            yield Piece(*piece), count


def read_section(section: Section, place: Place = START) -> Iterator[tuple[Piece, Place, Place]]:
    """The pieces of a section from a place, each with the place before it and behind it.

    Where a section by characters begins or ends in mid-document, the document is cut there.
    """
    start, end = section.start, section.end
    cursor, at, drop, inside = place
    middle = inside  # whether the source stands within a document
    for piece, after in pieces_from(section.corpus, cursor):
        low, high = drop, len(piece.text)
        if section.whole:
            member = inside if middle else start <= at and (end is None or at < end)
        else:
            low = max(low, start - at)
            high = high if end is None else min(high, end - at)
            here = bool(piece.skipped) and start <= at and (end is None or at < end)  # it has no characters to go by
            member = low < high or here or (inside and piece.last)
        before = Place(cursor, at, low, inside)
        at, cursor, drop = at + len(piece.text), after, 0
        cut = not section.whole and end is not None and at >= end
        if member:
            ends = piece.last or cut
            inside = not ends and not (piece.skipped and not middle)
            yield Piece(piece.text[low:high], ends and not piece.skipped, piece.skipped), before, Place(after, at, 0, inside)
        middle = middle if piece.skipped else not piece.last
        inside = inside and middle
        if end is not None and at >= end and not (section.whole and middle and inside):
            return


def units(pieces: Iterator[tuple[Piece, Place, Place]], begins: bool = True) -> Generator[Unit]:
    """Work for one thread each: about UNIT characters, cut where tokens cannot change."""
    unit, size = Unit(begins=begins), 0
    after = START
    held, parts = "", deque[tuple[Place, int]]()  # the text of a document not yet in a unit; the pieces it came from and their lengths

    def emitted(behind: Place, begins: bool) -> Iterator[Unit]:
        nonlocal unit, size
        unit.behind = behind
        yield unit
        unit, size = Unit(begins=begins), 0

    for piece, before, after in pieces:
        if piece.skipped:
            unit.pieces.append(piece)
            size += 1  # millions of them in a row are more than one unit
            if size >= UNIT and not held:
                yield from emitted(after, True)
            continue
        held += piece.text
        parts.append((before, len(piece.text)))
        while len(held) >= UNIT and (not piece.last or len(held) >= 2 * UNIT):
            # Search backwards in growing stretches; a text with no safe place at all is cut where it stands.
            cut = next((c for back in (1 << 10, 1 << 14, UNIT) if (c := _last_cut(held, UNIT - back, UNIT))), UNIT)
            unit.pieces.append(Piece(held[:cut], False))
            held = held[cut:]
            while parts and cut >= parts[0][1]:
                cut -= parts.popleft()[1]
            if parts:
                (where, length) = parts[0]
                parts[0] = (where._replace(drop=where.drop + cut, inside=True), length - cut)
                behind = parts[0][0]
            else:
                behind = after
            yield from emitted(behind, False)
        if piece.last:
            unit.pieces.append(Piece(held, True))
            size += len(held)
            held = ""
            parts.clear()
            if size >= UNIT:
                yield from emitted(after, True)
    if held:
        unit.pieces.append(Piece(held, True))
    if unit.pieces:
        yield from emitted(after, True)


def _last_cut(text: str, start: int, end: int) -> int:
    found = 0
    for match in _CUT.finditer(text, max(start, 1), end):
        found = match.start()
    return found


@dataclass
class Encoded:
    """A unit's tokens and what to count of it."""

    ids: npt.NDArray[Any]
    starts: Tokens  # where documents begin, at their border
    bytes: int
    characters: int
    skipped: dict[str, int]
    behind: Place
    whole: list[tuple[int, int, int, int]]  # of each whole document: first token, one behind the last, bytes, characters
    looks: list[Look]  # their hashes, where there is a filter


@dataclass(frozen=True)
class Encoder:
    """From a unit of text to tokens, in a thread."""

    tokenizer: Tokenizer
    dtype: np.dtype[Any]
    filter: Filter | None = None

    @property
    def border(self) -> npt.NDArray[Any]:
        """The tokens that stand before every document but the first."""
        end = self.tokenizer.end_of_text
        return np.array([end], np.uint32) if end is not None else self.tokenizer.encode(self.tokenizer.separator)

    def __call__(self, unit: Unit) -> Encoded:
        parts: list[npt.NDArray[Any]] = []
        starts: list[int] = []
        found = Encoded(np.zeros(0, self.dtype), np.zeros(0, np.int64), 0, 0, {}, unit.behind, [], [])
        texts: list[str] = []  # of the whole documents
        border, begins, at = self.border, unit.begins, 0
        for text, last, skipped in unit.pieces:
            if skipped:
                found.skipped[skipped] = found.skipped.get(skipped, 0) + 1
                continue
            first = at
            if begins:
                starts.append(at)
                parts.append(border)
                at += len(border)
            ids = self.tokenizer.encode(text)
            parts.append(ids)
            at += len(ids)
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            found.bytes += size
            found.characters += len(text)
            if self.filter is not None and begins and last:
                found.whole.append((first, at, size, len(text)))
                texts.append(text)
            begins = last
        if self.filter is not None:
            found.looks = self.filter.looks(texts)
        if parts:
            joined = np.concatenate(parts)
            largest = int(joined.max(initial=0))
            if largest >= 1 << (8 * self.dtype.itemsize):
                raise DataError(f"token id {largest} does not fit {self.dtype}")
            if len(joined) and largest >= self.tokenizer.vocabulary:
                raise DataError(
                    f"{self.tokenizer.name} gave the token id {largest}, beyond its vocabulary of {self.tokenizer.vocabulary:,}"
                )
            found.ids, found.starts = joined.astype(self.dtype), np.array(starts, np.int64)
        return found


def write_section(
    section: Section,
    writer: SplitWriter,
    encoder: Encoder,
    threads: int,
    *,
    commit: Callable[[], None],
    tell: Callable[[int], None],
    limit: int | None = None,
) -> None:
    """Tokenise a section from where its state stands to its end, or until `limit` tokens are written.

    `commit` is called every few seconds and at the end, whatever ends it, unless that was within the writing of a unit: what it
    records is true. `tell` is called with the characters of each unit.
    """
    state = writer.state
    place = Place(*state.mark) if state.mark else START
    work = units(read_section(section, place), begins=not place.inside)
    first_border = len(encoder.border)
    last_commit = time.monotonic()
    sound = True  # whether the state is that of a whole number of units; an interrupt or a full disk may come within one
    try:
        with ThreadPoolExecutor(threads) as pool:
            try:
                for encoded in _in_order(pool, work, encoder, threads):
                    sound = False
                    ids, starts = _filtered(encoded, encoder.filter, state.removed)
                    if state.tokens == 0 and len(starts):  # no border before the first
                        ids, starts = ids[first_border:], np.maximum(starts - first_border, 0)
                    writer.write(ids, starts)
                    state.bytes += encoded.bytes
                    state.characters += encoded.characters
                    for reason, count in encoded.skipped.items():
                        state.skipped[reason] = state.skipped.get(reason, 0) + count
                    state.mark = list(encoded.behind)
                    sound = True
                    tell(encoded.characters)
                    if limit is not None and state.tokens >= limit:
                        return
                    if time.monotonic() - last_commit > COMMIT_SECONDS:
                        commit()
                        last_commit = time.monotonic()
                state.ended = True
            finally:
                pool.shutdown(cancel_futures=True)
                work.close()
    finally:
        if sound:
            commit()


def _in_order(pool: ThreadPoolExecutor, work: Iterator[Unit], encoder: Encoder, threads: int) -> Iterator[Encoded]:
    waiting: deque[Future[Encoded]] = deque()
    for unit in work:
        waiting.append(pool.submit(encoder, unit))
        if len(waiting) > 2 * threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _filtered(encoded: Encoded, filter: Filter | None, removed: dict[str, int]) -> tuple[npt.NDArray[Any], Tokens]:
    """A unit's tokens without the documents that the filter takes out; its counts are corrected."""
    ids, starts = encoded.ids, encoded.starts
    if filter is None:
        return ids, starts
    keep = np.ones(len(ids), bool)
    for (first, end, size, characters), look in zip(encoded.whole, encoded.looks, strict=True):
        if reason := filter.reason(look):
            removed[reason] = removed.get(reason, 0) + 1
            keep[first:end] = False
            encoded.bytes -= size
            encoded.characters -= characters
    if keep.all():
        return ids, starts
    moved = np.cumsum(keep) - 1  # where each kept token goes
    return ids[keep], moved[starts[keep[starts]]]
