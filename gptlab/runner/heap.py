"""The C library's heap, without memory: where its blocks would come to lie, and how far it would grow.

Blocks that are freed leave gaps, and a block that fits none of them makes the heap longer. How much that is depends on sizes and order
alone, so it is replayed rather than guessed. What makes it long: every tensor has small objects beside its block, and one of these takes
the beginning of a gap, which is then too small for the next tensor of the size that left it; and what alignment leaves over beside a
block is cached rather than joined to it when that is free. With block checkpointing GPT-2's heap grows by half for that. Found by
recording glibc 2.36's calls and their addresses during steps of GPT-2.
"""

from __future__ import annotations

import bisect

ALIGNMENT = 64  # bytes, of every tensor's block (torch's c10/core/alignment.h)
UNIT, HEADER, SMALLEST = 16, 8, 32  # bytes; of malloc on 64 bits: what sizes are multiples of, what a block has before it, the least one
CACHED, LARGEST_CACHED = 7, 1040  # free blocks that a thread keeps of a size, and the size up to which; others join their neighbours
# Small objects as they were recorded, in bytes: what holds a tensor's block, the tensor and its shape, its place in the graph.
STORAGE, TENSOR, NODE = 112, (192, 32), (320, 80, 48, 48)

Place = tuple[int, int]  # start and length


class Heap:
    """Best fit with free neighbours joined, as glibc keeps its large blocks; its end is never given back (`hardware.device`'s settings)."""

    def __init__(self) -> None:
        self.top = 0  # bytes that the heap has come to span
        self._free: list[tuple[int, int]] = []  # (size, start), sorted
        self._starts: dict[int, int] = {}  # of free blocks: start -> size
        self._ends: dict[int, int] = {}  # end -> start
        self._cached: dict[int, list[int]] = {}  # size -> starts of small blocks that wait for another of their size

    def take(self, size: int) -> Place:
        """A tensor's block: in the smallest gap that holds what glibc asks for an aligned one, else at the end."""
        wanted = max(SMALLEST, -(-(size + HEADER) // UNIT) * UNIT)
        start, room = self._gap(wanted + ALIGNMENT + SMALLEST)
        before = -(start + UNIT) % ALIGNMENT
        before += ALIGNMENT * (0 < before < SMALLEST)
        after = room - before - wanted
        if after < SMALLEST:
            wanted, after = wanted + after, 0
        for sliver in ((start, before), (start + before + wanted, after)):
            if sliver[1]:
                self.give_small(sliver)
        return start + before, wanted

    def give(self, place: Place) -> None:
        """Free a block."""
        start, size = place
        if (after := self._starts.get(start + size)) is not None:
            self._remove(start + size, after)
            size += after
        if (before := self._ends.get(start)) is not None:
            length = start - before
            self._remove(before, length)
            start, size = before, size + length
        self._add(start, size)

    def take_small(self, size: int) -> Place:
        """A small object: where another of its size was, else at the beginning of the smallest gap that holds it."""
        if kept := self._cached.get(size):
            return kept.pop(), size
        start, room = self._gap(size)
        if room > size:
            self._add(start + size, room - size)
        return start, size

    def give_small(self, place: Place) -> None:
        """Free a small object, or what alignment left over: where it is cached, it keeps its neighbours apart."""
        kept = self._cached.setdefault(place[1], [])
        if place[1] <= LARGEST_CACHED and len(kept) < CACHED:
            kept.append(place[0])
        else:
            self.give(place)

    def _gap(self, size: int) -> Place:
        """The smallest gap of at least so many bytes, no longer free; else the heap is made longer, by what a gap at its end lacks."""
        place = bisect.bisect_left(self._free, (size, 0))
        if place < len(self._free):
            room, start = self._free[place]
            self._remove(start, room)
            return start, room
        start = self._ends.get(self.top, self.top)
        if start < self.top:
            self._remove(start, self.top - start)
        self.top = start + size
        return start, size

    def _add(self, start: int, size: int) -> None:
        bisect.insort(self._free, (size, start))
        self._starts[start] = size
        self._ends[start + size] = start

    def _remove(self, start: int, size: int) -> None:
        del self._free[bisect.bisect_left(self._free, (size, start))]
        del self._starts[start]
        del self._ends[start + size]
