"""What a preference costs: the losses of DPO, IPO and KTO, from log-probabilities of whole answers. All are (n,) for n pairs."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pairs = Float[Tensor, " n"]


def dpo(margin: Pairs, beta: float, smoothing: float = 0.0) -> Pairs:
    """-log σ(β · margin) (Rafailov et al., 2023), the margin being log π/π₀ of the chosen answer less that of the rejected one.

    `smoothing`: the share of pairs whose preference is taken to be the other way round (Mitchell, 2023).
    """
    return -(1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)


def ipo(margin: Pairs, beta: float) -> Pairs:
    """(margin - 1/(2β))² (Azar et al., 2023): the margin is drawn to a size, and not to infinity."""
    return (margin - 1 / (2 * beta)).square()


def kto(chosen: Pairs, rejected: Pairs, beta: float, baseline: Tensor) -> Pairs:
    """The mean of 1 - σ(β · (r - z)) of the chosen answers' r = log π/π₀, and 1 - σ(β · (z - r)) of the rejected ones'.

    Ethayarajh et al., 2024, with equal weights. `baseline`: z, a scalar without gradient, their estimate of KL(π, π₀), at least 0.
    """
    good = 1 - (beta * (chosen - baseline)).sigmoid()
    bad = 1 - (beta * (baseline - rejected)).sigmoid()
    return (good + bad) / 2
