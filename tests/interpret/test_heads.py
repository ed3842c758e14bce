"""Scores of heads whose attention is known by construction."""

from __future__ import annotations

import math

import pytest
import torch

from gptlab.config.errors import ConfigError
from gptlab.interpret import head_scores, repeated_tokens
from gptlab.interpret.heads import duplicate_places, induction_places, mean_weight, previous_places
from tests.interpret.conftest import small


def test_places_are_those_of_the_definitions() -> None:
    tokens = torch.tensor([[5, 7, 5, 7, 9, 5]])
    for places, expected in (
        (induction_places(tokens), {(2, 1), (3, 2), (5, 1), (5, 3)}),
        (duplicate_places(tokens), {(2, 0), (3, 1), (5, 0), (5, 2)}),
        (previous_places(tokens), {(i, i - 1) for i in range(1, 6)}),
    ):
        assert {(i, j) for i, j in places[0].nonzero().tolist()} == expected


def test_a_head_that_looks_there_alone_scores_one() -> None:
    tokens = repeated_tokens(small(), rows=3)
    assert tokens.shape == (3, 16)
    assert all(len(set(row[:8].tolist())) == 8 for row in tokens)
    assert torch.equal(tokens[:, :8], tokens[:, 8:])
    eye = torch.eye(16).expand(3, 1, 16, 16)
    first = torch.zeros_like(eye)
    first[..., 0] = 1
    for where, back in ((induction_places(tokens), 7), (duplicate_places(tokens), 8), (previous_places(tokens), 1)):
        ideal = torch.roll(eye, -back, -1)  # each token looks so far back, the first ones elsewhere
        assert mean_weight(ideal, where).item() == 1
        assert mean_weight(eye, where).item() == 0
        half = mean_weight(0.5 * ideal + 0.5 * eye, where).item()
        assert half == pytest.approx(0.5)


def test_a_head_that_looks_evenly_scores_the_share_of_the_places() -> None:
    model = small(attention="average", context=8)
    frame = head_scores(model, rows=2)
    assert list(frame.columns) == ["layer", "head", "induction", "previous_token", "duplicate_token", "entropy"]
    assert len(frame) == 3
    line = frame.iloc[0]
    assert line.induction == line.duplicate_token == pytest.approx(sum(1 / n for n in range(5, 9)) / 4, abs=1e-6)
    assert line.previous_token == pytest.approx(sum(1 / n for n in range(2, 9)) / 7, abs=1e-6)
    assert line.entropy == pytest.approx(sum(math.log(n) for n in range(1, 9)) / 8, abs=1e-6)


def test_scores_of_ones_own_tokens() -> None:
    model = small()
    assert head_scores(model, [[1, 2, 3]]).induction.isna().all(), "no token stands twice"
    assert len(head_scores(model, [[1, 2, 1]])) == 12


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match=r"9 different tokens, twice, do not fit model.context_length=16"):
        repeated_tokens(small(), length=9)
    with pytest.raises(ConfigError, match="no tokens that repeat would"):
        repeated_tokens(small(context=2))
    with pytest.raises(ConfigError, match="no attention"):
        head_scores(small(depth=0))


@pytest.mark.parametrize("window", [1, 3, 5, 64])
def test_tokens_repeat_within_the_reach_of_a_window(window: int) -> None:
    model = small(attention=("multihead", {"window": window}))
    half = repeated_tokens(model).shape[1] // 2
    assert half == max(2, min(8, window - 1))
    scores = head_scores(model)
    if window >= 3:
        assert (scores.induction > 0).all()
        assert (scores.duplicate_token > 0).all()
    assert repeated_tokens(model, length=7).shape == (8, 14), "asked for, any that fits the context"
