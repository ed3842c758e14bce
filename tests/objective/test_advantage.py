"""The formulas of policy gradients, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gptlab.objective.advantage import advantages, clipped, divergence, flat_groups, ratio, shares, spread, surrogate

T = torch.tensor
ROOT2, ROOT8 = math.sqrt(2), math.sqrt(8)


@pytest.mark.parametrize(
    ("rewards", "baseline", "by_deviation", "expected"),
    [
        ([1.0, 0, 0, 1], "group", False, [0.5, -0.5, -0.5, 0.5]),  # mean 1/2
        ([1.0, 0, 0, 1], "group", True, [1.0, -1, -1, 1]),  # deviation 1/2
        ([0.0, 0, 3], "group", False, [-1.0, -1, 2]),
        ([0.0, 0, 3], "group", True, [-1 / ROOT2, -1 / ROOT2, 2 / ROOT2]),  # variance (1 + 1 + 4) / 3
        ([5.0, 1], "none", False, [5.0, 1]),  # REINFORCE
        ([5.0, 1], "none", True, [2.5, 0.5]),
        ([0.0, 2, 4, 10], "group", True, [-4 / math.sqrt(14), -2 / math.sqrt(14), 0, 6 / math.sqrt(14)]),  # (16 + 4 + 0 + 36) / 4
    ],
)
def test_advantages(rewards: list[float], baseline: str, by_deviation: bool, expected: list[float]) -> None:
    found = advantages(T([rewards, rewards]), baseline, by_deviation=by_deviation)
    torch.testing.assert_close(found, T([expected, expected]))


@pytest.mark.parametrize("by_deviation", [False, True])
def test_a_flat_group_teaches_exactly_nothing_and_never_divides_by_nothing(by_deviation: bool) -> None:
    rewards = T([[0.1] * 3, [0.7] * 3, [0.1, 0.2, 0.3]])  # the mean of three times 0.1 is not 0.1
    assert flat_groups(rewards).tolist() == [True, True, False]
    found = advantages(rewards, "group", by_deviation=by_deviation)
    assert found[:2].tolist() == [[0.0] * 3] * 2
    assert found.isfinite().all()
    rounded = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3]], dtype=torch.float64)
    assert rounded[0, 0] != rounded[0, 1]
    assert advantages(rounded, "group", by_deviation=by_deviation).tolist() == [[0.0] * 4], "nor do sums that were rounded otherwise"
    assert advantages(rewards, "none", by_deviation=by_deviation)[0].tolist() == pytest.approx([0.1] * 3), "left as it is"


def test_the_ratio_and_its_clip() -> None:
    change = ratio(T([0.3, 0.1, 0.2]).log(), T([0.2, 0.2, 0.2]).log())
    torch.testing.assert_close(change, T([1.5, 0.5, 1.0]))
    cases = [  # ratio, advantage, low, high -> what is gained, whether the clip holds
        (1.5, 2.0, 0.2, 0.2, 2.4, True),
        (1.5, -2.0, 0.2, 0.2, -3.0, False),  # it became likelier and should not have: all of it counts
        (0.5, 2.0, 0.2, 0.2, 1.0, False),
        (0.5, -2.0, 0.2, 0.2, -1.6, True),
        (1.1, 3.0, 0.2, 0.2, 3.3, False),
        (1.25, 1.0, 0.2, 0.28, 1.25, False),  # DAPO's higher border
        (1.5, 1.0, 0.2, 0.28, 1.28, True),
        (1.5, 0.0, 0.2, 0.2, 0.0, False),
    ]
    for value, advantage, low, high, gained, held in cases:
        asked = T(value, requires_grad=True)
        found = surrogate(asked, T(advantage), low, high)
        assert found.item() == pytest.approx(gained), (value, advantage)
        (slope,) = torch.autograd.grad(found, asked)
        assert clipped(T(value), T(advantage), low, high).item() is held
        assert (slope.item() == 0) is (held or advantage == 0), "where the clip holds there is no gradient"


def test_the_divergence_is_never_negative_and_right_on_average() -> None:
    assert divergence(T(0.5).log(), T(0.25).log()).item() == pytest.approx(0.5 - math.log(0.5) - 1)  # r - log r - 1, r = 1/2
    assert divergence(T(-1.3), T(-1.3)).item() == 0
    p, q = T([0.7, 0.2, 0.1]), T([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    each = divergence(p.log(), q.log())
    assert (each > 0).all()
    assert (p * each).sum().item() == pytest.approx(exact.item(), rel=1e-5)


MASK = T([[0.0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])  # 2, 1 and 4 tokens
LOSSES = T([[9.0, 1, 3, 9], [9, 9, 9, 6], [1, 2, 3, 6]])


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        ("token", (4 + 6 + 12) / 7),
        ("sequence", (4 / 2 + 6 / 1 + 12 / 4) / 3),
        ("constant", (4 / 8 + 6 / 8 + 12 / 8) / 3),
    ],
)
def test_how_tokens_are_weighed(normalisation: str, expected: float) -> None:
    share, weight = shares(MASK, normalisation, 8)
    assert ((share * LOSSES).sum() / weight.sum()).item() == pytest.approx(expected)


def test_a_row_without_a_token_weighs_nothing() -> None:
    for normalisation in ("token", "sequence", "constant"):
        share, weight = shares(T([[0.0, 0], [1, 1]]), normalisation, 2)
        assert share[0].tolist() == weight[0].tolist() == [0, 0]
        assert share.isfinite().all()


def test_the_entropy_of_a_distribution() -> None:
    logits: Tensor = T([[0.0, 0, 0, 0], [100.0, 0, 0, 0]])
    torch.testing.assert_close(spread(logits), T([math.log(4), 0.0]))
