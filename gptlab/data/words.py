"""Words of a text as numbers: hashes of words, of runs of words and of whole texts, the same in every process."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

SHINGLE = 5  # words of a shingle
VALUES = 128  # minima of a signature: a similarity s is measured to within sqrt(s (1 - s) / 128), 0.035 at 0.8
SLICE = 1 << 15  # characters hashed at once: what numpy works on stays in the processor's cache
BLOCK = 1 << 12  # shingles at once: 2 MB of products; half as many took twice as long for each (measured)
# Odd constants of the hashes. What is saved depends on them: a file made with others says nothing.
_BASE, _JOIN = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
# Scripts written without spaces, by their first and last character: Thai and Lao, Burmese, Khmer, kana, ideographs.
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))

Hashes = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint16]
Places = npt.NDArray[np.int64]


def mix(hashes: Hashes) -> Hashes:
    """Spread every bit over all 64 (the last steps of SplitMix64: Steele, Lea & Flood, 2014). Changes its argument."""
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes


def _powers(base: int, count: int) -> Hashes:
    """1, base, base² … modulo 2^64."""
    steps = np.full(count, base, np.uint64)
    steps[0] = 1
    return np.multiply.accumulate(steps)


# A group is nearly a slice and one slice more, which can double as it is lowered: the Turkish I with a dot becomes two characters.
POWERS, _DOWN = _powers(_BASE, 4 * SLICE), _powers(pow(_BASE, -1, 1 << 64), 4 * SLICE)
_ASCII = bytes(ord(chr(c).lower()) if chr(c).isalnum() and c < 128 else 0 for c in range(256))
_MULTIPLIERS = (mix(np.arange(1, VALUES + 1, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


@cache
def _kinds() -> npt.NDArray[np.uint8]:
    """For each code point: 0 between words, 1 part of a word, 2 a word of its own."""
    kinds = np.fromiter((unicodedata.category(chr(c))[0] in "LMN" for c in range(0x110000)), np.uint8, 0x110000)
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= 2
    return kinds


def hash_words(texts: Sequence[str]) -> tuple[Hashes, Places]:
    """A hash of each word of the texts, in order, and where each text's words begin: "texts + 1", the end too.

    A word is a polynomial of its code points, modulo 2^64, and then mixed.
    """
    parts: list[Hashes] = [np.zeros(0, np.uint64)]
    counts = np.zeros(len(texts) + 1, np.int64)
    for owners, group in _groups(texts):
        codes = np.concatenate(group)
        inside = codes != 0
        first = inside.copy()
        first[1:] &= ~inside[:-1]
        if codes.dtype != np.uint8:
            alone = _kinds()[codes] == 2
            first |= alone
            first[1:] |= inside[1:] & alone[:-1]
        starts = np.flatnonzero(first)
        ends = np.searchsorted(starts, np.cumsum([len(c) for c in group]))
        np.add.at(counts, owners, np.diff(ends, prepend=0))
        if len(starts):  # what stands between two words is 0, so that each sum runs to the next word's start
            parts.append(mix(np.add.reduceat(codes * POWERS[: len(codes)], starts) * _DOWN[starts]))
    return np.concatenate(parts), np.cumsum(counts)


def _groups(texts: Sequence[str]) -> Iterator[tuple[list[int], list[npt.NDArray[Any]]]]:
    """Code points of parts of the texts, about SLICE characters together, and 1 + the text of each part."""
    owners: list[int] = []
    group: list[npt.NDArray[Any]] = []
    size = 0
    for owner, text in enumerate(texts, 1):
        start = 0
        while start < len(text):
            end = start + SLICE
            if end < len(text):  # cut at white space; a text that has none is cut where it stands
                end = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1 or end
            owners.append(owner)
            group.append(_codes(text[start:end]))
            size, start = size + len(group[-1]), end
            if size >= SLICE:
                yield owners, group
                owners, group, size = [], [], 0
    if group:
        yield owners, group


def _codes(text: str) -> npt.NDArray[Any]:
    """The lowered code points without apostrophes, 0 where no word is and at the end."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii").translate(_ASCII, b"'") + b"\0", np.uint8)
    text = text.lower().replace("'", "").replace("\u2019", "") + "\0"
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.where(_kinds()[codes] != 0, codes, 0)


def hash_runs(words: Hashes, length: int) -> Hashes:
    """A hash of each run of so many words, in order: none if there are fewer. Made by doubling, as in a power by squaring."""
    if len(words) < length:
        return np.zeros(0, np.uint64)
    found, width = words, 1
    for bit in f"{length:b}"[1:]:
        found = found[:-width] * np.uint64(pow(_JOIN, width, 1 << 64)) + found[width:]
        width *= 2
        if bit == "1":
            found = found[:-1] * np.uint64(_JOIN) + words[width:]
            width += 1
    return mix(found.copy() if found is words else found)


def minhash(words: Hashes, begins: Places) -> Signatures:
    """16 bits of each of the VALUES minima over each text's shingles, "texts values"; of no meaning for a text without words.

    A shingle is 32 bits, and multiplication by an odd number, modulo 2^32, is a permutation of them.
    """
    counts = np.diff(begins)
    shingles = (hash_runs(words, SHINGLE) >> np.uint64(32)).astype(np.uint32)
    owners = np.repeat(np.arange(len(counts)), counts)
    whole = owners[: len(shingles)] == owners[SHINGLE - 1 :]  # not over the border of two texts
    shingles, owners = shingles[whole], owners[: len(shingles)][whole]
    least = np.full((VALUES, len(counts)), 0xFFFFFFFF, np.uint32)
    for start in range(0, len(shingles), BLOCK):
        here = owners[start : start + BLOCK]
        firsts = np.flatnonzero(np.diff(here, prepend=-1))
        minima = np.minimum.reduceat(np.multiply.outer(_MULTIPLIERS, shingles[start : start + BLOCK]), firsts, axis=1)
        least[:, here[firsts]] = np.minimum(least[:, here[firsts]], minima)
    for text in np.flatnonzero((counts > 0) & (counts < SHINGLE)).tolist():
        run = hash_runs(words[begins[text] : begins[text + 1]], int(counts[text]))
        least[:, text] = _MULTIPLIERS * (run >> np.uint64(32)).astype(np.uint32)
    # A minimum's high bits are nearly always 0: they are mixed before 16 are taken.
    return (mix(least.T.astype(np.uint64)) >> np.uint64(48)).astype(np.uint16)
