"""Where a token stands: acts on the embedding, on q and k, or on the scores. The Transformer owns one and hands it down."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.model.table import tabulated

ScoreBias = Callable[[Tensor, Tensor, Tensor], Tensor]  # (head, query place, key place) -> what is added to the score


class Position(nn.Module):
    """The identity; a scheme overrides any subset."""

    bias: ScoreBias | None = None

    def reach(self, length: int) -> None:
        """Called before a forward pass whose last position is length-1: grow a table, or refuse."""

    def embed(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Add to the token embeddings."""
        return x

    def rotate(
        self, q: Float[Tensor, "b h t k"], k: Float[Tensor, "b g t k"], positions: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b h t k"], Float[Tensor, "b g t k"]]:
        """Turn queries and keys."""
        return q, k


def _check_base(base: float) -> None:
    if not 0 < base < math.inf:
        raise ConfigError(f"model.position.base={base} must be positive and finite")


@register("model/position", "none")
class NoPosition(Position):
    """No positions: order is seen only through the causal mask (Haviv et al., 2022)."""


@register("model/position", "learned")
class Learned(Position):
    """A learned vector per position, as in GPT-2."""

    def __init__(self, width: int, context_length: int) -> None:
        super().__init__()
        self.table = nn.Embedding(context_length, width)

    def reach(self, length: int) -> None:
        if length > self.table.num_embeddings:
            raise ConfigError(
                f"{length} tokens are longer than the {self.table.num_embeddings} learned positions (model.context_length); "
                "model/position=rotary has no such limit"
            )

    def embed(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        added: Tensor = x + self.table(positions)
        return added


@register("model/position", "sinusoidal")
class Sinusoidal(Position):
    """Fixed sines and cosines added to the embedding (Vaswani et al., 2017)."""

    frequency: Tensor

    def __init__(self, width: int, *, base: float = 10_000.0, amplitude: float = 0.02) -> None:
        super().__init__()
        _check_base(base)
        self.amplitude = amplitude  # the size of the token embeddings they are added to
        half = (width + 1) // 2
        self.width = width
        frequency = tabulated(lambda: base ** (-torch.arange(half, dtype=torch.float32) / half), half, dtype=torch.float32)
        self.register_buffer("frequency", frequency, persistent=False)

    def embed(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        angle = positions[..., None].to(self.frequency.dtype) * self.frequency
        waves = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., : self.width]
        return x + (self.amplitude * math.sqrt(2.0)) * waves.to(x.dtype)


@register("model/position", "rotary")
class Rotary(Position):
    """Rotary embeddings (Su et al., 2021): q and k turn with their position, so that scores see only distances."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, context_length: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ConfigError(f"model/position=rotary turns pairs: the head width {head_width} (model.width / model.heads) must be even")
        _check_base(base)
        self.base, self.head_width = base, head_width
        self._tabulate(context_length, None, torch.float32)

    def frequency(self, device: torch.device | None) -> Float[Tensor, " half"]:
        """How far each pair turns from one token to the next, in radians."""
        half = self.head_width // 2
        return self.base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)

    def _tabulate(self, length: int, device: torch.device | None, dtype: torch.dtype) -> None:
        def cosines() -> Tensor:
            angle = self._angles(length, device)
            # (length, head width): both halves turn by the same angles, as in Llama's layout
            return torch.cat((angle, angle), -1).cos().to(dtype)

        def sines() -> Tensor:
            angle = self._angles(length, device)
            return torch.cat((-angle, angle), -1).sin().to(dtype)

        for name, made in (("cos", cosines), ("sin", sines)):
            self.register_buffer(name, tabulated(made, length, self.head_width, dtype=dtype, device=device), persistent=False)

    def _angles(self, length: int, device: torch.device | None) -> Float[Tensor, "t half"]:
        return torch.arange(length, dtype=torch.float64, device=device)[:, None] * self.frequency(device)

    def reach(self, length: int) -> None:
        if length > self.cos.shape[0]:
            self._tabulate(2 * length, self.cos.device, self.cos.dtype)

    def rotate(
        self, q: Float[Tensor, "b h t k"], k: Float[Tensor, "b g t k"], positions: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b h t k"], Float[Tensor, "b g t k"]]:
        cos, sin = self.cos[positions][:, None].to(q.dtype), self.sin[positions][:, None].to(q.dtype)
        if torch.compiler.is_compiling():
            return _turn(q, cos, sin), _turn(k, cos, sin)
        turned: tuple[Tensor, Tensor] = _Turned.apply(q, cos, sin), _Turned.apply(k, cos, sin)  # type: ignore[no-untyped-call]
        return turned


@register("model/position", "rotary_stretched")
class StretchedRotary(Rotary):
    """Rotary positions stretched to a longer context, as in Llama 3.1 (2024): what turns slowly turns `factor` times more slowly.

    Pairs that turned less than `low` times within `trained` tokens are stretched, those that turned more than `high` times stay, and
    between the two it goes over evenly.
    """

    def __init__(
        self,
        head_width: int,
        context_length: int,
        *,
        base: float = 500_000.0,
        factor: float = 8.0,
        low: float = 1.0,
        high: float = 4.0,
        trained: int = 8192,
    ) -> None:
        if factor < 1 or trained < 1 or not 0 < low < high:
            raise ConfigError(
                f"model/position=rotary_stretched needs factor >= 1, trained >= 1, 0 < low < high, not {factor}, {trained}, {low}, {high}"
            )
        self.factor, self.low, self.high, self.trained = factor, low, high, trained
        super().__init__(head_width, context_length, base=base)

    def frequency(self, device: torch.device | None) -> Float[Tensor, " half"]:
        plain = super().frequency(device)
        turns = self.trained * plain / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / self.factor)


def _turn(x: Float[Tensor, "b h t k"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b h t k"]:
    # sin carries the sign of its half, so that swapping the halves is the whole rotation
    turned = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return turned if turned.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else turned.to(x.dtype)


class _Turned(torch.autograd.Function):
    """`_turn`, whose gradient is the turn back: half the operators of autograd's, and nothing kept but the angles."""

    @staticmethod
    def forward(context: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = context.saved_tensors
        return _turn(gradients[0], cos, -sin), None, None


@register("model/position", "alibi")
class Alibi(Position):
    """ALiBi (Press et al., 2022): scores fall linearly with distance, each head at its own slope."""

    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes", _slopes(heads), persistent=False)
        self.bias = self._fall

    def _fall(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.slopes[head] * (j - i)


def _slopes(heads: int) -> Float[Tensor, " h"]:
    """2^(-8/n), 2^(-16/n), … for n heads; other counts take the odd ones of twice the power of two below."""
    power = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    rest = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor(first + rest)


@register("model/position", "t5")
class T5(Position):
    """T5's relative bias (Raffel et al., 2020): a learned score per head and bucket of distance."""

    roles: ClassVar[dict[str, str]] = {"table": "bias"}

    def __init__(self, heads: int, *, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        if buckets < 2 or max_distance <= buckets // 2:
            raise ConfigError(f"model/position=t5 needs buckets >= 2 and max_distance > buckets / 2, not {buckets} and {max_distance}")
        self.table = nn.Parameter(torch.zeros(buckets, heads))
        self.buckets, self.max_distance = buckets, max_distance
        self.bias = self._look_up

    def _look_up(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (i - j).clamp(min=0)
        exact = self.buckets // 2
        # one bucket per distance up to `exact`, then log-spaced up to max_distance
        scale = (self.buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).to(self.table.dtype) / exact) * scale).to(torch.long)
        bucket = torch.where(distance < exact, distance, far.clamp(max=self.buckets - 1))
        return self.table[bucket, head]
