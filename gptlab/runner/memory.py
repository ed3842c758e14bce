"""Peak memory of a run before it begins: its own step is run without memory, and every storage it would have held is counted.

The model, the objective, the optimizer and the evaluation are the run's own, on tensors that have a shape and a device and no data
(torch's FakeTensorMode); so whatever a component does is forecast as it is, and no formula has to know it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptlab.config.errors import ConfigError, GptlabError
from gptlab.config.registry import build, component, component_of
from gptlab.config.schema import Config
from gptlab.config.slots import Options
from gptlab.data.loader import Batch
from gptlab.hardware.device import GIANT, resident_memory
from gptlab.hardware.precision import autocast, in_precision
from gptlab.hardware.world import World, launched
from gptlab.model.linear import undrawn
from gptlab.model.path import as_elsewhere
from gptlab.model.transformer import Transformer
from gptlab.optimizer.groups import parameter_groups
from gptlab.runner.validation import EVALUATION_TOKENS, scored

# Allocators hand out multiples of these many bytes: CUDA's caching one, and posix_memalign as torch calls it.
GRANULE = {"cuda": 512, "cpu": 64}
CUBLAS_WORKSPACE = 32 << 20  # bytes; Hopper's, elsewhere 8 MiB
CHUNK = 1024  # tokens whose logits are held, where that is proposed
# On the CPU, measured with nano to gpt2 in fp32: what MKL, oneDNN and threads take in the first steps, and what the heap has in gaps, as a
# share of the blocks that lie in it. Giants lie outside.
LIBRARIES, HEAP_GAPS = 50 << 20, 0.35
USABLE = {"cuda": 0.9, "cpu": 0.8}  # of the memory that a run may count on: the rest goes to the CUDA context, gaps, other programs


@dataclass(frozen=True)
class Memory:
    """Bytes at the `moment` when a run holds most: backward, update, evaluation or checkpoint. `total`: its memory/peak_bytes.

    `copies` are those of a checkpoint that is written in the background, on the CPU; `process` is Python with its libraries, there too, and
    `gaps` what the heap and the libraries' own buffers add.
    """

    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    copies: int
    process: int
    gaps: int
    total: int


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that an operator makes until it is freed; `logits` of those as wide as the vocabulary, `giants`
    of those that lie outside a CPU's heap."""

    def __init__(self, granule: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granule, self.now, self.logits, self.peak, self.peak_logits, self.peak_gradients = granule, 0, 0, 0, 0, 0
        self.gradients, self.giants, self.peak_giants = 0, 0, 0
        self.widths: tuple[int, ...] = ()
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # the value of a tensor without data: a seed, a count
            return args[0].dtype.is_floating_point * 1.0 or 1
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        wide = size if tensor.dim() > 1 and tensor.shape[-1] in self.widths else 0
        giant = size if size > GIANT else 0

        def freed(_: object) -> None:
            del self._known[key]
            self.now, self.logits, self.giants = self.now - size, self.logits - wide, self.giants - giant

        self._known[key] = weakref.ref(storage, freed)
        self.now, self.logits, self.giants = self.now + size, self.logits + wide, self.giants + giant
        if self.now > self.peak:
            self.begin()

    def begin(self) -> None:
        """Look for the highest mark from here on."""
        self.peak, self.peak_logits, self.peak_gradients = self.now, self.logits, self.gradients
        self.peak_giants = self.giants


class _Fused(TorchFunctionMode):
    """On a GPU dropout within attention is fused; the CPU's kernel, which stands in, would write the scores out for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            options["dropout_p"] = 0.0
        return func(*args, **options)


def forecast_memory(config: Config, vocabulary: int, *, process: int | None = None) -> Memory:
    """The peak of a resolved config. `process`: the resident size before anything is built; on the CPU this process's own, unless given.

    Raises ConfigError where a component cannot be run without data.
    """
    kind = config.hardware.device.split(":")[0]
    here = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
    device = torch.device(kind if here else "cpu")
    fixed = CUBLAS_WORKSPACE if kind == "cuda" else 0
    if kind == "cpu":
        fixed = resident_memory() if process is None else process
    config = config if here else _stand_in(config)
    try:
        with contextlib.ExitStack() as stack:
            if not here:
                stack.enter_context(as_elsewhere())
                stack.enter_context(_Fused())
            return _traced(config, vocabulary, device, kind, fixed)
    except GptlabError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the memory of this model cannot be forecast, since a part of it asks for the values of its tensors "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}); --measure measures it"
        ) from error


def _stand_in(config: Config) -> Config:
    """What the CPU can run in the place of a GPU's kernels: FlexAttention holds as little as SDPA, fp8's own copies are those of bf16."""
    model, hardware = config.model, config.hardware
    if component_of(model.kernel).name == "flex":
        model = replace(model, kernel=component("model/kernel", "sdpa").options())  # type: ignore[arg-type]
    return replace(config, model=model, hardware=replace(hardware, precision="bf16" if hardware.precision == "fp8" else hardware.precision))


def _traced(config: Config, vocabulary: int, device: torch.device, kind: str, fixed: int) -> Memory:
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes half a second, and not every run is forecast

    context, rows = config.model.context_length, int(config.hardware.micro_batch)
    held = _Held(GRANULE["cuda" if kind != "cpu" else "cpu"])
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), held:
        with torch.device(device), undrawn():
            model = Transformer(config.model, vocabulary)
        in_precision(model, config.hardware.precision)
        model.recompute = build(config.hardware.checkpointing)
        # Each is a constant of the run from here on: what stays when the step is over.
        weights = held.now
        held.widths = (vocabulary, model.embedding.weight.shape[0])
        optimizer: torch.optim.Optimizer = build(
            config.optimizer, groups=parameter_groups(model, model.roles(), model.widening()), device=device
        )
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.empty_like(p)
        gradients = held.now - weights
        held.begin()
        optimizer.step()
        state = held.now - weights - gradients
        update, of_update = held.peak, held.peak_giants
        averages = sum(weights for options in config.callbacks.values() if getattr(component_of(options).factory, "makes_average", False))
        batch_rows = rows_of(config)
        held.gradients = gradients
        if rows >= batch_rows:  # they come to be in this one backward pass
            optimizer.zero_grad(set_to_none=True)
            held.gradients = 0
            for p in parameters:
                p.register_post_accumulate_grad_hook(_grown(held))  # type: ignore[no-untyped-call]
        batch = _batch(rows, context, device, model)
        objective = build(config.objective)
        held.begin()
        with autocast(device, config.hardware.precision):
            loss = objective(model, batch)
        loss.backward()
        peak, logits, grown = held.peak, held.peak_logits, min(held.peak_gradients, gradients)
        of_backward = held.peak_giants
        del loss, batch
        optimizer.zero_grad(set_to_none=True)
        evaluation, wide = _evaluation(model, config, device, held) if "evaluation" in _callbacks(config) else (weights + state, 0)
        of_evaluation, lasting = held.peak_giants, held.giants
    evaluation += weights * (averages > 0 or hasattr(optimizer, "average"))  # the average takes the weights' place, and these wait
    copies = weights + state + averages if kind == "cpu" and "checkpoint" in _callbacks(config) else 0
    early = copies if _overlaps(config) else 0

    def at(moment: str, held_then: int, giants: int, gradients: int, logits: int, copies: int) -> Memory:
        activations = held_then - weights - state - gradients - logits
        own = averages + held_then + copies
        gaps = LIBRARIES + int(HEAP_GAPS * max(0, held_then - giants)) if kind == "cpu" else 0
        return Memory(moment, weights, gradients, state + averages, activations, logits, copies, fixed, gaps, fixed + own + gaps)

    moments = (
        at("backward", peak, of_backward, grown, logits, early),
        at("update", update, of_update, gradients, 0, early),
        at("evaluation", evaluation, of_evaluation, 0, wide, early),
        at("checkpoint", weights + state, lasting, 0, 0, copies),
    )
    return max(moments, key=lambda memory: memory.total)


def _grown(held: _Held) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        held.gradients += parameter.grad.untyped_storage().nbytes()

    return hook


def _batch(rows: int, context: int, device: torch.device, model: Transformer) -> Batch:
    tokens = torch.zeros(rows, context + 1, dtype=torch.long, device=device)
    document = torch.zeros(rows, context, dtype=torch.long, device=device) if model.sees_documents else None
    return Batch(tokens[:, :-1], tokens[:, 1:], document=document)


def _evaluation(model: Transformer, config: Config, device: torch.device, held: _Held) -> tuple[int, int]:
    context = config.model.context_length
    model.eval()
    held.begin()
    with torch.no_grad(), autocast(device, config.hardware.precision):
        scored(model, _batch(max(1, EVALUATION_TOKENS // context), context, device, model), count_right=False)
    return held.peak, held.peak_logits


def _callbacks(config: Config) -> set[str]:
    return {component_of(options).name for options in config.callbacks.values()}


def _overlaps(config: Config) -> bool:
    """Whether a checkpoint's copy is there while training goes on: of all but a run that saves when it has ended."""
    return str(config.trainer.budget).strip() not in ("1step", "1steps")


@dataclass(frozen=True)
class Fit:
    """Settings with which a run's forecast stays within a number of bytes."""

    overrides: tuple[str, ...]
    config: Config
    memory: Memory


Change = Callable[[Config], tuple[str, Config] | None]  # an override and what it makes of a config; None where it changes nothing


def usable(device: str, memory: int) -> int:
    """Bytes of a device's memory that a run may count on."""
    return int(memory * USABLE["cpu" if device == "cpu" else "cuda"])


def what_fits(config: Config, vocabulary: int, room: int, *, process: int | None = None) -> Fit | None:
    """The first change that brings the forecast of a resolved config under `room` bytes, the mildest first; None where none does.

    Each is tried with the largest micro-batch that fits, up to the config's own.
    """
    rows = int(config.hardware.micro_batch)
    for changes in _ALTERNATIVES:
        changed, overrides = config, list[str]()
        for change in changes:
            if (made := change(changed)) is not None:
                overrides.append(made[0])
                changed = made[1]
        if changes and not overrides:
            continue
        if (found := largest_micro_batch(changed, vocabulary, room, rows, process=process)) is not None:
            fitted, memory = found
            smaller = [f"hardware.micro_batch={fitted.hardware.micro_batch}"] if fitted.hardware.micro_batch != rows else []
            return Fit((*smaller, *overrides), fitted, memory)
    return None


def largest_micro_batch(
    config: Config, vocabulary: int, room: int, most: int, *, process: int | None = None
) -> tuple[Config, Memory] | None:
    """The config with the largest micro-batch, of at most `most` rows, that divides its batch and fits; None where one row does not."""
    rows = rows_of(config)
    sizes = [size for size in range(1, min(rows, most) + 1) if rows % size == 0]
    best: tuple[Config, Memory] | None = None
    low, high, place = 0, len(sizes) - 1, len(sizes) - 1  # the largest first: it mostly fits
    while low <= high:  # memory grows with the rows
        tried = replace(config, hardware=replace(config.hardware, micro_batch=sizes[place]))
        memory = forecast_memory(tried, vocabulary, process=process)
        if memory.total <= room:
            best, low = (tried, memory), place + 1
        else:
            high = place - 1
        place = (low + high + 1) // 2
    return best


def rows_of(config: Config) -> int:
    """Sequences of a batch that this process trains on."""
    return int(config.trainer.batch_tokens) // config.model.context_length // (launched() or World()).size


def _chunked(config: Config) -> tuple[str, Config] | None:
    options: Any = config.objective
    if getattr(options, "chunk", None) != 0:  # an objective without it, or one that has it on
        return None
    return f"objective.chunk={CHUNK}", replace(config, objective=replace(options, chunk=CHUNK))


def _checkpointed(name: str) -> Change:
    def change(config: Config) -> tuple[str, Config] | None:
        parts = (getattr(config.model, f.name) for f in fields(config.model))
        if any(isinstance(p, Options) and getattr(component_of(p).factory, "forbids_checkpointing", False) for p in parts):
            return None
        options: Any = component("hardware/checkpointing", name).options()
        if component_of(config.hardware.checkpointing).name in (name, "block"):
            return None
        return f"hardware/checkpointing={name}", replace(config, hardware=replace(config.hardware, checkpointing=options))

    return change


def _precision(name: str) -> Change:
    def change(config: Config) -> tuple[str, Config] | None:
        milder = ("fp32",) if name == "bf16" else ("fp32", "bf16", "fp16", "fp8")
        if config.hardware.precision not in milder:
            return None
        return f"hardware.precision={name}", replace(config, hardware=replace(config.hardware, precision=name))

    return change


_BLOCK, _BF16, _PURE = _checkpointed("block"), _precision("bf16"), _precision("bf16_pure")
_ALTERNATIVES: tuple[tuple[Change, ...], ...] = (
    (),
    (_chunked,),
    (_checkpointed("selective"),),
    (_BLOCK,),
    (_BF16,),
    (_chunked, _BLOCK),
    (_chunked, _BLOCK, _BF16),
    (_chunked, _BLOCK, _PURE),
)


def fit_micro_batch(config: Config, vocabulary: int, memory: int) -> Config:
    """The resolved config of `hardware.micro_batch=auto` with the micro-batch that this much memory holds (0 bytes: not known).

    On a GPU the largest whose forecast fits; on the CPU the one that `resolve` took, or a smaller one where that does not fit: more
    rows are no faster there. It stays as it is where no size fits, and the run itself will say so. This is not done by `resolve`, since
    the vocabulary is known only with the data.
    """
    rows, on_cpu = int(config.hardware.micro_batch), config.hardware.device == "cpu"
    room = usable(config.hardware.device, memory)
    if not memory or (on_cpu and at_most(config, vocabulary, rows) < room) or config.hardware.device == "mps":
        return config
    try:
        found = largest_micro_batch(config, vocabulary, room, rows if on_cpu else rows_of(config))
    except GptlabError:  # a component that cannot be forecast
        return config
    return config if found is None else found[0]


def at_most(config: Config, vocabulary: int, rows: int) -> int:
    """A bound in bytes far above what a micro-batch of `rows` takes, for what is not worth a forecast: a small model's run."""
    model = config.model
    tokens = rows * model.context_length
    scores = model.depth * model.heads * tokens * model.context_length * 16
    weights = 4 * (vocabulary * model.width * (2 + model.depth) + 20 * model.depth * model.width**2)
    return resident_memory() + 12 * weights + tokens * (400 * model.width * (model.depth + 1) + 24 * vocabulary) + scores
