"""Generated tasks that tell architectures apart in seconds. A task is a corpus whose rows are made on the fly, with its answers marked.

Every row begins with a whole example and is filled to its end; what does not fit is cut off there. There is no padding.
"""

from __future__ import annotations

import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.data.order import mixed
from gptlab.data.problems import Problem

Ids = NDArray[np.int64]
Rows = tuple[Ids, NDArray[np.bool_]]

EXAMPLES, EXAMPLE_LENGTH = 16, 64  # what `pieces` shows
LETTERS = 200  # of each case that a task may use: those of Latin alphabets, which no new Unicode version moves
BRACKETS = "()[]{}<>«»‹›⁅⁆⟦⟧⟨⟩⟪⟫⌈⌉⌊⌋"


@runtime_checkable
class Task(Protocol):
    """A corpus that generates rows of token ids. A token is one character of `alphabet`, and its place there is its id."""

    name: str
    alphabet: str  # distinct printable characters, sorted by code point

    def fingerprint(self) -> dict[str, Any]:
        """The task's options and its version: what tells its rows from those of another."""

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """A few rows as text, to be looked at."""

    def rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        """Ids (count, length + 1), and scored (count, length): whether predicting ids[:, t + 1] from ids[:, : t + 1] counts.

        A short row of dyck may hold nothing scored; rows of the others always do. Raises ConfigError when no example fits the
        row, with the least model.context_length that holds one.
        """

    def held_out_rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        """`rows` for the held-out set: where a task keeps examples back, those; else others of the same kind."""

    def best_loss(self, length: int) -> float:
        """Nats per scored token that a perfect model reaches in rows of `length`; 0 where the answers are determined."""


class _Generated(ABC):
    """What the tasks share: the alphabet, the check of a row's length, examples as text."""

    name: str
    VERSION: ClassVar[int] = 1  # goes up when the same options and draws give other rows

    def __init__(self, characters: str, least: int, options: dict[str, Any]) -> None:
        self.alphabet = "".join(sorted(characters))
        self.least = least  # the shortest model.context_length that holds a whole example
        self.options = options

    def fingerprint(self) -> dict[str, Any]:
        return {"version": self.VERSION, **self.options}

    def pieces(self) -> Iterator[tuple[str, bool]]:
        ids, _ = self.rows(EXAMPLES, max(EXAMPLE_LENGTH, self.least), np.random.default_rng(0))
        for row in ids:
            yield "".join(self.alphabet[i] for i in row), True

    def rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        self._check_length(length)
        return self._rows(count, length, draw)

    def _check_length(self, length: int) -> None:
        if length < self.least:
            raise ConfigError(
                f"model.context_length={length} is too short for an example of data/corpus={self.name}: "
                f"with these options it must be at least {self.least}"
            )

    def held_out_rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        return self.rows(count, length, draw)

    @abstractmethod
    def _rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        """`rows`, of a length that holds an example."""

    def best_loss(self, length: int) -> float:
        return 0.0

    def _ids(self, characters: str) -> Ids:
        """The id of each character."""
        return np.array([self.alphabet.index(c) for c in characters], np.int64)


def _letters(category: Literal["Ll", "Lu"], count: int) -> str:
    found = [c for c in map(chr, range(0x250)) if unicodedata.category(c) == category]
    return "".join(found[:count])


def _check(name: str, value: int, low: int, high: int | None = None, why: str = "") -> None:
    """Raise ConfigError unless low <= value <= high; `why` says where the bounds come from."""
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"data.corpus.{name}={value} must be {bounds}{f' ({why})' if why else ''}")


def _random(draw: np.random.Generator, choices: Ids, shape: tuple[int, ...]) -> Ids:
    return choices[draw.integers(0, len(choices), shape, dtype=np.uint8)]


def _orders(draw: np.random.Generator, shape: tuple[int, ...]) -> Ids:
    """A random permutation of 0…n-1 along the last axis, n long."""
    return draw.random(shape).argsort(-1)


