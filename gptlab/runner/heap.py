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
    """Best fit with free neighbours joined, as glibc keeps its large blocks; it never gives back what it has grown to (`hardware.device`).

    Of blocks that are multiples of 64 bytes from `start` on every address is glibc's own (tested), except among gaps of the same size.
    """

    def __init__(self, start: int = 0) -> None:
        self.top = start  # what lies beyond is free
        self.length = 0  # bytes that the heap has come to span
        self._begin = start
        self._sizes: list[int] = []  # of free blocks, sorted
        self._bins: dict[int, list[int]] = {}  # size -> starts of free blocks
        self._fresh: list[int] = []  # starts of those freed since a block was last looked for: none of them in a bin yet
        self._starts: dict[int, int] = {}  # of free blocks: start -> size
        self._ends: dict[int, int] = {}  # end -> start
        self._cached: dict[int, list[int]] = {}  # size -> starts of small blocks that wait for another of their size

    def take(self, size: int) -> Place:
        """A tensor's block: in the smallest gap that holds what glibc asks for an aligned one, else at the end."""
        wanted = max(SMALLEST, -(-(size + HEADER) // UNIT) * UNIT)
        start, room = self._cut(wanted + ALIGNMENT + SMALLEST + UNIT)
        before = -(start + UNIT) % ALIGNMENT
        before += ALIGNMENT * (0 < before < SMALLEST)
        after = room - before - wanted
        if after <= SMALLEST:
            wanted, after = wanted + after, 0
        for sliver in ((start, before), (start + before + wanted, after)):
            if sliver[1]:
                self.give_small(sliver)
        return start + before, wanted

    def give(self, place: Place) -> None:
        """Free a block: joined with what is free beside it, or with what lies beyond the last."""
        start, size = place
        if (before := self._ends.get(start)) is not None:
            self._remove(before)
            start, size = before, size + start - before
        if start + size == self.top:
            self.top = start
            return
        if (after := self._starts.get(start + size)) is not None:
            self._remove(start + size)
            size += after
        self._add(start, size)

    def take_small(self, size: int) -> Place:
        """A small object: where another of its size was, else at the beginning of the smallest gap that holds it."""
        if kept := self._cached.get(size):
            return kept.pop(), size
        return self._cut(size)

    def give_small(self, place: Place) -> None:
        """Free a small object, or what alignment left over: where it is cached, it keeps its neighbours apart."""
        kept = self._cached.setdefault(place[1], [])
        if place[1] <= LARGEST_CACHED and len(kept) < CACHED:
            kept.append(place[0])
        else:
            self.give(place)

    def _cut(self, size: int) -> Place:
        """So many bytes of the smallest gap that has them, or a few more where the rest would be no block; else of what lies beyond."""
        start = self._fit(size)
        if start is None:
            start, self.top = self.top, self.top + size
            self.length = max(self.length, self.top - self._begin)
            return start, size
        room = self._starts[start]
        self._remove(start)
        if room - size < SMALLEST:
            return start, room
        self._add(start + size, room - size)
        return start, size

    def _fit(self, size: int) -> int | None:
        """Start of the smallest gap of at least so many bytes; one that was just freed and is of this very size comes first."""
        while self._fresh:
            start = self._fresh[0]
            room = self._starts[start]
            if room == size:
                return start
            del self._fresh[0]
            if (same := self._bins.get(room)) is None:
                bisect.insort(self._sizes, room)
                self._bins[room] = [start]
            else:
                same.insert(1, start)
        place = bisect.bisect_left(self._sizes, size)
        # Of several of a size the second, which glibc can unlink without touching its list of sizes.
        return self._bins[self._sizes[place]][:2][-1] if place < len(self._sizes) else None

    def _add(self, start: int, size: int) -> None:
        self._fresh.append(start)
        self._starts[start] = size
        self._ends[start + size] = start

    def _remove(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._ends[start + size]
        if start in self._fresh:
            self._fresh.remove(start)
            return
        self._bins[size].remove(start)
        if not self._bins[size]:
            del self._bins[size], self._sizes[bisect.bisect_left(self._sizes, size)]
