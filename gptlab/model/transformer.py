"""The Transformer: one model for training, generation and interpretation.

    tokens ─ embedding ─ (+ position) ─ input ─ (stream ─ block) × depth ─ norm ─ head ─ logits

Shapes: b batch, t tokens, d width, h heads, g key/value heads, k head width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config.codec import completed
from gptlab.config.errors import ConfigError
from gptlab.config.registry import absent, build, component_of
from gptlab.config.schema import ModelConfig
from gptlab.model.cache import KVCache
from gptlab.model.context import Auxiliary, Context
from gptlab.model.dropout import drop
from gptlab.model.init import initialise, roles, widened
from gptlab.model.linear import undrawn
from gptlab.model.mask import document_starts
from gptlab.model.parametrisation import Parametrisation, widening
from gptlab.model.position import Position
from gptlab.model.table import tabulated

Reduce = Callable[[Tensor, "Transformer"], Tensor]
LOGITS_AT_ONCE = 1 << 26  # of a pass that measures: 268 MB


class Transformer(nn.Module):
    """A decoder-only Transformer whose every part is a component of `config`.

    Raises ConfigError where the parts do not fit (heads that do not divide the width, …).
    """

    order: Tensor
    recompute: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # how a training step runs a block; hardware/checkpointing's

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ConfigError(
                f"model.heads={config.heads} does not divide model.width={config.width}; "
                f"try heads={_nearest_divisor(config.width, config.heads)}"
            )
        config = completed(config)
        self.config, self.vocabulary = config, vocabulary
        self.recompute = _directly
        width, heads, context_length = config.width, config.heads, config.context_length
        head_width = width // heads
        sizes = {"width": width, "heads": heads, "head_width": head_width}
        self.parametrisation: Parametrisation = build(config.parametrisation, width=width, head_width=head_width)
        scale = head_width**-0.5 * self.parametrisation.score
        shared = sizes | {"bias": config.bias, "dropout": config.dropout, "depth": config.depth}

        def norm() -> nn.Module:
            made: nn.Module = build(config.norm, width=width, bias=config.bias)
            return made

        for slot in ("value", "gate"):  # which an attention of another kind may have no place for
            part, attends = getattr(config, slot), component_of(config.attention)
            if slot not in attends.wiring and part != absent(component_of(part).slot):
                raise ConfigError(
                    f"model/attention={attends.name} has no place for model/{slot}={component_of(part).name}; use model/attention=multihead"
                )
        rows = -(-vocabulary // config.pad_vocab_to) * config.pad_vocab_to
        self.embedding = nn.Embedding(rows, width)
        self.position: Position = build(config.position, context_length=context_length, **sizes)
        self.input: nn.Module = build(config.input, width=width)
        self.embedded = nn.Identity()  # tap: the stream before the first block
        self.blocks = nn.ModuleList()
        for layer in range(config.depth):
            place = {"layer": layer, "depth": config.depth}
            value = partial(_value, config, vocabulary=rows, **place)
            gate = build(config.gate, width=width, heads=heads)
            attention = build(config.attention, kernel=build(config.kernel), value=value, gate=gate, layer=layer, scale=scale, **shared)
            ffn = build(config.ffn, layer=layer, **shared)
            block: nn.Module = build(config.block, norm=norm, attention=attention, ffn=ffn, **place)
            block.stream = build(config.stream, width=width, **place)  # a child, so that a block taken out or put in brings its own
            self.blocks.append(block)
        last = self.blocks[-1] if config.depth else None
        self.norm = norm() if last is None or getattr(last, "final_norm", True) else nn.Identity()
        self.head: nn.Module = build(config.head, width=width, vocabulary=rows, embedding=self.embedding)
        order = tabulated(lambda: torch.arange(context_length)[None], 1, context_length, dtype=torch.int64)
        self.register_buffer("order", order, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> Transformer:
        """Draw every parameter from the config's init, each from its own seed. Returns self."""
        draw = build(self.config.init, width=self.parametrisation.init_width, depth=self.config.depth)
        initialise(self, widened(draw, self.parametrisation.multiple), seed)
        return self

    def features(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        document: Int[Tensor, "b t"] | None = None,
        positions: Int[Tensor, "b t"] | None = None,
        cache: KVCache | None = None,
        losses: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The stream after the last norm, before the head.

        `document` (any ids; a document is a run of equal ones) keeps attention within documents and restarts `positions`, unless
        these are given. `losses` receives what parts add to the training loss, each a mean over the tokens.
        Raises ValueError when documents come with a cache that already holds tokens.
        """
        start = 0 if cache is None else cache.length
        if start and document is not None:
            raise ValueError("a document mask sees the tokens of one call; it cannot be used with a cache that already holds some")
        end = start + tokens.shape[1]
        if cache is not None and not (cache.even and end <= self.order.shape[1]):
            order = cache.order(tokens.shape[1])
        else:
            fits = end <= self.order.shape[1]
            order = self.order[:, start:end] if fits else torch.arange(start, end, device=tokens.device)[None]
        if document is not None:
            document = document_starts(document).expand_as(tokens)
        if positions is None:
            # Positions that restart stay within the row: asking for their maximum would wait for the device.
            self.position.reach(end)
            positions = order if document is None else order - document
        else:
            self.position.reach(int(positions.max()) + 1)
        x = self.position.embed(self.embedding(tokens), positions)
        x = self.input(x, positions, cache)
        x = self.embedded(drop(x, self.config.dropout, self.training))
        context = Context(tokens, positions, order, document, x, self.position, cache, None if losses is None else Auxiliary(losses))
        for block in self.blocks:
            layer = partial(_layer, block, context)
            x = self.recompute(layer, x) if self.training and torch.is_grad_enabled() else layer(x)
        if cache is not None:
            cache.advance(tokens.shape[1])
        out: Tensor = self.norm(x)
        return out

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        document: Int[Tensor, "b t"] | None = None,
        positions: Int[Tensor, "b t"] | None = None,
        cache: KVCache | None = None,
        losses: dict[str, Tensor] | None = None,
        reduce: Reduce | None = None,
    ) -> Tensor:
        """Logits (b, t, v) of the next token at every place; with `reduce` what it makes of the features, as a loss by chunks does."""
        features = self.features(tokens, document=document, positions=positions, cache=cache, losses=losses)
        return self.logits(features) if reduce is None else reduce(features, self)

    def logits(self, features: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        """The head over features, padded rows left out."""
        multiple = self.parametrisation.multiple
        logits: Tensor = self.head(features if multiple == 1 else features / multiple)
        return logits if logits.shape[-1] == self.vocabulary else logits[..., : self.vocabulary]

    def logits_by_parts(self, features: Float[Tensor, "n d"]) -> Iterator[tuple[slice, Float[Tensor, "m v"]]]:
        """The head over so many rows at a time as LOGITS_AT_ONCE allows: which they are, and their logits in fp32. For passes without
        gradients, which take longer to get the memory for a large vocabulary than to compute in it."""
        size = max(1, LOGITS_AT_ONCE // self.vocabulary)
        for start in range(0, len(features), size):
            part = slice(start, start + size)
            yield part, self.logits(features[part]).float()

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache that fits this model's attention, on its device and in its dtype."""
        attention: list[Any] = [block.attention for block in self.blocks]
        return KVCache(
            batch,
            capacity,
            layers=len(attention),
            kv_heads=attention[0].kv_heads if attention else 1,
            head_width=attention[0].head_width if attention else 1,
            windows=[getattr(part, "window", None) for part in attention],
            device=self.embedding.weight.device,
            dtype=self.embedding.weight.dtype,
        )

    @property
    def sees_documents(self) -> bool:
        """Whether its attention asks for `document` (option `document_mask`): who trains or evaluates it then gives it."""
        return any(getattr(block.attention, "document_mask", False) for block in self.blocks)

    def roles(self) -> dict[str, str]:
        """Parameter path -> role (matrix, embedding, head, gain or bias)."""
        return roles(self)

    def widening(self) -> dict[str, float]:
        """Parameter path -> how many times more terms its product sums than at the width that the optimizer's rate is meant for."""
        return widening(self, self.roles(), self.parametrisation.multiple)


def _directly(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x)


def _layer(block: Any, context: Context, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    out: Tensor = block(block.stream(x, context), context)
    return out


def _value(config: ModelConfig, kv_heads: int, head_width: int, **wiring: int) -> nn.Module:
    made: nn.Module = build(config.value, kv_heads=kv_heads, head_width=head_width, **wiring)
    return made


def count_parameters(model: Transformer, *, active: bool = False) -> dict[str, int]:
    """Parameters by role, and their `total`. A tied head counts once, as embedding.

    `active`: those alone that one token goes through; a module of which it meets a part says which: `active_share`.
    """
    counts: dict[str, int] = {}
    sizes = dict(model.named_parameters())
    modules = dict(model.named_modules())
    for path, role in model.roles().items():
        share = getattr(modules[path.rpartition(".")[0]], "active_share", 1.0) if active else 1.0
        counts[role] = counts.get(role, 0) + round(sizes[path].numel() * share)
    return counts | {"total": sum(counts.values())}


PARTS = ("token embedding", "position", "value embeddings", "attention", "feed-forward", "norms", "head", "other")


def parameters_by_part(model: Transformer) -> dict[str, int]:
    """Parameters by what they are for (a part that the model has not is left out), `total`, and `active`: those a token goes through.

    A tied head is the token embedding.
    """
    counts, known = dict.fromkeys(PARTS, 0), model.roles()
    for path, parameter in model.named_parameters():
        counts[_part_of(path.split(".")[:-1], known[path])] += parameter.numel()
    found = {part: count for part, count in counts.items() if count}
    return found | {"total": sum(found.values()), "active": count_parameters(model, active=True)["total"]}


def _part_of(names: list[str], role: str) -> str:
    if any("norm" in name for name in names):
        return "norms"
    if names[0] == "blocks":
        values = names[2] == "attention" and role == "embedding"
        return "value embeddings" if values else {"attention": "attention", "ffn": "feed-forward"}.get(names[2], "other")
    return {"embedding": "token embedding", "position": "position", "head": "head"}.get(names[0], "other")


def flops_per_token(model: Transformer) -> float:
    """Training FLOPs of a token: 6 per matrix weight it goes through (head included, tied or not) + 12 · depth · width · context."""
    counts, config = count_parameters(model, active=True), model.config
    head = counts.get("head", 0) or model.embedding.weight.numel()
    attention = 12 * config.depth * config.width * config.context_length
    return 6.0 * (counts.get("matrix", 0) + head) + attention


def new_model(config: ModelConfig, vocabulary: int, seed: int) -> Transformer:
    """A model drawn from its config's init. Raises ConfigError where its parts do not fit."""
    with undrawn():
        model = Transformer(config, vocabulary)
    return model.initialise(seed)


def meta_model(config: ModelConfig, vocabulary: int) -> Transformer:
    """The model without memory: shapes, counts and the checks of its parts. Raises ConfigError."""
    with torch.device("meta"), undrawn():
        return Transformer(config, vocabulary)


def _nearest_divisor(n: int, near: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - near))
