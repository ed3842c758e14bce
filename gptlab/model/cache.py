"""Keys and values of the tokens already seen, so that generation feeds each token once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.model.pages import Pages

NEVER = 1 << 30  # the place of a slot that holds nothing: later than every query's
ROOM = 128  # tokens for which there is memory at first
LARGE = 1 << 18  # bytes of a layer's keys


@dataclass(frozen=True)
class Seen:
    """What a layer's queries may look at. `places`: of each key in its row, (1, s) or (b, s); None where the keys are those of this very
    pass. `whole`: every query sees every key, as a single new token does, so that no mask is needed."""

    keys: Float[Tensor, "b g s k"]
    values: Float[Tensor, "b g s k"]
    places: Int[Tensor, "b s"] | None
    whole: bool


class KVCache:
    """Keys (already rotated) and values of every layer. Rows may be of different length.

    A layer with a sliding window keeps that many tokens and writes over the oldest; another holds `capacity`. Memory for so many is taken
    as it is needed, twice as much each time: to clear, copy and join what a short text never fills takes longer than to make its tokens.
    The Transformer calls `advance` once after each forward pass; each attention calls `update` within it.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        *,
        layers: int,
        kv_heads: int,
        head_width: int,
        windows: Sequence[int | None] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = capacity
        self.sizes = [min(capacity, window or capacity) for window in windows or [None] * layers]
        self._room = min(capacity, ROOM)
        shapes = [(batch, kv_heads, min(size, self._room), head_width) for size in self.sizes]
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.last: Tensor | None = None  # (b, 1, d): the last token as `model/input=smear` left it for the next one
        self.lengths = [0] * batch
        self.device = device
        self._places: dict[int, Tensor] = {}  # of this pass, by size

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @property
    def even(self) -> bool:
        """Whether all rows are equally long."""
        return min(self.lengths) == max(self.lengths)

    @property
    def bytes_when_full(self) -> int:
        """Of all rows, when each has `capacity` tokens."""
        held = zip(self.sizes, self.keys, strict=True)
        return sum(2 * size * keys.shape[0] * keys.shape[1] * keys.shape[3] * keys.element_size() for size, keys in held)

    def order(self, tokens: int) -> Int[Tensor, "b t"]:
        """The places in their rows of so many tokens that come next; (1, t) where the rows are equally long."""
        starts = self.lengths[:1] if self.even else self.lengths
        return torch.tensor(starts, device=self.device)[:, None] + torch.arange(tokens, device=self.device)

    def update(self, layer: int, k: Float[Tensor, "b g t k"], v: Float[Tensor, "b g t k"]) -> Seen:
        """Append this pass's keys and values of a layer; what its queries may look at.

        Raises ValueError where a row would be longer than the capacity.
        """
        tokens, size, length = k.shape[2], self.sizes[layer], self.length
        self.make_room(tokens)
        keys, values = self.keys[layer], self.values[layer]
        if not length:
            self._store(layer, k, v)
            return Seen(k, v, None, tokens == 1)
        if tokens == 1:  # the newest takes the place of one that no window reaches any more
            self._store(layer, k, v)
            held = min(size, length + 1)
            return Seen(keys.narrow(2, 0, held), values.narrow(2, 0, held), self._held(size, 1)[:, :held], self.even)
        held = min(size, length)
        places = self._held(size, 0)[:, :held]
        new = self.order(tokens)
        rows = max(len(places), len(new))
        seen = Seen(
            torch.cat((keys[:, :, :held], k), 2),
            torch.cat((values[:, :, :held], v), 2),
            torch.cat((places.expand(rows, -1), new.expand(rows, -1)), 1),
            False,
        )
        self._store(layer, k, v)
        return seen

    def make_room(self, tokens: int) -> None:
        """Have memory for so many more tokens. Raises ValueError where a row would be longer than the capacity."""
        needed = self.length + tokens
        if needed > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {needed}")
        if needed > self._room:
            self._reserve(max(needed, 2 * self._room))

    def _reserve(self, tokens: int) -> None:
        """Have memory for so many tokens, or for `capacity`."""
        if min(self.capacity, tokens) == self._room:
            return
        self._room = min(self.capacity, tokens)
        pages = Pages()
        for kept in (self.keys, self.values):
            kept[:] = [_longer(t, min(size, self._room), pages) for size, t in zip(self.sizes, kept, strict=True)]

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        size, tokens = self.sizes[layer], k.shape[2]
        kept = min(tokens, size)
        for target, source in ((self.keys[layer], k), (self.values[layer], v)):
            if self.even:
                start = (self.lengths[0] + tokens - kept) % size
                first = min(kept, size - start)
                if first == tokens:  # all of it, in one piece: what every new token does, which slices as below would slow down
                    target.narrow(2, start, tokens).copy_(source)
                    continue
                target[:, :, start : start + first] = source[:, :, tokens - kept : tokens - kept + first]
                if first < kept:
                    target[:, :, : kept - first] = source[:, :, tokens - kept + first :]
            else:
                slots = (self.order(tokens)[:, tokens - kept :] % size)[:, None, :, None].expand(-1, source.shape[1], -1, source.shape[3])
                target.scatter_(2, slots, source[:, :, tokens - kept :].to(target.dtype))

    def _held(self, size: int, ahead: int) -> Int[Tensor, "b s"]:
        """The place in its row of what each slot of a layer of this size holds, when so many more tokens were stored."""
        if size not in self._places:
            last = self.order(1) + (ahead - 1)
            places = last - (last - torch.arange(size, device=self.device)) % size
            self._places[size] = torch.where(places < 0, NEVER, places)
        return self._places[size]

    def advance(self, tokens: int) -> None:
        """Count the tokens of a finished forward pass."""
        self.lengths = [length + tokens for length in self.lengths]
        self._places.clear()

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what each row holds beyond so many tokens. Raises ValueError where a window has written over what would be seen again."""
        if any(size < self.capacity and self.length > size for size in self.sizes):
            raise ValueError("a sliding window has forgotten what would be seen again")
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be kept several times."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        self.keys, self.values = ([t.index_select(0, index) for t in layers] for layers in (self.keys, self.values))
        self.last = None if self.last is None else self.last.index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, *others: KVCache) -> None:
        """Append the rows of other caches. Raises ValueError where their layers are of other sizes."""
        together = (self, *others)
        if any(other.sizes != self.sizes for other in others):
            raise ValueError("caches of different sizes cannot be joined")
        if not others:
            return
        room = max(one._room for one in together)
        for one in together:
            one._reserve(room)
        self.keys, self.values = (
            [torch.cat(layer) for layer in zip(*held, strict=True)]
            for held in ([one.keys for one in together], [one.values for one in together])
        )
        last = [one.last for one in together if one.last is not None]
        self.last = torch.cat(last) if len(last) == len(together) else None
        self.lengths = [length for one in together for length in one.lengths]


def _longer(kept: Float[Tensor, "b g s k"], room: int, pages: Pages) -> Float[Tensor, "b g r k"]:
    """With zeros up to `room`; on a CPU in `pages`, unless it is so little that the caches keep it."""
    b, g, held, k = kept.shape
    if kept.device.type != "cpu" or b * g * room * k * kept.element_size() < LARGE:
        return F.pad(kept, (0, 0, 0, room - held))
    longer = pages.empty((b, g, room, k), kept.dtype)
    longer[:, :, :held], longer[:, :, held:] = kept, 0
    return longer
