"""The heap that is replayed, against what glibc does with the same calls."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys

import pytest

from gptlab.runner.heap import Heap

MB = 1 << 20


def test_a_block_that_is_freed_makes_room_for_a_smaller_one() -> None:
    heap = Heap()
    first, _ = heap.take(4 * MB), heap.take(MB)
    top = heap.top
    heap.give(first)
    heap.take(3 * MB)
    assert heap.top == top


def test_a_gap_between_two_blocks_is_too_small_for_the_size_that_left_it() -> None:
    heap = Heap()
    gap, _ = heap.take(4 * MB), heap.take(MB)
    top = heap.top
    heap.give(gap)
    heap.take(4 * MB)
    assert heap.top > top + 3 * MB  # glibc asks for more than an aligned block needs


def test_neighbours_that_are_free_are_one_gap() -> None:
    heap = Heap()
    first, second, _ = (heap.take_small(3000) for _ in range(3))
    top = heap.top
    heap.give(first), heap.give(second)
    heap.take_small(5000)
    assert heap.top == top


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
    assert live[-1][0] + live[-1][1] <= heap.top


REPLAY = """
import ctypes, sys
sys.path.insert(0, ".")
from gptlab.runner.heap import Heap
libc = ctypes.CDLL(None)
libc.free.argtypes = [ctypes.c_void_p]
libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 2**31 - 1)
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena b c d e f g used free keep".split()]
libc.mallinfo2.restype = Info
heap, live, begun = Heap(), [], libc.mallinfo2()
for i in range(300):
    size = (1 + i * 2654435761 % 7) << 20
    pointer = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(pointer), 64, size)
    live.append((pointer, heap.take(size)))
    if i % 5 > 1:
        pointer, place = live.pop(i * 40503 % len(live))
        libc.free(pointer), heap.give(place)
now = libc.mallinfo2()
print((now.arena - begun.arena - now.keep + begun.keep) / heap.top)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="another C library than glibc")
def test_its_length_is_glibcs_for_the_same_calls() -> None:
    done = subprocess.run([sys.executable, "-c", REPLAY], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1, abs=0.02)
