"""Mixture of experts: a feed-forward of many parts, of which each token goes through a few. (b, t, d) -> (b, t, d).

Shapes: n tokens, e experts, k of them a token, s = n · k slots (a token at one of its experts), f hidden units of an expert.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.product import emulated
from gptlab.config.record import record, recording
from gptlab.config.registry import register
from gptlab.model.context import Context
from gptlab.model.dropout import drop
from gptlab.model.linear import FusedLinear, HiddenLinear, OutputLinear


class ExpertLinear(FusedLinear):
    """The same product of e experts, one above the other: rows grouped by expert go each through its own.

    Each expert's matrix is a part, drawn from a seed of its own and made orthogonal by itself. `active_share`: how much of the weights
    one token goes through. The products keep autocast's format under hardware.precision=fp8: slices have any number of rows.
    """

    def __init__(self, width: int, outputs: int, *, name: str, experts: int, top_k: int, bias: bool) -> None:
        super().__init__(width, {f"{name}.{i}": outputs for i in range(experts)}, bias=bias)
        self.active_share = top_k / experts

    def grouped(self, rows: Float[Tensor, "s i"], ends: Int[Tensor, " e"]) -> Float[Tensor, "s o"]:
        """Expert j's rows end before row `ends[j]`."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = grouped_product(rows.to(dtype), self.weight.to(dtype), bias, ends)
        return product


class ExpertOutput(ExpertLinear, OutputLinear):
    """What the experts write to the residual stream."""


class Router(nn.Module):
    """A vector an expert: its product with a token says how much the token is for that expert. Always at least in fp32.

    Its rows are embeddings of the experts, and have that role: drawn at random by every init (equal rows could never part), decayed,
    and left to AdamW by Muon, which would give every expert a step of one size whether or not a token was near it.
    """

    roles: ClassVar[dict[str, str]] = {"weight": "embedding"}
    sums: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))  # drawn by the init

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


