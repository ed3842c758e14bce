"""Packed rows are full, begin with a document, use no token twice, and every dropped token is counted."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest

from gptlab.config.errors import DataError
from gptlab.data.packing import Packing, best_fit

Lengths = npt.NDArray[np.int64]


def log_normal(count: int, median: float, seed: int = 0) -> Lengths:
    drawn: Lengths = np.maximum(1, np.random.default_rng(seed).lognormal(np.log(median), 1.0, count)).astype(np.int64)
    return drawn


def of(*lengths: int) -> Lengths:
    return np.array(lengths, np.int64)


def rows(packing: Packing) -> list[list[tuple[int, int]]]:
    """Each row as (document, tokens of it)."""
    return [list(zip(*(part.tolist() for part in packing.segments(r)), strict=True)) for r in range(packing.rows)]


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize(("median", "row"), [(3, 17), (20, 17), (60, 17), (60, 257), (400, 257), (5, 2), (5, 1)])
def test_rows_are_full_and_every_token_is_used_once_or_dropped(median: float, row: int, window: int) -> None:
    lengths = log_normal(600, median)
    packing = best_fit(lengths, row, window=window)
    assert packing.rows > 0
    assert packing.row_first_segment[0] == 0
    assert packing.row_first_segment[-1] == len(packing.segment_document) == len(packing.segment_length)
    assert [int(packing.segments(r)[1].sum()) for r in range(packing.rows)] == [row] * packing.rows
    # A segment is the beginning of its document, and the only one: so no token stands twice, and every row begins a document.
    assert len(np.unique(packing.segment_document)) == len(packing.segment_document)
    assert (packing.segment_length >= 1).all()
    assert (packing.segment_length <= lengths[packing.segment_document]).all()
    assert packing.total == lengths.sum()
    assert packing.used == packing.segment_length.sum()
    assert packing.used + packing.dropped == packing.total
    assert packing.dropped_share == packing.dropped / packing.total
    assert 0 <= packing.dropped_end < row


def test_only_a_rows_last_segment_is_cut() -> None:
    lengths = log_normal(2000, 100)
    packing = best_fit(lengths, 257)
    cut = packing.segment_length < lengths[packing.segment_document]
    last = np.zeros(len(cut), bool)
    last[packing.row_first_segment[1:] - 1] = True
    assert cut.any()
    assert not (cut & ~last).any()


def test_the_longest_that_fits_is_taken_and_the_oldest_of_equals() -> None:
    assert rows(best_fit(of(4, 2, 5, 6, 3, 5, 1), 10)) == [[(0, 4), (3, 6)], [(1, 2), (2, 5), (4, 3)]]
    assert rows(best_fit(of(4, 3, 3, 2, 2, 6), 7)) == [[(0, 4), (1, 3)], [(2, 3), (3, 2), (4, 2)]]


def test_when_none_fits_the_shortest_is_cut_and_its_rest_dropped() -> None:
    packing = best_fit(of(8, 6, 5, 5, 9), 10)
    assert rows(packing) == [[(0, 8), (2, 2)], [(1, 6), (3, 4)]]
    assert (packing.dropped_cut, packing.dropped_long, packing.dropped_end) == (3 + 1, 0, 9)


def test_a_document_longer_than_a_row_fills_one_and_loses_the_rest() -> None:
    packing = best_fit(of(23, 3, 10, 7, 4), 10)
    assert rows(packing) == [[(0, 10)], [(1, 3), (3, 7)], [(2, 10)]]
    assert (packing.dropped_long, packing.dropped_cut, packing.dropped_end) == (13, 0, 4)
    assert packing.dropped_share == 17 / 47


def test_each_row_begins_with_the_oldest_document_that_waits_and_few_wait() -> None:
    window, packing = 50, best_fit(log_normal(3000, 90), 257, window=50)
    taken: set[int] = set()
    for row in rows(packing):
        assert row[0][0] == next(d for d in range(3000) if d not in taken)
        for document, _ in row:
            assert document < len(taken) + window
            taken.add(document)


def test_the_same_documents_are_packed_alike_and_the_window_matters() -> None:
    lengths = log_normal(2000, 100)
    first, again, narrow = best_fit(lengths, 257), best_fit(lengths.copy(), 257), best_fit(lengths, 257, window=10)
    assert rows(first) == rows(again)
    assert rows(first) != rows(narrow)
    assert first.dropped_cut < narrow.dropped_cut


def test_too_few_tokens_make_no_row_and_are_counted() -> None:
    packing = best_fit(of(3, 4), 10)
    assert (packing.rows, packing.used, packing.dropped_end, packing.dropped_share) == (0, 0, 7, 1.0)
    empty = best_fit(of(), 10)
    assert (empty.rows, empty.total, empty.dropped, empty.dropped_share) == (0, 0, 0, 0.0)


def test_documents_without_tokens_and_sizes_below_one_are_refused() -> None:
    with pytest.raises(DataError, match="document 1 has 0 tokens"):
        best_fit(of(3, 0, 2), 10)
    with pytest.raises(ValueError, match="row=0"):
        best_fit(of(3), 0)
    with pytest.raises(ValueError, match="window=0"):
        best_fit(of(3), 10, window=0)


def test_little_is_lost_to_cutting() -> None:
    """Beyond what no row can hold of long documents, at most a twentieth."""
    lengths = log_normal(20_000, 400)
    for row in (257, 1025, 2049):
        packing = best_fit(lengths, row)
        assert packing.dropped_long == pytest.approx(np.maximum(lengths - row, 0).sum(), rel=1e-4)
        assert packing.dropped_cut < 0.05 * packing.total


def test_packing_takes_microseconds_a_document() -> None:
    lengths = log_normal(30_000, 400)
    started = time.process_time()
    best_fit(lengths, 1025)
    assert time.process_time() - started < 1.5  # measured: 0.07 s
