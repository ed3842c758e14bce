"""Memory in large pages: the same numbers, side by side, for as long as somebody has them."""

from __future__ import annotations

import gc

import pytest
import torch

from gptlab.model import pages
from gptlab.model.cache import KVCache
from gptlab.model.pages import LINE, PAGE, Pages


def test_numbers_stay_as_they_are_and_do_not_overlap() -> None:
    given = [torch.randn(n, 7).to(dtype) for n in (1, 300, 0, 41) for dtype in (torch.float32, torch.bfloat16, torch.int8)]
    own = Pages()
    copies = [own.copy(tensor) for tensor in given]
    assert copies[0].data_ptr() % PAGE == 0
    del own
    gc.collect()
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert copy.is_contiguous()
        assert copy.data_ptr() % LINE == 0
    assert Pages().copy(torch.randn(5, 6).t()).is_contiguous()


def test_more_than_a_chunk_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "CHUNK", 1 << 10)
    own = Pages()
    given = [torch.randn(n) for n in (100, 1000, 100, 300)]
    assert all(torch.equal(copy, tensor) for copy, tensor in zip([own.copy(t) for t in given], given, strict=True))


def test_a_cache_that_grows_into_them_keeps_what_it_held() -> None:
    cache = KVCache(1, 4096, layers=1, kv_heads=2, head_width=64)
    k, v = torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
    for _ in range(20):
        cache.update(0, k, v)
        cache.advance(100)
    for kept, given in ((cache.keys[0], k), (cache.values[0], v)):
        assert torch.equal(kept[:, :, :2000], given.repeat(1, 1, 20, 1))
        assert not kept[:, :, 2000:].any()