@register("model/ffn", "moe")
class MixtureOfExperts(nn.Module):
    """Each token goes through `top_k` of `experts` feed-forwards, which a router picks by softmax (Shazeer et al., 2017).

    Their outputs are weighed by the router's probabilities, renormalised over the chosen as in Mixtral (Jiang et al., 2024); with
    top_k=1, where that would be 1 whatever the router says and teach it nothing, by the probability itself (Fedus et al., 2021).
    Nothing is dropped and there is no capacity: a token's output depends on no other token.

    `expansion`: the hidden units that one token goes through, over the width; an expert has expansion · width / (top_k + shared) of
    them. A token so meets the matrices of a dense ffn of the same expansion (gelu's is 4 too), and the model holds those of
    (experts + shared) / (top_k + shared) of these. `shared`: experts that every token goes through beside (Dai et al., 2024).

    To the training loss, for each layer, are added
    `load_balance` · experts · Σ f_i · P_i (Fedus et al., 2021), f_i the share of the slots that went to expert i, P_i the mean of its
    probability: at least about 1 · load_balance, where the load is even; and
    `router_z_loss` · mean(log² Σ exp(score)) (Zoph et al., 2022, at 1e-3). Both are of one micro-batch.
    Lines of metrics.jsonl hold moe/LAYER/load/I (slots of expert I over those of an even share), load_max, load_min, and entropy (of
    the probabilities of a token, in nats).

    Raises ConfigError where the numbers do not fit.
    """

    def __init__(
        self,
        width: int,
        bias: bool,
        dropout: float,
        layer: int,
        *,
        experts: int = 8,
        top_k: int = 2,
        shared: int = 0,
        expansion: float = 4.0,
        activation: Literal["gelu", "relu2"] = "gelu",
        load_balance: float = 0.01,
        router_z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if experts < 1:
            raise ConfigError(f"model.ffn.experts={experts} must be at least 1")
        if not 1 <= top_k <= experts:
            raise ConfigError(f"model.ffn.top_k={top_k} must be from 1 to model.ffn.experts={experts}")
        if shared < 0:
            raise ConfigError(f"model.ffn.shared={shared} must be at least 0")
        for name, value in (("load_balance", load_balance), ("router_z_loss", router_z_loss)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"model.ffn.{name}={value} must be at least 0 and finite")
        hidden = _hidden(width, top_k, shared, expansion)
        self.experts, self.top_k, self.layer, self.dropout = experts, top_k, layer, dropout
        self.load_balance, self.router_z_loss, self.activation = load_balance, router_z_loss, activation
        self.router = Router(width, experts)
        self.up = ExpertLinear(width, hidden, name="up", experts=experts, top_k=top_k, bias=bias)
        self.down = ExpertOutput(hidden, width, name="down", experts=experts, top_k=top_k, bias=bias)
        if shared:
            self.shared_up = HiddenLinear(width, shared * hidden, bias=bias)
            self.shared_down = OutputLinear(shared * hidden, width, bias=bias)
        self.shared = shared
        self.scores, self.slots = nn.Identity(), nn.Identity()  # taps: (n, e); hidden units (s, f), sorted by expert

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        flat = x.reshape(-1, x.shape[-1])
        scores = self.scores(self.router(flat))
        probabilities = scores.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, -1)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        # Slots sorted by expert, so that each expert's lie together: slot order[i] stands in row i, and row place[j] holds slot j.
        by_expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(self.experts, device=x.device), right=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        ends = self._told(ends, probabilities)
        self._add_losses(context, scores, probabilities, ends)
        rows = flat.index_select(0, order // self.top_k)
        rows = self.down.grouped(self.slots(self._activate(self.up.grouped(rows, ends))), ends)
        per_token = rows.index_select(0, place).view(*chosen.shape, -1)
        out = (per_token * weights[..., None].to(torch.promote_types(rows.dtype, x.dtype))).sum(1).to(x.dtype).view_as(x)
        if self.shared:
            out = out + self.shared_down(self._activate(self.shared_up(x)))
        return drop(out, self.dropout, self.training)

    def _activate(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if self.activation == "gelu" else F.relu(x).square()

    def _add_losses(
        self, context: Context, scores: Float[Tensor, "n e"], probabilities: Float[Tensor, "n e"], ends: Int[Tensor, " e"]
    ) -> None:
        if context.losses is None:
            return
        if self.load_balance:
            share = _counts(ends) / (len(scores) * self.top_k)
            context.losses[f"load_balance/{self.layer}"] = self.load_balance * self.experts * (share * probabilities.mean(0)).sum()
        if self.router_z_loss:
            context.losses[f"router_z/{self.layer}"] = self.router_z_loss * scores.logsumexp(-1).square().mean()

    def _told(self, ends: Int[Tensor, " e"], probabilities: Float[Tensor, "n e"]) -> Int[Tensor, " e"]:
        if torch.compiler.is_compiling():  # `record` leaves no trace in a graph; an operator is called when the graph runs
            told: Tensor = told_load(ends, probabilities.detach(), self.layer)
            return told
        _tell(ends, probabilities.detach(), self.layer)
        return ends


def _hidden(width: int, top_k: int, shared: int, expansion: float) -> int:
    """The hidden units of an expert. Raises ConfigError where a token's do not divide among its experts."""
    units, each = expansion * width, top_k + shared
    if not (math.isfinite(units) and round(units) >= 1):
        raise ConfigError(f"model.ffn.expansion={expansion} leaves no hidden units at width {width}")
    whole = round(units)
    if abs(units - whole) > 1e-6:
        raise ConfigError(f"model.ffn.expansion={expansion} at width {width} gives {units:g} hidden units, not a whole number")
    if whole % each:
        by = (
            f"model.ffn.top_k={top_k} does" if not shared else f"model.ffn.top_k={top_k} and model.ffn.shared={shared}, {each} together, do"
        )
        near = min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: (abs(d - each), d))
        raise ConfigError(f"{by} not divide the hidden width {whole} (model.ffn.expansion · model.width); {near} would")
    return whole // each


def _counts(ends: Int[Tensor, " e"]) -> Int[Tensor, " e"]:
    return ends.diff(prepend=ends.new_zeros(1))


def _tell(ends: Int[Tensor, " e"], probabilities: Float[Tensor, "n e"], layer: int) -> None:
    """Record the load of each expert: 1 where all have equally many slots."""
    if not recording():
        return
    load = (_counts(ends) * (len(ends) / ends[-1].clamp(min=1))).cpu()
    record(f"moe/{layer}/load_max", load.max())
    record(f"moe/{layer}/load_min", load.min())
    record(f"moe/{layer}/entropy", torch.special.entr(probabilities).sum(-1).mean())
    for i, one in enumerate(load):
        record(f"moe/{layer}/load/{i}", one)


# Operators of torch, and not functions: how many rows an expert gets is known only when a graph runs, and splits by it would break one.
# Products write into slices of one result: no split, no concatenation, and an expert without rows gets a gradient of zero.


@torch.library.custom_op("gptlab::told_load", mutates_args=())
def told_load(ends: Tensor, probabilities: Tensor, layer: int) -> Tensor:
    """`ends` as they are, after `_tell`."""
    _tell(ends, probabilities, layer)
    return ends.clone()


@told_load.register_fake
def _(ends: Tensor, probabilities: Tensor, layer: int) -> Tensor:
    return torch.empty_like(ends)


def _slices(ends: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise((0, *ends.tolist()))]


@torch.library.custom_op("gptlab::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """(s, o) from rows (s, i), weight (e · o, i), bias (e · o,), ends (e,): rows ends[j-1] to ends[j] times the j-th matrix, transposed."""
    dtype = rows.dtype
    if emulated(rows):
        rows, weight, bias = rows.float(), weight.float(), None if bias is None else bias.float()
    matrices = weight.view(len(ends), -1, weight.shape[1])
    out = rows.new_empty(len(rows), matrices.shape[1])
    for j, here in enumerate(_slices(ends)):
        if bias is None:
            torch.mm(rows[here], matrices[j].t(), out=out[here])
        else:
            torch.addmm(bias.view(len(ends), -1)[j], rows[here], matrices[j].t(), out=out[here])
    return out.to(dtype)


@grouped_product.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weight.shape[0] // len(ends))


@torch.library.custom_op("gptlab::grouped_product_backward", mutates_args=())
def grouped_product_backward(gradient: Tensor, rows: Tensor, weight: Tensor, ends: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows, weight and bias (empty, unless `biased`) from that of the product (s, o)."""
    dtype = rows.dtype
    if emulated(rows):
        gradient, rows, weight = gradient.float(), rows.float(), weight.float()
    matrices = weight.view(len(ends), -1, weight.shape[1])
    of_rows, of_weight = torch.empty_like(rows), torch.empty_like(matrices)
    of_bias = weight.new_empty(matrices.shape[:2] if biased else (0,))
    for j, here in enumerate(_slices(ends)):
        torch.mm(gradient[here], matrices[j], out=of_rows[here])
        torch.mm(gradient[here].t(), rows[here], out=of_weight[j])
        if biased:
            torch.sum(gradient[here], 0, out=of_bias[j])
    return of_rows.to(dtype), of_weight.view_as(weight).to(dtype), of_bias.flatten().to(dtype)


@grouped_product_backward.register_fake
def _(gradient: Tensor, rows: Tensor, weight: Tensor, ends: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight), weight.new_empty(weight.shape[0] if biased else 0)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    rows, weight, bias, ends = inputs
    ctx.save_for_backward(rows, weight, ends)
    ctx.biased = bias is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    of_rows, of_weight, of_bias = grouped_product_backward(gradient.contiguous(), rows, weight, ends, ctx.biased)
    return of_rows, of_weight, of_bias if ctx.biased else None, None


grouped_product.register_autograd(_backward, setup_context=_keep)
