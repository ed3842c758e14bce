"""Callbacks that look into a model while it trains: norms by role, the scale of its activations, and where attention looks.

Each measures after the first step and every so many, in a line of metrics.jsonl of its own, changes no number of the training, and says at
the end what it cost. The weights looked at are those being trained, whatever average of them is evaluated.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.config.shards import in_shards
from gptlab.data.loader import Batch, held_out_batches
from gptlab.hardware.device import synchronise
from gptlab.hardware.precision import autocast
from gptlab.model.kernel import Kernel, Naive
from gptlab.runner.callback import Callback
from gptlab.tracker.console import say
from gptlab.tracker.protocol import Metrics

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer

DEAD = 1e-3  # of a layer's RMS: a hidden unit that never rises above it does nothing
_LAYER = re.compile(r"blocks\.(\d+)\.")


class _Diagnostic(Callback):
    """When to measure, and what it took."""

    def __init__(self, name: str, prefix: str, every: int) -> None:
        if every < 1:
            raise ConfigError(f"callbacks.{name}.every={every} must be at least 1")
        self.name, self.prefix, self.every = name, prefix, every
        self._times, self._seconds, self._now = 0, 0.0, 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._trained = trainer.state.seconds

    def due(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    @contextmanager
    def timed(self, trainer: Trainer) -> Iterator[None]:
        synchronise(trainer.device)
        started = time.perf_counter()
        yield
        synchronise(trainer.device)
        self._now += time.perf_counter() - started

    def write(self, trainer: Trainer, found: Metrics) -> None:
        """A line with what was found and with the time it took."""
        trainer.record({**found, f"{self.prefix}/milliseconds": 1000 * self._now})
        self._times, self._seconds, self._now = self._times + 1, self._seconds + self._now, 0.0

    def on_end(self, trainer: Trainer) -> None:
        trained = trainer.state.seconds - self._trained
        if self._times and trained > 0 and trainer.world.first:
            often = "once" if self._times == 1 else f"{self._times} times"
            each, share = 1000 * self._seconds / self._times, self._seconds / trained
            say((f"  {self.name}: {often}, {each:.1f} ms each, {100 * share:.1f} % of the training time", "dim"))


@register("callback", "norms")
class Norms(_Diagnostic):
    """Norms of gradients (clipped), weights and their changes in a step: by role, and `per_layer` by block; a copy of the weights.

    `norm/relative_update/ROLE` is the change's norm over the weights'; `…_rms` is for one weight, which compares widths.
    """

    def __init__(self, *, every: int = 50, per_layer: bool = False) -> None:
        super().__init__("norms", "norm", every)
        self.per_layer = per_layer
        self._copies: list[Tensor] = []  # of the weights before the update, between the two hooks alone
        self._gradients: list[float] = []

    def before_update(self, trainer: Trainer) -> None:
        if not self.due(trainer.state.step + 1):
            return
        with self.timed(trainer), torch.no_grad():
            parameters = list(trainer.model.parameters())
            self._gradients = squares([p.grad for p in parameters], trainer.world.first)
            self._copies = [_own(p).clone() for p in parameters]

    def on_step(self, trainer: Trainer) -> None:
        if not self._copies:
            return
        with self.timed(trainer), torch.no_grad():
            parameters, first = list(trainer.model.parameters()), trainer.world.first
            sharded = [in_shards(p) for p in parameters]
            weights = squares(self._copies, first, sharded)
            for copy, parameter in zip(self._copies, parameters, strict=True):
                copy.sub_(_own(parameter))
            updates = squares(self._copies, first, sharded)
            self._copies = []
            found = self._by_label(trainer, [self._gradients, weights, updates])
        self.write(trainer, found)

    def _by_label(self, trainer: Trainer, squares: list[list[float]]) -> Metrics:
        """The metrics from the sums of squares of each parameter's gradient, weights and change."""
        roles = trainer.model.roles()
        sums: dict[str, list[float]] = {}
        counts: dict[str, int] = {}
        for (path, parameter), *values in zip(trainer.model.named_parameters(), *squares, strict=True):
            layer = _LAYER.match(path) if self.per_layer else None
            for label in (roles[path], *([f"layer/{layer[1]}"] if layer else [])):
                sums[label] = [a + b for a, b in zip(sums.get(label, (0.0, 0.0, 0.0)), values, strict=True)]
                counts[label] = counts.get(label, 0) + parameter.numel()
        every_rank = trainer.world.gather(*(v for values in sums.values() for v in values))
        whole = [math.sqrt(sum(parts)) for parts in zip(*every_rank, strict=True)]
        found: Metrics = {}
        for number, label in enumerate(sums):
            gradient, weight, update = whole[3 * number : 3 * number + 3]
            root = math.sqrt(counts[label])
            found |= {f"norm/gradient/{label}": gradient, f"norm/weight/{label}": weight, f"norm/update/{label}": update}
            found |= {f"norm/weight_rms/{label}": weight / root, f"norm/update_rms/{label}": update / root}
            if weight:  # biases begin at zero
                found[f"norm/relative_update/{label}"] = update / weight
        return found


