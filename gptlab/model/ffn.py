"""Feed-forward: what a token makes of what it gathered. (b, t, d) -> (b, t, d)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.model.context import Context
from gptlab.model.dropout import drop
from gptlab.model.linear import FusedLinear, HiddenLinear, OutputLinear


class _Plain(nn.Module):
    """up -> activation -> down."""

    def __init__(self, width: int, bias: bool, dropout: float, expansion: float) -> None:
        super().__init__()
        hidden = round(expansion * width)
        if hidden < 1:
            raise ConfigError(f"model.ffn.expansion={expansion} leaves no hidden units at width {width}")
        self.up = HiddenLinear(width, hidden, bias=bias)
        self.down = OutputLinear(hidden, width, bias=bias)
        self.hidden = nn.Identity()  # tap
        self.dropout = dropout

    def activate(self, x: Float[Tensor, "b t f"]) -> Float[Tensor, "b t f"]:
        raise AssertionError("a subclass says which")

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        return drop(self.down(self.hidden(self.activate(self.up(x)))), self.dropout, self.training)


@register("model/ffn", "gelu")
class GELU(_Plain):
    """Two products with a GELU between (Hendrycks & Gimpel, 2016), as in GPT-2."""

    def __init__(
        self, width: int, bias: bool, dropout: float, *, expansion: float = 4.0, approximate: Literal["tanh", "none"] = "tanh"
    ) -> None:
        super().__init__(width, bias, dropout, expansion)
        self.approximate = approximate

    def activate(self, x: Float[Tensor, "b t f"]) -> Float[Tensor, "b t f"]:
        return F.gelu(x, approximate=self.approximate)


@register("model/ffn", "relu2")
class ReLU2(_Plain):
    """Two products with a squared ReLU between (So et al., 2021)."""

    def __init__(self, width: int, bias: bool, dropout: float, *, expansion: float = 4.0) -> None:
        super().__init__(width, bias, dropout, expansion)

    def activate(self, x: Float[Tensor, "b t f"]) -> Float[Tensor, "b t f"]:
        if torch.compiler.is_compiling():
            return F.relu(x).square()
        squared: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
        return squared


class _SquaredReLU(torch.autograd.Function):
    """relu(x)², whose gradient takes two passes over the hidden units where autograd's takes four."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        context.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (positive,) = context.saved_tensors
        gradient: Tensor = gradients[0] * positive
        return gradient.mul_(2)


class _Gated(nn.Module):
    """activation(gate) * up -> down. A hidden width of 8/3 keeps the parameters of the plain form's 4."""

    def __init__(self, width: int, bias: bool, dropout: float, expansion: float, multiple_of: int) -> None:
        super().__init__()
        if multiple_of < 1:
            raise ConfigError(f"model.ffn.multiple_of={multiple_of} must be at least 1")
        if expansion <= 0:
            raise ConfigError(f"model.ffn.expansion={expansion} leaves no hidden units at width {width}")
        hidden = max(1, round(expansion * width / multiple_of)) * multiple_of
        self.up = FusedLinear(width, {"gate": hidden, "up": hidden}, bias=bias)
        self.down = OutputLinear(hidden, width, bias=bias)
        self.hidden = nn.Identity()  # tap
        self.dropout = dropout

    def activate(self, x: Float[Tensor, "b t f"]) -> Float[Tensor, "b t f"]:
        raise AssertionError("a subclass says which")

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        gate, up = self.up(x).chunk(2, -1)
        return drop(self.down(self.hidden(self.activate(gate) * up)), self.dropout, self.training)


@register("model/ffn", "swiglu")
class SwiGLU(_Gated):
    """A SiLU gate times a linear path (Shazeer, 2020), as in Llama."""

    def __init__(self, width: int, bias: bool, dropout: float, *, expansion: float = 8 / 3, multiple_of: int = 8) -> None:
        super().__init__(width, bias, dropout, expansion, multiple_of)

    def activate(self, x: Float[Tensor, "b t f"]) -> Float[Tensor, "b t f"]:
        return F.silu(x)


@register("model/ffn", "geglu")
class GEGLU(_Gated):
    """A GELU gate times a linear path (Shazeer, 2020)."""

    def __init__(self, width: int, bias: bool, dropout: float, *, expansion: float = 8 / 3, multiple_of: int = 8) -> None:
        super().__init__(width, bias, dropout, expansion, multiple_of)

    def activate(self, x: Float[Tensor, "b t f"]) -> Float[Tensor, "b t f"]:
        return F.gelu(x, approximate="tanh")


@register("model/ffn", "none")
class NoFeedForward(nn.Module):
    """No feed-forward: the block is its attention alone."""

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        return torch.zeros((), device=x.device, dtype=x.dtype)
