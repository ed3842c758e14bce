"""A decoding step in one call of C (step.c): a small model's modules take longer to be called than to be worked out, and a large one's
weights are read without a pause.

For the parts of GPT-2 and Llama and what lies between; a model of other parts goes through its own modules, and so does one that somebody
watches by a hook. The numbers are the modules' own, to the last rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as of_every_module

from gptlab.generate import native
from gptlab.model import attention, block, ffn, gate, head, input, kernel, linear, norm, position, stream, value
from gptlab.model.cache import KVCache
from gptlab.model.transformer import Transformer

MOST_ROWS = 16  # up to so many it was measured to be the faster, in every format
SMALL = 1 << 22  # bytes of weights for which a second thread costs more than it saves

_NORMS = {
    norm.NoNorm: 0,
    norm.LayerNorm: 1,
    norm.NonparametricLayerNorm: 1,
    norm.RMSNorm: 2,
    norm.NonparametricRMSNorm: 2,
}
_ACTIVATIONS = {ffn.GELU: 0, ffn.GEGLU: 0, ffn.ReLU2: 2, ffn.SwiGLU: 3}
_LINEAR = (linear.Linear, linear.HiddenLinear, linear.FusedLinear, linear.OutputLinear)
_KNOWN: dict[type, dict[str, tuple[type, ...]]] = {  # by the module's place in its owner; a part of another type is not known
    Transformer: {
        "embedding": (nn.Embedding,),
        "position": (position.NoPosition, position.Learned, position.Rotary, position.StretchedRotary),
        "input": (input.PlainInput,),
        "embedded": (nn.Identity,),
        "blocks": (block.PreNorm,),
        "norm": tuple(_NORMS),
        "head": (head.Tied, head.Untied),
    },
    block.PreNorm: {
        "stream": (stream.PlainStream,),
        "attention_norm": tuple(_NORMS),
        "attention": (attention.MultiHead,),
        "ffn_norm": tuple(_NORMS),
        "ffn": tuple(_ACTIVATIONS),
        "residual_mid": (nn.Identity,),
        "residual_post": (nn.Identity,),
    },
    attention.MultiHead: {
        "qkv": _LINEAR,
        "out": _LINEAR,
        "kernel": (kernel.SDPA, kernel.Naive, kernel.Flex),
        "value": (value.NoValue,),
        "gate": (gate.NoGate,),
        **dict.fromkeys("qkvz", (nn.Identity,)),
    },
    **{kind: {"up": _LINEAR, "down": _LINEAR, "hidden": (nn.Identity,)} for kind in _ACTIVATIONS},
}
_TYPES = {Transformer, nn.ModuleList, *(kind for places in _KNOWN.values() for kinds in places.values() for kind in kinds)}

_long, _pointer, _double = ctypes.c_long, ctypes.c_void_p, ctypes.c_double


class _Norm(ctypes.Structure):
    _fields_ = (("gain", _pointer), ("bias", _pointer), ("kind", _long), ("eps", _double))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("before_attention", _Norm),
        ("before_ffn", _Norm),
        *((name, native.Matrix) for name in ("qkv", "out", "up", "down")),
        ("keys", _pointer),
        ("values", _pointer),
        ("room", _long),
        ("size", _long),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _long) for name in ("half", "width", "heads", "kv_heads", "head_width", "hidden", "depth", "vocabulary")),
        *((name, _long) for name in ("qk_norm", "activation", "gated")),
        *((name, _double) for name in ("scale", "soft_cap", "multiple")),
        *((name, _pointer) for name in ("embedding", "table", "cos", "sin")),
        ("last", _Norm),
        ("head", native.Matrix),
        ("layers", ctypes.POINTER(_Layer)),
    )


class Step:
    """The steps of a model for which there is no `why_not`. Its weights are read where they are; it has memory to work in of its own."""

    def __init__(self, model: Transformer) -> None:
        self._held: list[Any] = []  # what the pointers below are of
        self._hooks = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._position = model.position
        self._vocabulary = model.vocabulary
        blocks: list[Any] = list(model.blocks)
        first = blocks[0]
        table = self._pointer(model.position.table.weight) if isinstance(model.position, position.Learned) else None
        last: Any = model.head
        self._layers = (_Layer * len(blocks))(*(self._layer(part) for part in blocks))
        self._model = _Model(
            half=model.embedding.weight.dtype == torch.bfloat16,
            width=model.config.width,
            heads=first.attention.heads,
            kv_heads=first.attention.kv_heads,
            head_width=first.attention.head_width,
            hidden=first.ffn.down.in_features,
            depth=len(blocks),
            vocabulary=model.vocabulary,
            qk_norm=first.attention.qk_norm,
            activation=1 if getattr(first.ffn, "approximate", "") == "none" else _ACTIVATIONS[type(first.ffn)],
            gated=isinstance(first.ffn, ffn.SwiGLU | ffn.GEGLU),
            scale=first.attention.scale,
            soft_cap=last.soft_cap or 0,
            multiple=model.parametrisation.multiple,
            embedding=self._pointer(model.embedding.weight),
            table=table,
            last=self._norm(model.norm),
            head=self._matrix(last.multiply, last.matrix, None),
            layers=self._layers,
        )
        self._work = torch.empty(0)
        matrices = [self._model.head, *(getattr(layer, name) for layer in self._layers for name in ("qkv", "out", "up", "down"))]
        self._few = sum(m.n * m.k * 4 // m.parts for m in matrices) < SMALL

    def takes(self, rows: int) -> bool:
        """Whether it is for so many rows, and nobody watches the modules, whose numbers it does not give."""
        watched = any(self._hooks) or of_every_module._global_forward_hooks or of_every_module._global_forward_pre_hooks
        return rows <= MOST_ROWS and not watched and not torch.is_autocast_enabled("cpu")

    def __call__(self, tokens: Sequence[int], cache: KVCache) -> Float[Tensor, "b v"]:
        """Feed each row one token; the logits of the next, in fp32. Raises ValueError where a row would be longer than the cache."""
        rows, most = len(tokens), cache.length + 1
        cache.make_room(1)
        self._position.reach(most)
        if isinstance(self._position, position.Rotary):
            self._model.cos, self._model.sin = self._position.cos.data_ptr(), self._position.sin.data_ptr()
        for layer, keys, values, size in zip(self._layers, cache.keys, cache.values, cache.sizes, strict=True):
            assert keys.is_contiguous()
            assert values.is_contiguous()
            layer.keys, layer.values, layer.room, layer.size = keys.data_ptr(), values.data_ptr(), keys.shape[2], size
        model, threads = ctypes.byref(self._model), 1 if self._few else native.threads()
        needed = native.library().step_work(model, rows, most, threads)
        if len(self._work) < needed:
            self._work = torch.empty(2 * needed)
        logits = torch.empty(rows, self._vocabulary)
        numbers = ctypes.c_long * rows
        native.library().step(
            model, numbers(*tokens), numbers(*cache.lengths), rows, logits.data_ptr(), self._work.data_ptr(), most, threads
        )
        cache.advance(1)
        return logits

    def _pointer(self, tensor: Tensor | None) -> int | None:
        self._held.append(tensor)
        return None if tensor is None else tensor.data_ptr()

    def _matrix(self, product: Any, weight: Tensor, bias: Tensor | None) -> native.Matrix:
        matrix, scale = (weight, None) if product is linear.linear else product.operands
        self._held += [matrix, scale, bias]
        return native.Matrix.of(matrix, scale, bias)

    def _norm(self, part: Any) -> _Norm:
        gain, bias = getattr(part, "weight", None), getattr(part, "bias", None)
        return _Norm(self._pointer(gain), self._pointer(bias), _NORMS[type(part)], getattr(part, "eps", 0))

    def _layer(self, part: Any) -> _Layer:
        products = {"qkv": part.attention.qkv, "out": part.attention.out, "up": part.ffn.up, "down": part.ffn.down}
        made = {name: self._matrix(of.product, of.weight, of.bias) for name, of in products.items()}
        return _Layer(before_attention=self._norm(part.attention_norm), before_ffn=self._norm(part.ffn_norm), **made)


_prepared: WeakSet[Transformer] = WeakSet()


def prepare(model: Transformer) -> None:
    """From here on `of` gives the model's steps, where it can have them."""
    _prepared.discard(model)
    if why_not(model) is None:
        _prepared.add(model)