def _segments(sizes: Ids, length: int) -> tuple[Ids, Ids]:
    """Lay segments of `sizes` (count, m) end to end: at each of `length` places, which segment it is in, and how far (count, length)."""
    ends: Ids = sizes.cumsum(1)
    begins = np.zeros((len(sizes), length + 1), np.int64)
    begins[np.arange(len(sizes))[:, None], ends.clip(max=length)] = 1
    which: Ids = begins[:, :-1].cumsum(1)
    return which, np.arange(length) - np.take_along_axis(ends - sizes, which, 1)


@register("data/corpus", "copy")
class Copy(_Generated):
    """Task: a random string, a bar, the same string again (`kqkz|kqkz;`). Scored: the second string.

    A row holds many such examples. With the default, strings of one length, each token has its source at a fixed distance; with
    `shortest` below `longest`, none has. A string may hold a symbol more than once, so that the last token alone does not tell the next.
    """

    name = "copy"

    def __init__(self, *, symbols: int = 16, shortest: int = 8, longest: int = 8) -> None:
        _check("symbols", symbols, 2, LETTERS)
        _check("shortest", shortest, 1)
        _check("longest", longest, shortest, why="data.corpus.shortest")
        self.strings = _letters("Ll", symbols)
        options = {"symbols": symbols, "shortest": shortest, "longest": longest}
        super().__init__(self.strings + "|;", 2 * longest, options)
        self.shortest, self.longest = shortest, longest

    def _rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        total = length + 1
        sizes = draw.integers(self.shortest, self.longest + 1, (count, total // (2 * self.shortest + 2) + 1))
        noise = _random(draw, self._ids(self.strings), (count, total))
        which, offset = _segments(2 * sizes + 2, total)
        size = np.take_along_axis(sizes, which, 1)
        copied = (offset > size) & (offset <= 2 * size)
        ids = np.take_along_axis(noise, np.arange(total) - np.where(copied, size + 1, 0), 1)
        bar, end = self._ids("|;")
        ids[offset == size] = bar
        ids[offset == 2 * size + 1] = end
        return ids, copied[:, 1:]


@register("data/corpus", "recall")
class Recall(_Generated):
    """Task: pairs of a key and a value, then queries: a random key of the row, its value (`AxCyBx` `CyBxCy…`). Scored: the queries' values.

    Multi-query associative recall (Arora et al., 2023, "Zoology"). Each query draws its key anew, so that what was asked before says
    nothing about what is left.
    """

    name = "recall"

    def __init__(self, *, pairs: int = 4, keys: int = 8, values: int = 8) -> None:
        _check("keys", keys, 2, LETTERS)
        _check("values", values, 2, LETTERS)
        _check("pairs", pairs, 2, keys, "data.corpus.keys: those of a row are distinct")
        self.keys, self.values, self.pairs = _letters("Lu", keys), _letters("Ll", values), pairs
        super().__init__(self.keys + self.values, 2 * pairs + 1, {"pairs": pairs, "keys": keys, "values": values})

    def _rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        queries = (length + 2) // 2 - self.pairs
        keys = self._ids(self.keys)[_orders(draw, (count, len(self.keys)))[:, : self.pairs]]
        values = _random(draw, self._ids(self.values), (count, self.pairs))
        asked = draw.integers(0, self.pairs, (count, queries))
        told = np.broadcast_to(np.arange(self.pairs), (count, self.pairs))
        order = np.concatenate((told, asked), 1)
        ids = np.empty((count, 2 * order.shape[1]), np.int64)
        ids[:, 0::2] = np.take_along_axis(keys, order, 1)
        ids[:, 1::2] = np.take_along_axis(values, order, 1)
        scored = np.zeros((count, length), bool)
        scored[:, 2 * self.pairs :: 2] = True
        return ids[:, : length + 1], scored


@register("data/corpus", "induction")
class Induction(_Generated):
    """Task: a pattern of distinct random tokens, then random stretches of it. Scored: a stretch's tokens after its first.

    After the second occurrence of a token, say what followed the first (Olsson et al., 2022): in `qsxme` `sxm` `xme` `qs`, after
    each `x` of a stretch comes `m`. Where a new stretch begins is chance, and not scored.
    """

    name = "induction"

    def __init__(self, *, symbols: int = 24, pattern: int = 16, shortest: int = 2, longest: int = 8) -> None:
        _check("symbols", symbols, 2, LETTERS)
        _check("pattern", pattern, 2, symbols, "data.corpus.symbols: those of a pattern are distinct")
        _check("longest", longest, 2, pattern, "data.corpus.pattern: a stretch lies within it")
        _check("shortest", shortest, 2, longest, "data.corpus.longest")
        options = {"symbols": symbols, "pattern": pattern, "shortest": shortest, "longest": longest}
        super().__init__(_letters("Ll", symbols), pattern + longest - 1, options)
        self.pattern, self.shortest, self.longest = pattern, shortest, longest

    def _rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        rest = length + 1 - self.pattern
        pattern = _orders(draw, (count, len(self.alphabet)))[:, : self.pattern]
        sizes = draw.integers(self.shortest, self.longest + 1, (count, rest // self.shortest + 1))
        starts = draw.integers(0, self.pattern - sizes + 1)
        which, offset = _segments(sizes, rest)
        repeated = np.take_along_axis(pattern, np.take_along_axis(starts, which, 1) + offset, 1)
        scored = np.zeros((count, length), bool)
        scored[:, self.pattern - 1 :] = offset > 0
        return np.concatenate((pattern, repeated), 1), scored


@register("data/corpus", "addition")
class Addition(_Generated):
    """Task: sums of two numbers of `digits` digits, one after the other (`47+85=231$`: 132). Scored: the answer's digits.

    Numbers are uniform and keep their leading zeros, so that each sum takes as many tokens. `reversed` writes the answer, of one
    digit more, least digit first: the order in which carries are found. The share `held_out` of all sums, the same whatever the seed
    and the order of the numbers, is never trained on: the held-out rows are made of them. As problems: `47+85=`, answered by `231`.
    """

    name = "addition"
    VERSION = 2  # 1 held no sum back

    def __init__(self, *, digits: int = 2, reversed: bool = True, held_out: float = 0.1) -> None:
        _check("digits", digits, 1, 18)
        if not 0.01 <= held_out <= 0.5:
            raise ConfigError(f"data.corpus.held_out={held_out} must be between 0.01 and 0.5, a share of all sums")
        self.digits, self.reversed, self.size, self.share = digits, reversed, 3 * digits + 4, held_out
        super().__init__("0123456789+=$", self.size - 2, {"digits": digits, "reversed": reversed, "held_out": held_out})

    def _rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        return self._sums(count, length, draw, held_out=False)

    def held_out_rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        self._check_length(length)
        return self._sums(count, length, draw, held_out=True)

    def _sums(self, count: int, length: int, draw: np.random.Generator, *, held_out: bool) -> Rows:
        d, sums = self.digits, -(-(length + 1) // self.size)
        a, b = self._pairs(draw, (count, sums), held_out)
        zero = self.alphabet.index("0")
        made = np.empty((count, sums, self.size), np.int64)
        for number, start, width, reverse in ((a, 0, d, False), (b, d + 1, d, False), (a + b, 2 * d + 2, d + 1, self.reversed)):
            for power in range(width):
                made[:, :, start + (power if reverse else width - 1 - power)] = number // 10**power % 10 + zero
        made[:, :, [d, 2 * d + 1, 3 * d + 3]] = self._ids("+=$")
        place = np.arange(1, length + 1) % self.size
        answer = (place > 2 * d + 1) & (place < 3 * d + 3)
        return made.reshape(count, -1)[:, : length + 1], np.broadcast_to(answer, (count, length)).copy()

    def _pairs(self, draw: np.random.Generator, shape: tuple[int, ...], held_out: bool) -> Ids:
        """Pairs of numbers (2, …): of those that are held out, or of the others."""
        pairs: Ids = draw.integers(0, 10**self.digits, (2, *shape))
        while (wrong := self._kept_back(*pairs) != held_out).any():
            pairs[:, wrong] = draw.integers(0, 10**self.digits, (2, int(wrong.sum())))
        return pairs

    def _kept_back(self, a: Ids, b: Ids) -> NDArray[np.bool_]:
        """Whether a sum is held out; whichever of its numbers comes first."""
        with np.errstate(over="ignore"):
            chance = mixed(mixed(np.minimum(a, b).astype(np.uint64)) + np.maximum(a, b).astype(np.uint64))
        return chance >> np.uint64(32) < np.uint64(int(self.share * 2**32))

    def problems(self, numbers: Sequence[int], seed: int, *, held_out: bool = False) -> list[Problem]:
        made = []
        for number in numbers:
            a, b = (int(n) for n in self._pairs(np.random.default_rng([seed, 2 + held_out, number]), (1,), held_out)[:, 0])
            answer = str(a + b).zfill(self.digits + 1)
            text = answer[::-1] if self.reversed else answer
            made.append(Problem(f"{a:0{self.digits}}+{b:0{self.digits}}=", text, tokens=len(text)))
        return made


@register("data/corpus", "dyck")
class Dyck(_Generated):
    """Task: nested brackets of some kinds, at most `depth` deep (Hewitt et al., 2020).

    A row is the beginning of an endless sequence: a fair coin opens or closes, where the depth leaves a choice, and each kind is as
    likely. `score=closing` (the default) scores the closing brackets that follow a closing one: given that it closes, the kind is
    determined, by a bracket further back than the last token. `score=all` scores every token; there the perfect model's loss
    is the entropy of the coin and of the kinds, averaged exactly over the depths that each place may have.
    """

    name = "dyck"

    def __init__(self, *, kinds: int = 3, depth: int = 3, score: Literal["closing", "all"] = "closing") -> None:
        _check("kinds", kinds, 2, len(BRACKETS) // 2)
        _check("depth", depth, 2, 1000)
        self.opening, self.closing, self.depth, self.score = BRACKETS[0 : 2 * kinds : 2], BRACKETS[1 : 2 * kinds : 2], depth, score
        super().__init__(self.opening + self.closing, 2 * depth - 1, {"kinds": kinds, "depth": depth, "score": score})

    def _rows(self, count: int, length: int, draw: np.random.Generator) -> Rows:
        total = length + 1
        # A walk that must turn at 0 and at `depth` is a free walk of fair steps, folded at both.
        steps = 2 * draw.integers(0, 2, (count, total), dtype=np.int8).astype(np.int64) - 1
        folded = steps.cumsum(1) % (2 * self.depth)
        level = np.minimum(folded, 2 * self.depth - folded)
        before = np.concatenate((np.zeros((count, 1), np.int64), level[:, :-1]), 1)
        opens = level > before
        kind = draw.integers(0, len(self.opening), (count, total), dtype=np.uint8)
        place = np.arange(total)
        partner = np.zeros((count, total), np.int64)  # of a closing bracket: the last opening one of its level
        for d in range(1, self.depth + 1):
            last = np.maximum.accumulate(np.where(opens & (level == d), place, 0), axis=1)
            partner = np.where(~opens & (before == d), last, partner)
        partner = np.where(opens, place, partner)
        kind = np.take_along_axis(kind, partner, 1)
        ids = np.where(opens, self._ids(self.opening)[kind], self._ids(self.closing)[kind])
        scored = np.ones((count, length), bool) if self.score == "all" else ~opens[:, 1:] & ~opens[:, :-1]
        return ids, scored

    def best_loss(self, length: int) -> float:
        if self.score == "closing":
            return 0.0
        which = math.log(len(self.opening))
        entropy = np.full(self.depth + 1, math.log(2) + which / 2)  # of the next token, at each depth
        entropy[[0, -1]] = which, 0.0
        move = np.zeros((self.depth + 1, self.depth + 1))
        for d in range(self.depth + 1):
            up = 1.0 if d == 0 else 0.0 if d == self.depth else 0.5
            move[d, min(d + 1, self.depth)] += up
            move[d, max(d - 1, 0)] += 1 - up
        depths = np.eye(self.depth + 1)[1]  # after the first token, which opens
        total = 0.0
        for _ in range(length):
            total += float(depths @ entropy)
            depths = depths @ move
        return total / length
