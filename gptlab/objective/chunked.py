"""A loss whose logits are never held all at once: chunk by chunk, each with its gradient while its logits are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptlab.model.transformer import Transformer

# (logits (n, v), targets (n,), weight (n,) or None) -> a sum, or several (s,)
Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # autograd within a forward pass: a compiled graph is broken here
def summed_by_chunks(rows: Tensor, targets: Tensor, weight: Tensor | None, model: Transformer, score: Score, chunk: int) -> Tensor:
    """The sum over chunks of `score`: of features (n, d), whatever the model's head makes of them.

    Where gradients are wanted they are made at once, chunk by chunk, and kept for the backward pass: those of the features and of
    the head are no larger than these, and nothing is computed twice. The caller's loss must be a sum of what comes out.
    """
    parameters = list(dict.fromkeys((*model.head.parameters(), model.embedding.weight)))  # a tied head has none of its own
    if not torch.is_grad_enabled() or not (rows.requires_grad or any(p.requires_grad for p in parameters)):
        return _total(rows, targets, weight, model, score, chunk)
    sums: Tensor = _Chunked.apply((targets, weight, model, score, chunk), rows, *parameters)  # type: ignore[no-untyped-call]
    return sums


def _total(rows: Tensor, targets: Tensor, weight: Tensor | None, model: Transformer, score: Score, chunk: int) -> Tensor:
    parts = [score(model.logits(rows[here]), targets[here], None if weight is None else weight[here]) for here in _slices(len(rows), chunk)]
    return torch.stack(parts).sum(0)


def _slices(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, given: tuple[Tensor, Tensor | None, Transformer, Score, int], rows: Tensor, *parameters: Tensor) -> Tensor:
        targets, weight, model, score, chunk = given
        of_rows = torch.empty_like(rows)
        of_parameters: list[Tensor | None] = [None for _ in parameters]
        sums = None
        for here in _slices(len(rows), chunk):
            part = rows[here].detach().requires_grad_()
            with torch.enable_grad():
                found = score(model.logits(part), targets[here], None if weight is None else weight[here])
                first, *others = torch.autograd.grad(found.sum(), (part, *parameters), allow_unused=True)
            of_rows[here] = first
            for i, new in enumerate(others):
                if new is not None:  # in fp32: many small ones are added up
                    held = of_parameters[i]
                    of_parameters[i] = new.to(torch.promote_types(new.dtype, torch.float32)) if held is None else held.add_(new)
            sums = found.detach() if sums is None else sums + found.detach()
        assert sums is not None
        context.save_for_backward(of_rows, *of_parameters)
        context.dtypes = [rows.dtype, *(p.dtype for p in parameters)]
        return sums

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The sums are added up by the caller, so that all have one gradient: the loss scale over the batch's token weight.
        factor = gradients[0].reshape(-1)[0]
        return None, *(
            None if g is None else g.mul_(factor).to(dtype) for g, dtype in zip(context.saved_tensors, context.dtypes, strict=True)
        )