def _own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    found: Tensor = tensor.to_local() if in_shards(tensor) else tensor
    return found.detach()


def squares(tensors: Sequence[Tensor | None], first: bool, sharded: Sequence[bool] | None = None) -> list[float]:
    """Of each tensor the sum of squares that is this rank's to tell: of its own part, or of the whole on rank 0 alone."""
    norms = []
    for number, tensor in enumerate(tensors):
        mine = first or (in_shards(tensor) if sharded is None else sharded[number])
        norms.append(torch.linalg.vector_norm(_own(tensor).float()) if tensor is not None and mine else torch.zeros(()))
    device = next((n.device for n in norms if n.device.type != "cpu"), torch.device("cpu"))
    return [n**2 for n in torch.stack([n.to(device) for n in norms]).tolist()]


class HeldOutDiagnostic(_Diagnostic):
    """Looks at one batch of `tokens` held-out tokens, spread over the set (of a mix, its first source's), and always the same."""

    def __init__(self, name: str, prefix: str, every: int, tokens: int) -> None:
        super().__init__(name, prefix, every)
        if tokens < 1:
            raise ConfigError(f"callbacks.{name}.tokens={tokens} must be at least 1")
        self.tokens = tokens

    def on_start(self, trainer: Trainer) -> None:
        super().on_start(trainer)
        data, context = trainer.data, trainer.config.model.context_length
        rows = max(1, self.tokens // context)
        name = next(n for n in data.validation_names if n != "val" or not data.parts)
        batch = next(held_out_batches(data, name, context, rows * context, rows, documents=trainer.model.sees_documents))
        self._batch: Batch = batch.to(trainer.device)

    def on_step(self, trainer: Trainer) -> None:
        if not self.due(trainer.state.step):
            return
        with self.timed(trainer), torch.no_grad(), ExitStack() as hooks:
            collect = self.watch(trainer, hooks)
            was_training = trainer.model.training
            trainer.model.eval()
            try:
                with autocast(trainer.device, trainer.config.hardware.precision):
                    trainer.model(self._batch.inputs, document=self._batch.document)
            finally:
                trainer.model.train(was_training)
            found = collect()
        self.write(trainer, numbers(found))

    def watch(self, trainer: Trainer, hooks: ExitStack) -> Callable[[], dict[str, Tensor]]:
        """Put hooks into the model that `hooks` takes away again; what comes back gives the scalars they found."""
        raise AssertionError("a subclass says how")


def numbers(found: dict[str, Tensor]) -> Metrics:
    """Scalars as metrics."""
    values = torch.stack(list(found.values())).tolist() if found else []  # one wait for the device
    return dict(zip(found, values, strict=True))


@register("callback", "activations")
class Activations(HeldOutDiagnostic):
    """RMS and largest size of the residual stream after each block, and each feed-forward's share of dead hidden units.

    On held-out `tokens`. A unit is dead that on none of them exceeds a thousandth of its layer's RMS, in size: the same rule for
    ReLU, whose dead units are zero, and for GELU or gated units, which only come near it.
    """

    def __init__(self, *, every: int = 50, tokens: int = 2048) -> None:
        super().__init__("activations", "activation", every, tokens)

    def watch(self, trainer: Trainer, hooks: ExitStack) -> Callable[[], dict[str, Tensor]]:
        found: dict[str, Tensor] = {}

        def stream(label: str) -> Callable[..., None]:
            def look(module: nn.Module, inputs: Any, x: Tensor) -> None:
                found[f"activation/rms/{label}"] = x.float().square().mean().sqrt()
                found[f"activation/largest/{label}"] = x.float().abs().amax()

            return look

        def hidden(label: str) -> Callable[..., None]:
            def look(module: nn.Module, inputs: Any, x: Tensor) -> None:
                size = x.float().abs().flatten(0, -2)
                found[f"activation/dead/{label}"] = (size.amax(0) <= DEAD * size.square().mean().sqrt()).float().mean()

            return look

        model = trainer.model
        taps = [("embedded", stream("embedded"))]
        taps += [(f"blocks.{n}.residual_post", stream(str(n))) for n in range(len(model.blocks))]
        taps += [(f"blocks.{n}.ffn.hidden", hidden(str(n))) for n in range(len(model.blocks))]
        modules = dict(model.named_modules())
        for path, look in taps:
            if path in modules:  # a feed-forward without hidden units has none that could be dead
                handle = modules[path].register_forward_hook(look)
                hooks.callback(handle.remove)
        return lambda: found


@register("callback", "attention")
class Attention(HeldOutDiagnostic):
    """Entropy of each layer's attention in nats (mean over heads and queries), and its largest score; `per_head` of each head too.

    On held-out `tokens`, from what the kernel is given, whichever it is: the pattern is written out in fp32 as kernel naive does, with
    mask, bias, scale and documents. It takes tokens x heads x context numbers of memory, a few times over.
    """

    def __init__(self, *, every: int = 50, tokens: int = 1024, per_head: bool = False) -> None:
        super().__init__("attention", "attention", every, tokens)
        self.per_head = per_head

    def on_start(self, trainer: Trainer) -> None:
        super().on_start(trainer)
        without = [str(n) for n, block in enumerate(trainer.model.blocks) if not hasattr(getattr(block, "attention", None), "kernel")]
        if len(without) == len(trainer.model.blocks):
            raise ConfigError("callback=attention looks at the queries and keys of an attention kernel; this model has none")
        if without and trainer.world.first:
            say((f"  attention: layers without a kernel are passed over: {', '.join(without)}", "yellow"))

    def watch(self, trainer: Trainer, hooks: ExitStack) -> Callable[[], dict[str, Tensor]]:
        found: dict[str, Tensor] = {}
        for number, block in enumerate(trainer.model.blocks):
            attention = getattr(block, "attention", None)
            if not hasattr(attention, "kernel"):
                continue

            def look(pattern: Tensor, scores: Tensor, layer: int = number) -> None:
                entropy, largest = torch.special.entr(pattern).sum(-1).mean((0, 2)), scores.amax((0, 2, 3))  # one value a head
                found[f"attention/entropy/{layer}"], found[f"attention/largest_score/{layer}"] = entropy.mean(), largest.amax()
                for head in range(len(entropy) if self.per_head else 0):
                    found[f"attention/entropy/{layer}/head_{head}"] = entropy[head]
                    found[f"attention/largest_score/{layer}/head_{head}"] = largest[head]

            hooks.enter_context(_watched(attention, look))
        return lambda: found


@contextmanager
def _watched(attention: Any, look: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Put a watched kernel in the place of an attention's own: in its dictionary, so that one that is a module keeps its place."""
    own, kernel = vars(attention), attention.kernel
    plain = "kernel" in own
    own["kernel"] = _Watched(kernel, look)
    try:
        yield
    finally:
        del own["kernel"]
        if plain:
            own["kernel"] = kernel


class _Watched:
    """A kernel that shows the pattern and the scores of what it is asked, and answers as it would."""

    def __init__(self, kernel: Kernel, look: Callable[[Tensor, Tensor], None]) -> None:
        self.kernel, self.look = kernel, look
        self.materialises_pattern = kernel.materialises_pattern

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> Tensor:
        scores, pattern = nn.Identity(), nn.Identity()
        seen: list[Tensor] = []
        for tap in (scores, pattern):
            tap.register_forward_hook(lambda module, inputs, x: seen.append(x))
        exact = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):  # one value column: nobody asks what comes out
            given = {name: asked[name] for name in ("mask", "bias", "q_positions", "k_positions", "scale")}
            Naive()(q.to(exact), k.to(exact), v[..., :1].to(exact), **given, dropout=0.0, taps=(scores, pattern))
        self.look(seen[1], seen[0])
        return self.kernel(q, k, v, **asked)
