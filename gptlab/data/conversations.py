"""Rows of whole chats: packed so that little is padding, none cut in mid-turn, each seeing itself alone, the assistant's tokens scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gptlab.config.errors import ConfigError, DataError
from gptlab.data.order import key, permute
from gptlab.data.prepared import Prepared
from gptlab.data.rows import Fetched
from gptlab.data.shard import Tokens

POLICIES = ("cut", "drop", "refuse")


@dataclass
class Fitted:
    """What became of chats in rows of a context: `lengths` (chats,) in tokens, 0 of one that is left out."""

    lengths: Tokens
    cut: int = 0
    dropped: int = 0


def pack_whole(lengths: Tokens, row: int) -> list[list[int]]:
    """Units of 1 to `row` tokens into rows of at most `row`, the longest first, each into the fullest row that has room.

    Best-fit decreasing (Johnson, 1973): at most 11/9 of the fewest rows, and near to none of padding where many units are short.
    """
    rows: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # rows by how many tokens they have room for
    rooms = 0  # bit n: a row with room for n waits
    for unit in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[unit])
        if length == 0:
            continue
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, number = row, len(rows)
            rows.append([])
        rows[number].append(unit)
        left = room - length
        if left:
            waiting.setdefault(left, []).append(number)
            rooms |= 1 << left
    return rows


class Conversations:
    """Rows of `context` tokens, each of whole chats one behind another, then padding, which is not scored.

    `too_long`: what becomes of a chat that no row holds: `cut` behind the last turn of the assistant's that fits (dropped where none
    does), `drop` or `refuse`. Every epoch visits each row once, permuted. The documents are always told, whether a model asks for them or
    not. Of pairs (Prepared.pairs) the two chats are documents 2i and 2i + 1 of a row, and its extras say which tokens the `answer` is, and
    which pairs it has (`pair`, -1: no more). Raises DataError where no chat is left or one is refused.
    """

    settled, known_length = True, True

    def __init__(self, data: Prepared, split: str, context: int, seed: int, too_long: str, *, packed: bool = True) -> None:
        if too_long not in POLICIES:
            raise ConfigError(f"data.too_long={too_long} is not one of {', '.join(POLICIES)}")
        self.stream, self.own = data.stream(split), data.written(split)
        self.context, self.seed, self.pairs, self.data = context, seed, data.pairs, data
        self.starts = self.stream.document_starts()
        whole = np.diff([*self.starts, len(self.stream)]).astype(np.int64)
        needed = (whole.reshape(-1, 2).sum(1) if self.pairs else whole) - 1
        self.fitted = self._fit(whole, too_long, split)
        units = self.fitted.lengths.reshape(-1, 2).sum(1) if self.pairs else self.fitted.lengths
        self.rows = pack_whole(units, context + 1) if packed else [[i] for i in np.flatnonzero(units).tolist()]
        self.most = max((len(row) for row in self.rows), default=0)  # units of a row
        if not self.rows:
            what = f"{len(needed):,} {'pairs of answers' if self.pairs else 'chats'} ({split})"
            shortest = int(needed.min()) if len(needed) else 0
            raise DataError(f"of {what} none fits model.context_length={context} with an answer; the shortest takes {shortest:,}")

    def _fit(self, lengths: Tokens, too_long: str, split: str) -> Fitted:
        found, room = Fitted(lengths.copy()), self.context + 1
        if self.pairs:  # an answer cut short is another answer
            both = lengths.reshape(-1, 2)
            over = both.sum(1) > room
            if over.any() and too_long == "refuse":
                self._refuse(int(over.argmax()), int(both[over.argmax()].sum()), split, "pair")
            found.lengths[np.repeat(over, 2)] = 0
            found.dropped = int(over.sum())
            return found
        for number in np.flatnonzero(lengths > room).tolist():
            if too_long == "refuse":
                self._refuse(number, int(lengths[number]), split, "chat")
            kept = self._turns(number, room) if too_long == "cut" else 0
            found.lengths[number] = kept
            found.cut += kept > 0
            found.dropped += kept == 0
        return found

    def _refuse(self, number: int, length: int, split: str, what: str) -> None:
        raise DataError(
            f"{what} {number + 1:,} of {split} has {length:,} tokens, more than the {self.context + 1:,} of a row; "
            "use a longer model.context_length, or data.too_long=cut or drop"
        )

    def _turns(self, number: int, room: int) -> int:
        """How many of a chat's tokens end with the last turn of the assistant's that fits a row."""
        own = self.own.window(int(self.starts[number]), room + 1)
        ends = np.flatnonzero((own[:-1] == 1) & (own[1:] == 0)) + 1
        return int(ends[-1]) if len(ends) else 0

    @property
    def tokens(self) -> int:
        """Tokens that stand in rows."""
        return int(self.fitted.lengths.sum())

    @property
    def epoch_rows(self) -> int:
        return len(self.rows)

    @property
    def padding(self) -> float:
        """The share of the rows' places that hold no token."""
        return 1 - self.tokens / (len(self.rows) * (self.context + 1))

    def described(self) -> str:
        """How the chats became rows, in words."""
        what = "pairs" if self.pairs else "chats"
        count = len(self.starts) // (2 if self.pairs else 1)
        line = f"{count - self.fitted.dropped:,} {what} in {len(self.rows):,} rows, {self.padding:.1%} padding"
        line += f"; {self.fitted.cut:,} cut at a turn's end" if self.fitted.cut else ""
        return line + (f"; {self.fitted.dropped:,} too long, dropped" if self.fitted.dropped else "")

    def place(self, index: Tokens) -> Tokens:
        """The number of each row among the packed ones."""
        rows = len(self.rows)
        found = np.empty(len(index), np.int64)
        for epoch in np.unique(index // rows).tolist():
            here = index // rows == epoch
            found[here] = permute(index[here] % rows, rows, key(self.seed, epoch))
        return found

    def fetch(self, place: Tokens, documents: bool) -> Fetched:
        tokens = np.zeros((len(place), self.context + 1), np.int64)
        scored = np.zeros((len(place), self.context + 1), bool)
        each = 2 if self.pairs else 1
        document = np.full((len(place), self.context), each * self.most, np.int64)
        unit = np.full((len(place), self.most), -1, np.int64)
        for row, number in enumerate(place.tolist()):
            at = 0
            for count, which in enumerate(self.rows[number]):
                unit[row, count] = which
                for side in range(each):
                    chat = which * each + side
                    start, length = int(self.starts[chat]), int(self.fitted.lengths[chat])
                    tokens[row, at : at + length] = self.stream.window(start, length)
                    scored[row, at : at + length] = self.own.window(start, length) == 1
                    document[row, at : at + length] = count * each + side
                    at += length
        answers = scored[:, 1:]
        if not self.pairs:
            return Fetched(tokens, document, answers)
        # A row counts as many pairs: at the last token of each chosen answer one.
        last = answers & ~np.pad(answers[:, 1:], ((0, 0), (0, 1)))
        return Fetched(tokens, document, last & (document % 2 == 0), {"answer": answers, "pair": unit})

    def chosen(self, place: Tokens) -> Fetched:
        """The same rows of pairs, with all tokens of the chosen answers scored."""
        found = self.fetch(place, True)
        assert found.document is not None
        return Fetched(found.tokens, found.document, found.extra["answer"] & (found.document % 2 == 0), found.extra)
