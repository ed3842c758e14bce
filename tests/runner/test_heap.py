"""The heap that is replayed, against what glibc does with the same calls."""

from __future__ import annotations

import ctypes
import itertools
import json
import subprocess
import sys

import pytest

from gptlab.runner.heap import Heap

MB = 1 << 20


def test_a_block_that_is_freed_makes_room_for_a_smaller_one() -> None:
    heap = Heap()
    first, _ = heap.take(4 * MB), heap.take(MB)
    top = heap.length
    heap.give(first)
    heap.take(3 * MB)
    assert heap.length == top


def test_a_gap_between_two_blocks_is_too_small_for_the_size_that_left_it() -> None:
    heap = Heap()
    gap, _ = heap.take(4 * MB), heap.take(MB)
    top = heap.length
    heap.give(gap)
    heap.take(4 * MB)
    assert heap.length > top + 3 * MB  # glibc asks for more than an aligned block needs


def test_neighbours_that_are_free_are_one_gap() -> None:
    heap = Heap()
    first, second, _ = (heap.take_small(3000) for _ in range(3))
    top = heap.length
    heap.give(first), heap.give(second)
    heap.take_small(5000)
    assert heap.length == top


def test_a_small_object_takes_the_place_of_another_before_it_takes_a_gap() -> None:
    heap = Heap()
    one = heap.take_small(112)
    heap.give_small(one)
    assert heap.take_small(112) == one


def test_whatever_is_taken_lies_apart() -> None:
    heap, live = Heap(), list[tuple[int, int]]()
    for i in range(400):
        live.append(heap.take(1000 + 7919 * i % 50000) if i % 3 else heap.take_small(112))
        if i % 2:
            heap.give(live.pop(i % len(live)))
    live.sort()
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(live))
    assert live[-1][0] + live[-1][1] <= heap.length


REPLAY = """
import ctypes, json, random, sys
from gptlab.runner.heap import Heap
COUNT, random = 300, random.Random(int(sys.argv[1]))
sizes = [(random.randrange(1, 8) << 20) + 192 * random.randrange(4096) for _ in range(COUNT)]
live, freed = [], []
for i in range(COUNT):
    live.append(i)
    freed.append(live.pop(random.randrange(len(live))) if i % 5 > 1 else None)
pointers, first = (ctypes.c_void_p * COUNT)(), (ctypes.c_void_p * COUNT)()
places = [ctypes.byref(pointers, 8 * i) for i in range(COUNT)]
libc = ctypes.CDLL(None)
libc.free.argtypes, libc.malloc.restype = [ctypes.c_void_p], ctypes.c_void_p
libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 2**31 - 1)
for size in range(24, 1040, 16):
    [libc.malloc(size) for _ in range(1000)]  # what Python's start left in caches and bins
begin = libc.malloc(1 << 20) + (1 << 20)
for i in range(COUNT):  # nothing here but ints: a list that grew would take a gap
    libc.posix_memalign(places[i], 64, sizes[i])
    first[i] = pointers[i]
    if freed[i] is not None:
        libc.free(pointers[freed[i]])
heap, taken = Heap(begin % 64), []
for i in range(COUNT):
    taken.append(heap.take(sizes[i]))
    if freed[i] is not None:
        heap.give(taken[freed[i]])
print(json.dumps([[first[i] - 16 - begin + begin % 64 for i in range(COUNT)], [start for start, _ in taken]]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="another C library than glibc")
@pytest.mark.parametrize("seed", range(3))
def test_every_block_lies_where_glibc_puts_it(seed: int) -> None:
    done = subprocess.run([sys.executable, "-c", REPLAY, str(seed)], capture_output=True, text=True, check=True)
    glibc, replayed = json.loads(done.stdout)
    assert glibc == replayed
