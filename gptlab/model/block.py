"""Blocks: how norm, attention and feed-forward are joined to the residual stream. (b, t, d) -> (b, t, d)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from gptlab.config.registry import register
from gptlab.model.context import Context


class _Block(nn.Module):
    final_norm = True  # the Transformer normalises once more after the last block

    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(), attention
        self.ffn_norm, self.ffn = norm(), ffn
        self.residual_mid, self.residual_post = nn.Identity(), nn.Identity()  # taps


@register("model/block", "prenorm")
class PreNorm(_Block):
    """x + f(norm(x)): the stream itself is never normalised (GPT-2; Xiong et al., 2020).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ ffn ─ + ──
       └─────────────────────┘  └────────────┘
    """

    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__(norm, attention, ffn)

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        x = self.residual_mid(x + self.attention(self.attention_norm(x), context))
        out: Tensor = self.residual_post(x + self.ffn(self.ffn_norm(x), context))
        return out


@register("model/block", "sandwich")
class Sandwich(_Block):
    """x + norm(f(norm(x))): what a part writes is normalised too (Ding et al., 2021, and Gemma 2), so that no layer can shout.

    x ─┬─ norm ─ attention ─ norm ─ + ─┬─ norm ─ ffn ─ norm ─ + ──
       └────────────────────────────┘  └─────────────────────┘
    """

    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__(norm, attention, ffn)
        self.attention_out_norm, self.ffn_out_norm = norm(), norm()

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        x = self.residual_mid(x + self.attention_out_norm(self.attention(self.attention_norm(x), context)))
        out: Tensor = self.residual_post(x + self.ffn_out_norm(self.ffn(self.ffn_norm(x), context)))
        return out


@register("model/block", "postnorm")
class PostNorm(_Block):
    """norm(x + f(x)): the stream is normalised after each part (Vaswani et al., 2017)."""

    final_norm = False

    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__(norm, attention, ffn)

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        x = self.residual_mid(self.attention_norm(x + self.attention(x, context)))
        out: Tensor = self.residual_post(self.ffn_norm(x + self.ffn(x, context)))
        return out


@register("model/block", "parallel")
class Parallel(nn.Module):
    """x + attention(norm(x)) + ffn(norm(x)): both read the same normalised stream (GPT-J; PaLM, 2022)."""

    final_norm = True

    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.ffn = norm(), attention, ffn
        self.residual_post = nn.Identity()  # tap

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        normed = self.norm(x)
        out: Tensor = self.residual_post(x + self.attention(normed, context) + self.ffn(normed, context))
        return out
