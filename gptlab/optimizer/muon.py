"""Muon: momentum whose matrices are made orthogonal; what is no matrix goes to AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_step

from gptlab.config.errors import ConfigError
from gptlab.config.product import emulated
from gptlab.config.registry import register
from gptlab.config.shards import in_shards
from gptlab.optimizer.groups import Groups, check_shares, torch_groups

# Of the quintic a·x + b·x³ + c·x⁵ (Jordan et al., 2024): steep at zero, so that few iterations lift singular values to about [0.7, 1.2].
COEFFICIENTS = 3.4445, -4.7750, 2.0315
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def orthogonalised(matrices: Tensor, iterations: int) -> Tensor:
    """(n, rows, columns), rows at most columns: each matrix with its singular values brought near 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    rounded = _through_bf16 if emulated(x) else _as_it_is
    x = rounded(x)
    for _ in range(iterations):
        gram = rounded(x @ x.mT)
        x = rounded(torch.baddbmm(x, rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c)), x, beta=a))
    return x


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _through_bf16(x: Tensor) -> Tensor:
    """fp32 that holds what bf16 would."""
    return x.to(torch.bfloat16).float()


def scale_of(shape: torch.Size, convention: str) -> float:
    """The factor on an orthogonal update. `original`: sqrt(max(1, rows/columns)) (Jordan et al., 2024), for rates near 0.02; `rms`:
    0.2·sqrt(max(rows, columns)), the size of an AdamW update, so that AdamW's rate serves (Liu et al., 2025)."""
    rows, columns = shape
    return math.sqrt(max(1.0, rows / columns)) if convention == "original" else 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Groups whose `parts` are given are matrices for Muon (a fused one is updated product by product); the others are AdamW's."""

    def __init__(self, groups: Groups, *, iterations: int, scale: str, dtype: torch.dtype, momentum: float, nesterov: bool) -> None:
        super().__init__(groups, {})
        self.iterations, self.scale, self.dtype, self.momentum, self.nesterov = iterations, scale, dtype, momentum, nesterov

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters if p.grad is not None]
            if parameters and group["parts"]:
                parts = [rows for p, rows in zip(group["params"], group["parts"], strict=True) if p.grad is not None]
                self._muon(group, parameters, gradients, parts)
            elif parameters:
                self._adamw(group, parameters, gradients)

    def _muon(self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor], parts: list[list[int]]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        means = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - self.momentum)
        directions = torch._foreach_lerp(gradients, means, self.momentum) if self.nesterov else means
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # products of one shape (lying) are iterated together
        for parameter, direction, rows in zip(parameters, directions, parts, strict=True):
            for target, matrix in zip(torch.split(parameter, rows), torch.split(direction, rows), strict=True):
                shape = min(matrix.shape), max(matrix.shape)
                alike.setdefault(shape, []).append((target, matrix))
        for pairs in alike.values():
            lying = torch.stack([m.mT if m.shape[0] > m.shape[1] else m for _, m in pairs]).to(self.dtype)
            updates = orthogonalised(lying, self.iterations).float()
            for (target, matrix), update in zip(pairs, updates, strict=True):
                standing = matrix.shape[0] > matrix.shape[1]
                target.add_(update.mT if standing else update, alpha=-group["lr"] * scale_of(matrix.shape, self.scale))

    def _adamw(self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        first, second, steps = ([self.state[p][k] for p in parameters] for k in ("exp_avg", "exp_avg_sq", "step"))
        adamw_step(
            parameters,
            gradients,
            first,
            second,
            [],
            steps,
            amsgrad=False,
            lr=group["lr"],
            beta1=group["beta1"],
            beta2=group["beta2"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=False,
            fused=parameters[0].device.type in ("cpu", "cuda", "mps"),
        )


@register("optimizer", "muon")
def muon(
    groups: Groups,
    *,
    learning_rate: float = 0.02,
    adam_learning_rate: float = 3e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    scale: Literal["original", "rms"] = "original",
    precision: Literal["bf16", "fp32"] = "bf16",
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rates: dict[str, float] = {},  # noqa: B006, a config's default, copied for each
    decays: dict[str, float] = {},  # noqa: B006
) -> torch.optim.Optimizer:
    """Matrices by orthogonal momentum (Jordan et al., 2024) at `learning_rate`, the rest by AdamW at `adam_learning_rate`."""
    check_shares(beta1=beta1, beta2=beta2, momentum=momentum)
    if not 0 <= adam_learning_rate < math.inf:
        raise ConfigError(f"optimizer.adam_learning_rate={adam_learning_rate} must be at least 0 and finite")
    if iterations < 1:
        raise ConfigError(f"optimizer.iterations={iterations} must be at least 1")
    # An orthogonal update is right at any width as it is; at the size of AdamW's its spectral norm grows with the square root of the width.
    of_matrices = torch_groups(groups, learning_rate, weight_decay, rates, decays, wider=0.0 if scale == "original" else 0.5)
    others = torch_groups(groups, adam_learning_rate, weight_decay, rates, decays, wider=1.0)
    made: Groups = []
    for given, of_matrix, other in zip(groups, of_matrices, others, strict=True):
        matrices = given["role"] == "matrix"
        if matrices and any(in_shards(p) for p in given["params"]):
            raise ConfigError("optimizer=muon updates whole matrices, and hardware/strategy=fsdp holds parts of them; use ddp")
        if matrices and (odd := next((n for n, p in zip(given["names"], given["params"], strict=True) if p.dim() != 2), None)):
            raise ConfigError(f"optimizer=muon cannot take {odd}: it has role matrix and is not of two dimensions")
        adam = {} if matrices else {"beta1": beta1, "beta2": beta2, "eps": eps}
        made.append({**(of_matrix if matrices else other), "parts": given["parts"] if matrices else [], **adam})
    return Muon(made, iterations=iterations, scale=scale, dtype=DTYPES[precision], momentum=momentum, nesterov=nesterov)