def of(model: Transformer) -> Step | None:
    """Steps of a model that was prepared, for one thread at a time; None of another."""
    return Step(model) if model in _prepared else None


def why_not(model: Transformer) -> str | None:
    """The first thing because of which a model goes through its modules, in words; None where it need not."""
    if unknown := _unknown(model, "model", [Transformer]):
        return unknown
    if others := {type(part).__name__ for part in model.modules() if type(part) not in _TYPES}:
        return f"parts of kinds that it does not know: {', '.join(sorted(others))}"
    if not len(model.blocks):
        return "no blocks"
    blocks: list[Any] = list(model.blocks)
    if any(part.attention.layer != i or _shape(part) != _shape(blocks[0]) for i, part in enumerate(blocks)):
        return "blocks that are not alike, or not in their order"
    parameters = list(model.parameters())
    tables = [getattr(model.position, name) for name in ("cos", "sin") if hasattr(model.position, name)]
    if any(type(p) is not nn.Parameter or not p.is_contiguous() or p.device.type != "cpu" for p in parameters):
        return "parameters that do not lie in the CPU's memory as they are"
    formats = {p.dtype for p in parameters}
    if formats not in ({torch.float32}, {torch.bfloat16}) or any(t.dtype != torch.float32 for t in tables):
        return "numbers that are not fp32 or bf16"
    if any("forward" in vars(part) for part in model.modules()):
        return "a forward pass that was replaced"
    return None if native.available() else "no C compiler"


def _unknown(part: Any, place: str, kinds: Sequence[type]) -> str | None:
    """The first part that is none of the kinds known for its place, in words."""
    if type(part) not in kinds:
        return f"{place} is {type(part).__name__}"
    product = getattr(part, "product", getattr(part, "multiply", linear.linear))
    if product is not linear.linear and not hasattr(product, "operands"):
        return f"{place} has a product of its own"
    for name, known in _KNOWN.get(type(part), {}).items():
        child = getattr(part, name)
        children = {f"{name}.{i}": each for i, each in enumerate(child)} if name == "blocks" else {name: child}
        for own, each in children.items():
            if found := _unknown(each, f"{place}.{own}", known):
                return found
    return None


def _shape(part: Any) -> tuple[Any, ...]:
    """What all blocks of one model have in common."""
    of, units = part.attention, part.ffn
    kind = (type(units), getattr(units, "approximate", None), units.down.in_features)
    return (of.heads, of.kv_heads, of.head_width, of.scale, of.qk_norm, *kind)
