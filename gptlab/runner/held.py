"""What a computation without data holds: the bytes of every tensor that is made, until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptlab.hardware.device import GIANT
from gptlab.runner.heap import CACHED, NODE, STORAGE, TENSOR, Heap

BUFFERS = (20 << 20, 9 << 20, 8 << 20)  # bytes that MKL takes in the heap at the first product, in the midst of the tensors, and keeps
# bytes of the small blocks that oneDNN takes and gives back, by the thousand, in a product of lower precision
LIBRARY = range(32, 224, 16)
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that an operator makes until it is freed; `logits` of those as wide as the vocabulary.

    `span`: what a CPU's process comes to hold for them, that is its heap with its gaps, and the giants outside it.
    """

    def __init__(self, granule: int, *, heap: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granule, self.heap = granule, Heap() if heap else None
        self.now, self.logits, self.gradients, self.giants = 0, 0, 0, 0
        self.peak, self.peak_logits, self.peak_gradients, self.span = 0, 0, 0, 0
        self.widths: tuple[int, ...] = ()
        self._pinned = False  # whether the libraries' buffers lie in the heap
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # the value of a tensor without data: a seed, a count
            return args[0].dtype.is_floating_point * 1.0 or 1
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if self.heap is not None and not self._pinned and func.overloadpacket in _PRODUCTS:
            self._pinned = True
            for size in BUFFERS:
                self.heap.take(size)
        if self.heap is not None and func.overloadpacket in _PRODUCTS and found.dtype != torch.float32:
            for size in LIBRARY:
                for place in [self.heap.take_small(size) for _ in range(CACHED)]:
                    self.heap.give_small(place)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        wide = size if tensor.dim() > 1 and tensor.shape[-1] in self.widths else 0
        giant = size if size > GIANT else 0
        heap = self.heap
        holds = heap.take_small(STORAGE) if heap else None
        place = heap.take(size) if heap and size and not giant else None
        objects = [heap.take_small(n) for n in (*TENSOR, *(NODE if torch.is_grad_enabled() else ()))] if heap else []

        def freed(_: object) -> None:
            del self._known[key]
            self.now, self.logits, self.giants = self.now - size, self.logits - wide, self.giants - giant
            if heap and holds:
                if place:
                    heap.give(place)
                for small in (holds, *objects):
                    heap.give_small(small)

        self._known[key] = weakref.ref(storage, freed)
        self.now, self.logits, self.giants = self.now + size, self.logits + wide, self.giants + giant
        if self.now > self.peak:
            self.peak, self.peak_logits, self.peak_gradients = self.now, self.logits, self.gradients
        self.span = max(self.span, self._spanned())

    def _spanned(self) -> int:
        return self.now if self.heap is None else self.heap.length + self.giants

    def begin(self) -> None:
        """Look for the highest mark from here on."""
        self.peak, self.peak_logits, self.peak_gradients, self.span = self.now, self.logits, self.gradients, self._spanned()


class Fused(TorchFunctionMode):
    """On a GPU dropout within attention is fused; the CPU's kernel, which stands in, would write the scores out for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            options["dropout_p"] = 0.0
        return func(*args, **options)
