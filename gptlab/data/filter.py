"""Which documents are kept: exact and near duplicates go, and so does what shares text with a held-out set."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.schema import FilterConfig
from gptlab.data.words import BLOCK, POWERS, VALUES, Hashes, Places, Signatures, hash_runs, hash_words, minhash, mix

FOUND = 0.99  # the least probability that a pair at the threshold is compared
DEPTH = 64  # the most documents of one bucket that are compared
RUN, SHORT = 13, 8  # words of a run that is contamination, and of the shortest held-out text that is sought

Keys = npt.NDArray[np.uint32]


class Look(NamedTuple):
    """What `Filter.reason` needs to know of a document."""

    exact: int  # 64 bits; 0 where exact duplicates are not sought
    signature: Signatures | None  # "values"; None: near duplicates are not sought, or the document has no words
    keys: Keys  # "bands"
    overlap: str  # the held-out set that it shares text with, or ""


class Filter:
    """Judges the documents of a corpus one after another; one for a preparation.

    A word is a run of letters, marks and digits of the lowered text, apostrophes taken out; in scripts written without spaces
    (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is one. All hashes are fixed functions of the text.

    - Exact duplicates: BLAKE2b with 64 bits of the text, each stretch of white space made one space and none at the ends. The
      probability that any two of n different documents collide is n² / 2^65: 0.0003 for 100 million.
    - Near duplicates: the Jaccard similarity of the sets of 5-word shingles (Broder, 1997), estimated by the share of 128 MinHash
      values that are equal, of which 16 bits are kept (Li & König, 2010). An estimate of at least `near_duplicates` removes the
      later document, so about half of the pairs exactly there go. Which documents are compared is found by banding (Leskovec,
      Rajaraman & Ullman, Mining of Massive Datasets, chapter 3): a pair at the threshold with probability 0.99 or more (`bands`),
      unless more than 64 documents share a bucket, of which the newest 64 are. A document of fewer than 5 words has one shingle,
      the whole of it; one without words has none, and is no near duplicate.
    - Overlap: a run of 13 words (GPT-3's rule: Brown et al., 2020, appendix C) that stands in a held-out text too. A held-out text
      of 8 to 12 words is sought whole, a shorter one not at all; a document of fewer than 13 words matches only such a text.

    Only kept documents are remembered: 8 bytes each for exact and 256 for near duplicates, on disk and in memory, where up to a
    quarter is room to grow. An index in memory adds 8 to 13 bytes for exact duplicates and as much for each band: with the 16
    bands of 0.8, near duplicates take 384 to 528 bytes. Held-out text takes 12 to 14 bytes for each word of it.
    """

    def __init__(self, options: FilterConfig, held_out: Iterable[tuple[str, Iterable[str]]]) -> None:
        """`held_out`: the sets to keep out of the training text, each a name and its texts; the first takes what two share.

        Raises ConfigError for a similarity that cannot be sought, and DataError for a set without a text of 8 words.
        """
        self._exact, self._similarity = options.exact_duplicates, options.near_duplicates
        self._bands, self._band_rows = bands(self._similarity) if self._similarity else (0, 0)
        self._held_out = _HeldOut(held_out)
        columns: list[Any] = [("exact", "<u8")] if self._exact else []
        if self._similarity:
            columns.append(("signature", "<u2", (VALUES,)))
        # A row for each kept document, and room. Grown in place: no view of it may outlive the statement that makes it.
        self._kept: npt.NDArray[Any] = np.zeros(0, np.dtype(columns))
        self._by_exact, self._by_band = _Chains(1), _Chains(self._bands)
        self._judged = self._count = self._saved = self._crc = 0

    def look(self, text: str) -> Look:
        """The hashes of a document. Changes nothing: any thread may ask, in any order."""
        return self.looks([text])[0]

    def looks(self, texts: Sequence[str]) -> list[Look]:
        """`look` of each: the same, in half the time and with other threads at work meanwhile, for about a million characters."""
        exact = [_exact_hash(text) for text in texts] if self._exact else [0] * len(texts)
        words, begins = np.zeros(0, np.uint64), np.zeros(len(texts) + 1, np.int64)
        if self._similarity or self._held_out.names:
            words, begins = hash_words(texts)
        names = self._held_out.owners(words, begins)
        if not self._similarity:
            return [Look(e, None, np.zeros(0, np.uint32), name) for e, name in zip(exact, names, strict=True)]
        signatures = minhash(words, begins)
        known = [s if n else None for s, n in zip(signatures, np.diff(begins).tolist(), strict=True)]
        return [Look(*look) for look in zip(exact, known, _keys(signatures, self._bands, self._band_rows), names, strict=True)]

    def reason(self, look: Look) -> str:
        """Why the next document goes: overlap:NAME, exact_duplicate or near_duplicate; "": it is kept, and remembered.

        An overlap is named first, so that the count of overlaps is the same whatever else is sought.
        """
        self._judged += 1
        if look.overlap:
            return f"overlap:{look.overlap}"
        if self._exact:
            for found in self._by_exact.walk(_exact_keys(look.exact)):
                if (self._kept["exact"][found] == look.exact).any():
                    return "exact_duplicate"
        if look.signature is not None and (near := list(islice(self._by_band.walk(look.keys), DEPTH))):
            same = self._kept["signature"][np.unique(np.concatenate(near))] == look.signature
            if np.count_nonzero(same, axis=1).max() >= VALUES * self._similarity:
                return "near_duplicate"
        if self._exact or self._similarity:
            self._remember(look)
        return ""

    def _remember(self, look: Look) -> None:
        document = self._count
        self._count += 1
        _make_room(self._kept, self._count)
        if self._exact:
            self._kept["exact"][document] = look.exact
        if look.signature is not None:
            self._kept["signature"][document] = look.signature
        if self._count > max(self._by_exact.slots, self._by_band.slots):
            self._index()
            return
        if self._exact:
            self._by_exact.add(document, _exact_keys(look.exact))
        if look.signature is not None:
            self._by_band.add(document, look.keys)

    def _index(self) -> None:
        """Make the indexes anew, for as many documents as there are and as many more."""
        kept = self._kept[: self._count]
        if self._exact:
            self._by_exact.build(np.arange(self._count), _exact_keys(kept["exact"])[:, None], self._count)
        if self._similarity:
            documents = np.flatnonzero(kept["signature"].any(axis=1))  # those with words
            keys = np.empty((len(documents), self._bands), np.uint32)
            for start in range(0, len(documents), BLOCK):
                part = kept["signature"][documents[start : start + BLOCK]]
                keys[start : start + BLOCK] = _keys(part, self._bands, self._band_rows)
            self._by_band.build(documents, keys, self._count)

    def save(self, file: Path) -> dict[str, int]:
        """Append what was remembered since the last save to `file`, and return the JSON mark with which `restore` finds it.

        The file is on disk when this returns. What it holds beyond the last save, as a killed preparation leaves it, is cut off.
        Raises DataError if it was shortened since, and IOFailure.
        """
        size = self._kept.dtype.itemsize
        if size:
            rows = self._kept[self._saved : self._count].tobytes()
            try:
                with file.open("ab") as out:
                    if out.tell() < self._saved * size:
                        raise DataError(f"{file} is shorter than it was written: start the preparation again")
                    out.truncate(self._saved * size)
                    out.write(rows)
                    out.flush()
                    os.fsync(out.fileno())
            except OSError as error:
                raise IOFailure(f"{file} could not be written ({error.strerror or error})") from error
            self._saved, self._crc = self._count, zlib.crc32(rows, self._crc)
        return {"judged": self._judged, "kept": self._count, "row": size, "crc32": self._crc}

    def restore(self, file: Path, mark: dict[str, int]) -> None:
        """Make this filter, which has judged nothing, what it was when `save` returned `mark`; what `file` holds beyond is not read.

        Raises DataError if the file is missing, shorter, damaged or made for other options, and IOFailure.
        """
        assert not self._judged, "only a new filter can be restored"
        count, size = mark["kept"], self._kept.dtype.itemsize
        if mark["row"] != size:
            raise DataError(f"{file} was made for other duplicates than data.filter seeks: start the preparation again")
        if size:
            try:
                self._kept = np.fromfile(file, self._kept.dtype, count)
            except FileNotFoundError as error:
                raise DataError(f"{file} is missing: start the preparation again") from error
            except OSError as error:
                raise IOFailure(f"{file} could not be read ({error.strerror or error})") from error
            if zlib.crc32(self._kept.tobytes()) != mark["crc32"]:
                raise DataError(f"{file} is shorter than it was written, or damaged: start the preparation again")
        self._judged, self._count, self._saved, self._crc = mark["judged"], count, count, mark["crc32"]
        self._index()


def bands(similarity: float) -> tuple[int, int]:
    """The number of bands and of values in each that find a pair of this similarity s: 1 - (1 - s^rows)^bands is at least 0.99.

    As many rows as can be (the fewest comparisons in vain), then as few bands. Raises ConfigError where none do.
    """
    for rows in range(VALUES, 0, -1):
        for count in range(1, VALUES // rows + 1):
            if 0 < similarity <= 1 and 1 - (1 - similarity**rows) ** count >= FOUND:
                return count, rows
    raise ConfigError(f"data.filter.near_duplicates={similarity}: give a similarity from 0.04 to 1, as 0.8, or 0 to keep near duplicates")


def _exact_hash(text: str) -> int:
    spaced = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(spaced, digest_size=8).digest(), "little")


def _keys(signatures: Signatures, count: int, rows: int) -> Keys:
    """A key for each band of signatures "documents values" -> "documents bands"."""
    split = signatures[:, : count * rows].reshape(len(signatures), count, rows)
    return (mix(split.astype(np.uint64) @ POWERS[1 : rows + 1]) >> np.uint64(32)).astype(np.uint32)


def _exact_keys(hashes: Any) -> Keys:
    """The low halves of hashes: one of them, or an array."""
    return np.atleast_1d(np.asarray(hashes, np.uint64)).astype(np.uint32)


def _make_room(rows: npt.NDArray[Any], count: int) -> None:
    """Let an array hold so many rows, in place and with a quarter more; new rows are 0."""
    if count > len(rows):
        rows.resize((max(1024, count + count // 4), *rows.shape[1:]), refcheck=False)


class _Chains:
    """Documents by key: in each band, those whose keys end in the same bits are a chain, newest first.

    Twelve bytes or so for an entry, where a dictionary takes over a hundred. A chain can hold other keys too: the caller compares.
    """

    def __init__(self, count: int) -> None:
        self.bands = np.arange(count)
        self.build(np.zeros(0, np.int64), np.zeros((0, count), np.uint32), 0)

    def build(self, documents: Places, keys: Keys, count: int) -> None:
        """Hold these of `count` documents, which ascend, under their keys "documents bands", just as if each were added."""
        self.slots = max(1024, 1 << (count - 1).bit_length())
        self._heads = np.zeros((len(self.bands), self.slots), np.uint32)  # 1 + the newest document; 0: none
        self._before = np.zeros((count, len(self.bands)), np.uint32)  # 1 + the one before it in its chain
        for band in self.bands:
            slots = keys[:, band] & np.uint32(self.slots - 1)
            order = np.argsort(slots, kind="stable")
            slots, chained = slots[order], documents[order]
            same = slots[1:] == slots[:-1]
            self._before[chained[1:][same], band] = chained[:-1][same] + 1
            newest = np.append(~same, True)[: len(slots)]
            self._heads[band, slots[newest]] = chained[newest] + 1

    def add(self, document: int, keys: Keys) -> None:
        """Put a document, newer than all others, under its keys "bands"."""
        _make_room(self._before, document + 1)
        slots = keys & np.uint32(self.slots - 1)
        self._before[document] = self._heads[self.bands, slots]
        self._heads[self.bands, slots] = document + 1

    def walk(self, keys: Keys) -> Iterator[Places]:
        """The newest documents of each key's chain, then the next newest, and so on to the ends."""
        band = self.bands
        at = self._heads[band, keys & np.uint32(self.slots - 1)]
        while (live := at > 0).any():
            band, documents = band[live], at[live].astype(np.int64) - 1
            yield documents
            at = self._before[documents, band]


class _HeldOut:
    """The runs of words of the held-out texts, and whose they are."""

    def __init__(self, sets: Iterable[tuple[str, Iterable[str]]]) -> None:
        self.names: list[str] = []
        lengths: set[int] = set()
        hashes: list[Hashes] = []
        for name, texts in sets:
            mine: list[Hashes] = []
            for text in texts:
                words, _ = hash_words([text])
                if len(words) >= SHORT:
                    lengths.add(length := min(RUN, len(words)))
                    mine.append(hash_runs(words, length))
            if not mine:
                raise DataError(f"the held-out set {name} has no text of {SHORT} words or more: nothing of it can be sought")
            self.names.append(name)
            hashes.append(np.unique(np.concatenate(mine)))
        self.lengths = sorted(lengths)
        if not hashes:
            return
        owners = np.repeat(np.arange(len(hashes), dtype=np.uint16), [len(h) for h in hashes])
        self._hashes, firsts = np.unique(np.concatenate(hashes), return_index=True)
        self._owners = owners[firsts]
        # Bits by the hashes' beginnings, 16 to 32 for each hash, answer for nearly all runs that are not held out.
        self._shift = np.uint64(64 - (16 * len(self._hashes)).bit_length())
        self._bits = np.zeros(1 << (61 - int(self._shift)), np.uint8)
        byte, bit = self._place(self._hashes)
        np.bitwise_or.at(self._bits, byte, bit)

    def _place(self, hashes: Hashes) -> tuple[Places, npt.NDArray[np.uint8]]:
        begun = (hashes >> self._shift).astype(np.int64)
        return begun >> 3, np.left_shift(np.uint8(1), (begun & 7).astype(np.uint8))

    def owners(self, words: Hashes, begins: Places) -> list[str]:
        """For each text of `hash_words`, the first of the sets that share a run with it, or ""."""
        first = np.full(len(begins) - 1, len(self.names))
        for length in self.lengths:
            runs = hash_runs(words, length)
            byte, bit = self._place(runs)
            at = np.flatnonzero(self._bits[byte] & bit)
            places = np.minimum(np.searchsorted(self._hashes, runs[at]), len(self._hashes) - 1)
            found = self._hashes[places] == runs[at]
            at, places = at[found], places[found]
            texts = np.searchsorted(begins, at, side="right") - 1
            inside = at + length <= begins[texts + 1]
            np.minimum.at(first, texts[inside], self._owners[places[inside]])
        names = [*self.names, ""]
        return [names[i] for i in first.tolist()]
