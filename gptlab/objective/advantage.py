"""The formulas of policy gradients: advantages of a group, the clipped ratio, the divergence from a reference, how a token counts.

Shapes: p prompts, g samples of each, b rows (p · g), t tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-9  # of rewards in float64: sums that were added in another order

Baseline = Literal["group", "none"]
Normalisation = Literal["token", "sequence", "constant"]


def advantages(rewards: Float[Tensor, "p g"], baseline: str, *, by_deviation: bool) -> Float[Tensor, "p g"]:
    """What each sample is worth beside the others of its group (GRPO: Shao et al., 2024, DeepSeekMath).

    `baseline=group` takes the group's mean off the rewards; `none` leaves them, as REINFORCE does (Williams, 1992). `by_deviation` divides
    by the group's standard deviation (over its g samples); Dr. GRPO (Liu et al., 2025) does not, since it weighs up prompts that are
    nearly always or never solved. A group whose rewards are all equal has nothing to tell: with the group's mean as baseline its
    advantages are exactly 0, and by no deviation is it divided.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    flat = flat_groups(rewards)[:, None]
    centred = torch.where(flat, 0.0, centred)
    found = centred if baseline == "group" else rewards
    if by_deviation:
        deviation = centred.square().mean(1, keepdim=True).sqrt()
        found = torch.where(flat, found, found / torch.where(flat, 1.0, deviation))
    return found


def flat_groups(rewards: Float[Tensor, "p g"]) -> Float[Tensor, " p"]:
    """Which groups have equal rewards throughout, but for the rounding of their sums."""
    spread = rewards.amax(1) - rewards.amin(1)
    return spread <= ROUNDING * rewards.abs().amax(1).clamp(min=1)


def ratio(now: Tensor, old: Tensor) -> Tensor:
    """How much likelier a token is than when it was drawn, from log-probabilities."""
    return (now - old).exp()


def surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """What is maximised for a token: the ratio times the advantage, with no more to gain beyond 1 - low and 1 + high.

    From PPO (Schulman et al., 2017).
    `high` above `low` lets unlikely tokens rise further (DAPO: Yu et al., 2025).
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Where the clip takes the gradient away."""
    return ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))


def divergence(now: Tensor, reference: Tensor) -> Tensor:
    """Of tokens drawn from `now` an estimate of KL(now || reference): unbiased and never negative (k3: Schulman, 2020)."""
    difference = reference - now
    return torch.expm1(difference) - difference


def shares(mask: Float[Tensor, "b t"], normalisation: str, longest: int) -> tuple[Tensor, Tensor]:
    """By how much each token's loss is multiplied (b, t), and what counts towards the divisor of the sum (b, t).

    `mask` is 1 at the tokens of the completions. token: the mean over all tokens of the batch (DAPO); sequence: of each row's mean over its
    tokens (GRPO); constant: of each row's sum over `longest`, whatever its length (Dr. GRPO).
    """
    if normalisation == "token":
        return mask, mask
    each = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return (each if normalisation == "sequence" else mask / longest), each


def spread(logits: Float[Tensor, "... v"]) -> Float[Tensor, ...]:
    """The entropy in nats of the distribution over the next token."""
    log = logits.log_softmax(-1)
    return -(log.exp() * log).sum(-1)
