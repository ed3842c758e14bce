"""The loader: the order is a pure function of (seed, epoch, index), and a validation set is scored once, token by token."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from gptlab.config.errors import DataError
from gptlab.data.loader import Batch, Loader, evaluation_batches
from gptlab.data.order import permute
from gptlab.data.shard import TokenStream
from gptlab.data.sources import Windows


def stream_of(folder: Path, *lengths: int, dtype: str = "<u4", documents: tuple[int, ...] = (0,)) -> TokenStream:
    """Tokens 0, 1, 2, … over shards of these lengths: a token tells its own place."""
    shards, start = [], 0
    for i, length in enumerate(lengths):
        data = np.arange(start, start + length, dtype=dtype).tobytes()
        (folder / f"{i}.bin").write_bytes(data)
        shards.append({"file": f"{i}.bin", "tokens": length, "sha256": hashlib.sha256(data).hexdigest()})
        start += length
    data = np.array(documents, "<u8").tobytes()
    (folder / "train.documents").write_bytes(data)
    index = {"file": "train.documents", "sha256": hashlib.sha256(data).hexdigest()}
    return TokenStream([(folder, {"shards": shards, "index": index, "documents": len(documents)})], np.dtype(dtype))


def loader_of(stream: TokenStream, context: int, rows: int, seed: int) -> Loader:
    return Loader(Windows(stream, context, seed), rows)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 100, 255, 256, 257, 1000, 4095, 4097, 65_537, 300_001])
def test_permute_is_a_bijection(n: int) -> None:
    for key in (0, 1, 2**63 + 5) if n < 5000 else (7,):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_of_one_index_is_that_of_all_and_needs_no_table() -> None:
    n = 1000
    together = permute(np.arange(n), n, 5)
    assert [int(permute(np.array([i]), n, 5)[0]) for i in range(0, n, 37)] == together[::37].tolist()
    huge = permute(np.arange(100), 10**15, 5)
    assert len(set(huge.tolist())) == 100
    assert huge.min() >= 0
    assert huge.max() < 10**15


def test_permute_mixes() -> None:
    n = 1009
    found = permute(np.arange(n), n, 3)
    assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 0.1
    assert (np.diff(found) == 1).mean() < 0.02
    assert (found == permute(np.arange(n), n, 4)).mean() < 0.02


def test_a_batch_is_a_function_of_its_step_alone(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 400, 300, 323)
    one, two = loader_of(stream, 8, 5, seed=3), loader_of(stream, 8, 5, seed=3)
    forwards = [one.batch(step) for step in range(60)]
    for step in reversed(range(60)):
        again = two.batch(step)
        assert torch.equal(again.inputs, forwards[step].inputs)
        assert torch.equal(again.targets, forwards[step].targets)
    for batch in forwards:
        assert batch.inputs.shape == batch.targets.shape == (5, 8)
        assert batch.inputs.dtype == torch.int64
        assert torch.equal(batch.targets, batch.inputs + 1), "a target is the token after its input, across shards too"
        assert batch.tokens == 40


@pytest.mark.parametrize(("tokens", "context", "rows"), [(1023, 8, 5), (100, 1, 3), (67, 16, 3), (64, 8, 7)])
def test_every_window_is_visited_once_an_epoch(tmp_path: Path, tokens: int, context: int, rows: int) -> None:
    loader = loader_of(stream_of(tmp_path, tokens), context, rows, seed=1)
    assert loader.source.epoch_rows * context >= tokens - 2 * context + 1, "more than a context of text is never seen"
    source, windows = loader.source, loader.source.epoch_rows
    epochs = [source.place(np.arange(e * windows, (e + 1) * windows)).tolist() for e in range(4)]
    for starts in epochs:
        phase = min(starts)
        assert phase < context
        assert sorted(starts) == [phase + i * context for i in range(windows)]
        assert max(starts) + context + 1 <= tokens
    if windows > 4:
        assert len({tuple(s) for s in epochs}) == 4, "two epochs have the same order"
        other = Windows(stream_of(tmp_path, tokens), context, seed=2)
        assert other.place(np.arange(windows)).tolist() != epochs[0], "two seeds have the same order"
    # Batches go on over the end of an epoch.
    seen = np.concatenate([loader.batch(s).inputs[:, 0].numpy() for s in range(3 * windows // rows)])
    assert seen.tolist() == [s for starts in epochs for s in starts][: len(seen)]


def test_what_is_not_in_one_epoch_is_in_another(tmp_path: Path) -> None:
    loader = loader_of(stream_of(tmp_path, 100), 16, 2, seed=0)
    seen = {t for step in range(200) for t in loader.batch(step).targets.flatten().tolist()}
    assert {0, 99} | set(range(1, 99)) >= seen
    assert len(seen) >= 95


def test_a_text_shorter_than_a_batch_is_refused_with_what_would_do(tmp_path: Path) -> None:
    loader_of(stream_of(tmp_path, 48), 8, 5, seed=0)
    with pytest.raises(DataError) as error:
        loader_of(stream_of(tmp_path, 47), 8, 5, seed=0)
    said = str(error.value)
    assert "has 47 tokens, too few for one batch of 5 x 8" in said
    assert "which takes 48;" in said
    assert "trainer.batch_tokens" in said
    for tokens in (0, 1, 7):
        with pytest.raises(DataError, match=f"has {tokens} tokens"):
            loader_of(stream_of(tmp_path, tokens), 8, 5, seed=0)


@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 10, 17, 100, 129])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_evaluation_scores_every_token_once(tmp_path: Path, tokens: int, rows: int) -> None:
    batches = list(evaluation_batches(stream_of(tmp_path, tokens), 8, 0, rows))
    assert sorted(t for b in batches for t in b.targets.flatten().tolist()) == list(range(1, tokens))
    assert all(len(b.inputs) <= rows and b.inputs.shape[1] <= 8 for b in batches)
    assert all(torch.equal(b.targets, b.inputs + 1) for b in batches)


@pytest.mark.parametrize("tokens", [2, 9, 17, 100, 129])
@pytest.mark.parametrize("limit", [1, 5, 8, 16, 20, 95, 96, 97, 99, 100, 128, 10_000])
def test_evaluation_scores_exactly_the_limit_and_none_twice(tmp_path: Path, tokens: int, limit: int) -> None:
    stream = stream_of(tmp_path, tokens)
    batches = list(evaluation_batches(stream, 8, limit, 3))
    scored = [t for b in batches for t in b.targets.flatten().tolist()]
    assert len(scored) == min(limit, tokens - 1)
    assert len(set(scored)) == len(scored)
    assert sum(b.tokens for b in batches) == len(scored)
    again = list(evaluation_batches(stream, 8, limit, 64))
    assert sorted(t for b in again for t in b.targets.flatten().tolist()) == sorted(scored), "the set depends on the rows of a batch"


def test_evaluation_windows_are_spread_over_the_set(tmp_path: Path) -> None:
    starts = [int(b.inputs[0, 0]) for b in evaluation_batches(stream_of(tmp_path, 1001), 10, 50, 1)]
    assert starts == [0, 200, 400, 600, 800]


def test_a_set_without_a_target_is_refused(tmp_path: Path) -> None:
    for tokens in (0, 1):
        with pytest.raises(DataError, match=f"has {tokens} tokens; it needs at least 2"):
            list(evaluation_batches(stream_of(tmp_path, tokens), 8, 0, 4))


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    batch = loader_of(stream_of(tmp_path, 500), 8, 7, seed=0).batch(0)
    for weight in (None, torch.rand(7, 8).round()):
        whole = Batch(batch.inputs, batch.targets, weight, torch.zeros(7, 8))
        for rows in (1, 2, 3, 7, 100):
            parts = whole.split(rows)
            assert torch.equal(torch.cat([p.inputs for p in parts]), batch.inputs)
            assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)
            assert sum(p.tokens for p in parts) == whole.tokens
            assert [p.weight is None for p in parts] == [weight is None] * len(parts)


def test_a_window_reads_across_shards(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 3, 1, 5, 2, dtype="<u2")
    assert len(stream) == 11
    for start in range(11):
        for length in range(1, 12 - start):
            assert stream.window(start, length).tolist() == list(range(start, start + length))
