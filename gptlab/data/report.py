"""What prepared data hold: documents, lengths, duplicates, shares, overlap with the held-out sets, and rows to look at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gptlab.data.conversations import Conversations
from gptlab.data.overlap import overlaps
from gptlab.data.prepared import Prepared
from gptlab.data.rows import Rows
from gptlab.data.shard import Tokens, TokenStream
from gptlab.data.sources import Mixed, Packed, training_rows

LOOKED_AT = 50_000_000  # training tokens of a source that are searched for duplicates and overlap
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class SourceFigures:
    """The training text of one source."""

    name: str
    share: float  # of the training tokens, by its weight
    tokens: int
    documents: int
    bytes: int
    characters: int
    skipped: dict[str, int]  # rows without text, by reason
    removed: dict[str, int]  # documents that a filter took out, by reason
    lengths: dict[str, float]  # tokens of a document: quantiles, mean
    histogram: list[tuple[int, int]]  # documents of up to so many tokens
    longer: float  # the share of documents longer than the context
    duplicates: int  # documents that are the same as an earlier one
    searched: int  # documents among which they were sought
    overlap: dict[str, float]  # the share of each held-out set's stretches that stand in the training text
    dropped: float | None  # the share of tokens that packing leaves out; None: it leaves out none
    chats: str = ""  # of chats: how they became rows
    written: float | None = None  # the share of their tokens that the assistant wrote, and that are scored


@dataclass(frozen=True)
class Row:
    """A training row, and as text its documents' parts, in order."""

    number: int  # from 0, among all rows that training may see
    source: str
    parts: list[str]  # of its inputs
    cuts: list[int]  # where each document but the first begins, in tokens
    tokens: list[int]  # its inputs and the last target
    scored: list[bool] | None  # which targets count; None: all


def describe(prepared: Prepared, context: int, packing: str, seed: int) -> list[SourceFigures]:
    """The figures of each source of prepared data."""
    parts = prepared.parts or {prepared.manifest["corpus"]: prepared}
    rows = training_rows(prepared, context, packing, seed)
    by_name = dict(zip(rows.names, rows.parts, strict=True)) if isinstance(rows, Mixed) else dict.fromkeys(parts, rows)
    shares = {n: s / sum(rows.share) for n, s in zip(rows.names, rows.share, strict=True)} if isinstance(rows, Mixed) else {}
    return [_source(n, p, prepared, by_name.get(n), shares.get(n, 0.0 if prepared.parts else 1.0), context) for n, p in parts.items()]


def _source(name: str, part: Prepared, whole: Prepared, rows: Rows | None, share: float, context: int) -> SourceFigures:
    stream, counts = part.stream("train"), part.split_counts("train")
    starts = stream.document_starts()
    lengths = np.diff([*starts, len(stream)])
    border = 0 if part.chat else 1 if whole.tokenizer.end_of_text is not None else len(whole.tokenizer.encode(whole.tokenizer.separator))
    searched, duplicates = _duplicates(stream, starts, border)
    sets = {n: whole.stream(n) for n in whole.validation_names if n != "val" or not whole.parts}
    dropped = rows.dropped() if isinstance(rows, Packed) else None
    quantiles = np.quantile(lengths, QUANTILES)
    return SourceFigures(
        name=name,
        share=share,
        tokens=len(stream),
        documents=len(starts),
        bytes=counts["bytes"],
        characters=counts["characters"],
        skipped=counts["skipped"],
        removed=counts["removed"],
        lengths={**dict(zip(map("{:g}".format, QUANTILES), map(float, quantiles), strict=True)), "mean": float(lengths.mean())},
        histogram=_histogram(lengths),
        longer=float((lengths > context).mean()),
        duplicates=duplicates,
        searched=searched,
        overlap=overlaps(stream.beginning(LOOKED_AT), sets),
        dropped=dropped[0] / dropped[1] if dropped else None,
        chats=rows.described() if isinstance(rows, Conversations) else "",
        written=_written_share(part) if part.chat else None,
    )


def _written_share(part: Prepared) -> float:
    own = part.written("train")
    count = min(len(own), LOOKED_AT)
    return float(own.window(0, count).mean())


def _histogram(lengths: Tokens) -> list[tuple[int, int]]:
    """Documents by length in powers of 2."""
    power = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    return [(1 << int(p), int((power == p).sum())) for p in range(int(power.min()), int(power.max()) + 1)]


def _duplicates(stream: TokenStream, starts: Tokens, border: int) -> tuple[int, int]:
    """How many documents were compared, and how many of them are the same as an earlier one, less the `border` tokens before it."""
    ends = np.append(starts[1:], len(stream))
    seen: set[bytes] = set()
    found = searched = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end > LOOKED_AT:
            break
        tokens = stream.window(start, end - start)
        if searched:  # the first has no border
            tokens = tokens[border:]
        searched += 1
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        found += digest in seen
        seen.add(digest)
    return searched, found


def documents(prepared: Prepared, count: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """A few documents drawn at random from each source: its name, the document's number, its text (at most 4,096 tokens of it)."""
    for name, part in (prepared.parts or {prepared.manifest["corpus"]: prepared}).items():
        stream = part.stream("train")
        starts = stream.document_starts()
        chosen = np.sort(np.random.default_rng(seed).choice(len(starts), min(count, len(starts)), replace=False))
        for number in chosen.tolist():
            end = int(starts[number + 1]) if number + 1 < len(starts) else len(stream)
            tokens = stream.window(int(starts[number]), min(end - int(starts[number]), 4096)).tolist()
            if tokens and tokens[0] == prepared.tokenizer.end_of_text:
                tokens = tokens[1:]
            yield name, number, prepared.tokenizer.decode(tokens)


def rows(prepared: Prepared, context: int, packing: str, seed: int, count: int, first: int = 0, too_long: str = "cut") -> list[Row]:
    """`count` rows that training sees, from row `first` (from 0) on, decoded, each cut where a document begins."""
    source = training_rows(prepared, context, packing, seed, too_long)
    place = source.place(np.arange(first, first + count, dtype=np.int64))
    fetched = source.fetch(place, True)
    assert fetched.document is not None
    found = []
    for i, (tokens, document) in enumerate(zip(fetched.tokens, fetched.document, strict=True)):
        cuts = np.flatnonzero(np.diff(document)) + 1
        parts = [prepared.tokenizer.decode(p.tolist()) for p in np.split(tokens[:-1], cuts)]
        name = source.names[int(place[i, 0])] if isinstance(source, Mixed) else prepared.manifest["corpus"]
        counted = fetched.extra.get("answer", fetched.scored)  # of pairs both answers are, and not the pair's one token
        scored = None if counted is None else counted[i].tolist()
        found.append(Row(first + i, name, parts, cuts.tolist(), tokens.tolist(), scored))
    return found
