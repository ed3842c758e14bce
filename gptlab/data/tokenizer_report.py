"""What a tokeniser does with a text, in figures: how short it makes it, what it leaves unused, how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import DataError
from gptlab.data.tokenizer import Tokenizer

SAMPLE_BYTES = 10_000_000  # the figures take about twenty times this memory at most


@dataclass(frozen=True)
class Sample:
    """The beginning of some texts, piece by piece as they came."""

    texts: tuple[str, ...]
    bytes: int
    whole: bool  # nothing was left out


@dataclass(frozen=True)
class Share:
    """How many of how many."""

    found: int
    possible: int

    @property
    def share(self) -> float:
        """Between 0 and 1; 0 where nothing is possible."""
        return self.found / self.possible if self.possible else 0.0


@dataclass(frozen=True)
class TextFigures:
    """What is true of the text, whatever the tokeniser. Words are what white space separates."""

    bytes: int
    characters: int
    words: int
    distinct_characters: int
    character_pairs: Share  # neighbours that occur, of all pairs of its characters
    whole: bool


@dataclass(frozen=True)
class TokenFigure:
    """A token, its text as `tokens_of` gives it."""

    id: int
    text: str
    count: int  # in the sample


@dataclass(frozen=True)
class TokenizerFigures:
    """What a tokeniser makes of a sample.

    single_byte   tokens of the sample that are one byte, of all of them
    unused        ordinary tokens (neither special nor a gap in the ids) that the sample does not use, of all ordinary ones
    token_pairs   neighbouring tokens that occur, of all pairs that could
    speed         MB (10⁶ bytes) a second, encoded by one thread
    longest       of the whole vocabulary, by bytes, without rules and indentation (fewer than four different characters)
    most_frequent of the sample; unused_examples: spread over the ids
    """

    name: str
    vocabulary: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    tokens_per_word: float
    single_byte: Share
    unused: Share
    token_pairs: Share
    speed: float
    most_frequent: tuple[TokenFigure, ...]
    longest: tuple[TokenFigure, ...]
    unused_examples: tuple[TokenFigure, ...]


def take(texts: Iterable[str], limit: int = SAMPLE_BYTES) -> Sample:
    """The first `limit` bytes of UTF-8 of the texts; reads no further than it must. Raises DataError when there is no text."""
    kept: list[str] = []
    size = 0
    whole = True
    for text in texts:
        if not text:
            continue
        if size >= limit:
            whole = False
            break
        raw = text.encode("utf-8", "replace")
        if size + len(raw) > limit:
            whole = False
            raw = raw[: limit - size]
        part = raw.decode("utf-8", "ignore")  # a character cut in two is left out
        kept += [part] if part else []
        size += len(part.encode("utf-8"))
        if not whole:
            break
    if not kept:
        raise DataError("there is no text to report on")
    return Sample(tuple(kept), size, whole)


def describe(sample: Sample) -> TextFigures:
    """The figures of the text itself."""
    points = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in sample.texts]
    letters, flat = np.unique(np.concatenate(points), return_inverse=True)
    pieces = np.split(flat, np.cumsum([len(p) for p in points])[:-1])
    return TextFigures(
        bytes=sample.bytes,
        characters=len(flat),
        words=_words(sample),
        distinct_characters=len(letters),
        character_pairs=Share(_pairs(pieces, len(letters)), len(letters) ** 2),
        whole=sample.whole,
    )


def measure(name: str, tokenizer: Tokenizer, sample: Sample, *, examples: int = 12) -> TokenizerFigures:
    """The figures of one tokeniser over a sample; `name` is what the report calls it."""
    tokenizer.encode(sample.texts[0][:1000])  # what a first call sets up is not its speed
    start = time.perf_counter()
    encoded = [tokenizer.encode(text) for text in sample.texts]
    seconds = time.perf_counter() - start
    counts = np.zeros(tokenizer.vocabulary, np.int64)
    for ids in encoded:
        counts += np.bincount(ids, minlength=tokenizer.vocabulary)
    tokens = int(counts.sum())
    lengths = tokenizer.byte_lengths()  # 0: a special token, or an id that stands for nothing
    ordinary = lengths > 0
    unused = np.flatnonzero(ordinary & (counts == 0))
    frequent = np.lexsort((np.arange(len(counts)), -counts))[: min(examples, int((counts > 0).sum()))]
    spread = unused[np.unique(np.linspace(0, len(unused) - 1, examples, dtype=int))] if len(unused) else unused

    def figures(ids: Iterable[int]) -> tuple[TokenFigure, ...]:
        return tuple(TokenFigure(i, text, int(counts[i])) for i in map(int, ids) for text in tokens_of(tokenizer, [i]))

    return TokenizerFigures(
        name=name,
        vocabulary=tokenizer.vocabulary,
        tokens=tokens,
        bytes_per_token=sample.bytes / tokens,
        characters_per_token=sum(map(len, sample.texts)) / tokens,
        tokens_per_word=tokens / max(1, _words(sample)),
        single_byte=Share(int(counts[lengths == 1].sum()), tokens),
        unused=Share(len(unused), int(ordinary.sum())),
        token_pairs=Share(_pairs(encoded, tokenizer.vocabulary), int(ordinary.sum()) ** 2),
        speed=sample.bytes / 1e6 / max(seconds, 1e-9),
        most_frequent=figures(frequent),
        longest=figures(_longest(tokenizer, lengths, examples)),
        unused_examples=figures(spread),
    )


def compare(tokenizers: Mapping[str, Tokenizer], sample: Sample) -> list[TokenizerFigures]:
    """Several tokenisers over the same sample, in the order given."""
    return [measure(name, tokenizer, sample) for name, tokenizer in tokenizers.items()]


def token_texts(tokenizer: Tokenizer, text: str) -> list[str]:
    """The tokens of a text, one by one, each as `tokens_of` gives it."""
    return tokens_of(tokenizer, tokenizer.encode(text).tolist())


def tokens_of(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of tokens one by one; bytes that are no UTF-8 become \\xe6, or U+FFFD where the tokeniser has no `token_bytes`."""
    tell: Callable[[int], bytes] | None = getattr(tokenizer, "token_bytes", None)
    return [tell(i).decode("utf-8", "backslashreplace") if tell else tokenizer.decode([i]) for i in ids]


def _longest(tokenizer: Tokenizer, lengths: npt.NDArray[np.int64], most: int) -> list[int]:
    found: list[int] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        if lengths[i] < 4 or len(found) == most:
            break
        if len(set(tokenizer.decode([i]))) > 3:
            found.append(i)
    return found


def _words(sample: Sample) -> int:
    return sum(len(text.split()) for text in sample.texts)


def _pairs(pieces: Iterable[npt.NDArray[Any]], size: int) -> int:
    """How many different pairs of neighbours there are in sequences of ids below `size`; none reaches over two pieces."""
    codes = [np.unique(piece[:-1].astype(np.int64) * size + piece[1:]) for piece in pieces]
    return len(np.unique(np.concatenate(codes)))
