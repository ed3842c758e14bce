"""Peak memory of a run before it begins: its own step is run without memory, and every storage it would have held is counted.

The model, the objective, the optimizer and the evaluation are the run's own, on tensors that have a shape and a device and no data
(torch's FakeTensorMode); so whatever a component does is forecast as it is, and no formula has to know it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError, GptlabError
from gptlab.config.registry import build, component, component_of
from gptlab.config.schema import Config
from gptlab.config.slots import Options
from gptlab.data.loader import Batch
from gptlab.hardware.device import resident_memory
from gptlab.hardware.precision import autocast, in_precision
from gptlab.hardware.world import World, launched
from gptlab.model.linear import undrawn
from gptlab.model.path import as_elsewhere
from gptlab.model.transformer import Transformer
from gptlab.objective.protocol import hooked
from gptlab.optimizer.groups import parameter_groups
from gptlab.runner.held import Fused, Held
from gptlab.runner.validation import EVALUATION_TOKENS, scored

# Allocators hand out multiples of these many bytes: CUDA's caching one, and posix_memalign as torch calls it.
GRANULE = {"cuda": 512, "cpu": 64}
CUBLAS_WORKSPACE = 32 << 20  # bytes; Hopper's, elsewhere 8 MiB
CHUNK = 1024  # tokens whose logits are held, where that is proposed
LIBRARIES = 16 << 20  # bytes on the CPU, measured with nano to gpt2: what libraries and threads take beside the heap in the first steps
USABLE = {"cuda": 0.9, "cpu": 0.8}  # of the memory that a run may count on: the rest goes to the CUDA context, gaps, other programs


@dataclass(frozen=True)
class Memory:
    """Bytes at the `moment` when a run holds most: backward, update, evaluation or checkpoint. `total`: its memory/peak_bytes.

    `copies` are those of a checkpoint that is written in the background, on the CPU; `process` is Python with its libraries, there too, and
    `gaps` what the heap holds free between blocks, and the libraries' own buffers.
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
                stack.enter_context(Fused())
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
    on_cpu = kind == "cpu"
    held = Held(GRANULE["cpu" if on_cpu else "cuda"], heap=on_cpu)
    moments: list[Memory] = []
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), held:
        with torch.device(device), undrawn():
            model = Transformer(config.model, vocabulary)
        in_precision(model, config.hardware.precision)
        model.recompute = build(config.hardware.checkpointing)
        objective = hooked(build(config.objective))
        objective.adapt(model, 0, 0)
        weights = held.now  # a constant of the run from here on, as is what stays when the first step is over
        held.widths = (vocabulary, model.embedding.weight.shape[0])
        optimizer: torch.optim.Optimizer = build(
            config.optimizer, groups=parameter_groups(model, model.roles(), model.widening()), device=device
        )
        parameters = [p for p in model.parameters() if p.requires_grad]
        count = sum(bool(getattr(component_of(options).factory, "makes_average", False)) for options in config.callbacks.values())
        averages = [[torch.empty_like(p) for p in parameters] for _ in range(count)]
        batch = objective.outlined(_batch(rows, context, device, model))
        grown = _gradients_of(held, parameters)

        def passes() -> None:
            # Where a batch has several parts, the gradients of the first are there during the next.
            for _ in range(1 if rows >= rows_of(config) else 2):
                with autocast(device, config.hardware.precision):
                    loss = objective(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss

        def cleared() -> None:
            optimizer.zero_grad(set_to_none=True)
            grown.clear()
            held.gradients = 0

        def at(moment: str, copies: int = 0) -> None:
            live = held.peak - weights - state - held.peak_gradients - held.peak_logits - copies
            gaps = held.span - held.peak + LIBRARIES if on_cpu else 0
            parts = (weights, held.peak_gradients, state, live, held.peak_logits, copies, fixed, gaps)
            moments.append(Memory(moment, *parts, sum(parts)))

        # What the first step leaves free between its blocks is where the optimizer's state comes to lie, and the second finds less room. A
        # GPU's allocator keeps blocks of a size together.
        for _ in range(2 if on_cpu else 1):
            if on_cpu:
                passes()
            else:
                for p in parameters:
                    p.grad = torch.empty_like(p)
            optimizer.step()
            cleared()
        state = held.now - weights
        saves = on_cpu and "checkpoint" in _callbacks(config)
        copies = _copies(model, optimizer, averages) if saves and _overlaps(config) else []
        copied = (weights + state) * bool(copies)
        held.begin()
        passes()
        at("backward", copied)
        held.begin()
        optimizer.step()
        at("update", copied)
        cleared()
        if "evaluation" in _callbacks(config):
            held.begin()
            _evaluate(model, config, device, waiting=bool(averages) or hasattr(optimizer, "average"))
            at("evaluation", copied)
        if saves and not copies:
            held.begin()
            copies = _copies(model, optimizer, averages)
            at("checkpoint", weights + state)
    return max(moments, key=lambda memory: memory.total)


def _gradients_of(held: Held, parameters: list[torch.nn.Parameter]) -> set[int]:
    """Have the gradients counted as they come to be; the set of those that are there."""
    there = set[int]()

    def grown(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if id(parameter) not in there:
            there.add(id(parameter))
            held.gradients += parameter.grad.untyped_storage().nbytes()

    for p in parameters:
        p.register_post_accumulate_grad_hook(grown)  # type: ignore[no-untyped-call]
    return there


def _copies(model: Transformer, optimizer: torch.optim.Optimizer, averages: list[list[Tensor]]) -> list[Tensor]:
    """What a checkpoint copies before it is written."""
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return [torch.empty_like(t) for t in (*model.parameters(), *state, *(t for average in averages for t in average))]


def _batch(rows: int, context: int, device: torch.device, model: Transformer) -> Batch:
    tokens = torch.zeros(rows, context + 1, dtype=torch.long, device=device)
    document = torch.zeros(rows, context, dtype=torch.long, device=device) if model.sees_documents else None
    return Batch(tokens[:, :-1], tokens[:, 1:], document=document)


def _evaluate(model: Transformer, config: Config, device: torch.device, *, waiting: bool) -> None:
    """An evaluation's largest pass; `waiting`: an average takes the weights' place, and these are kept meanwhile."""
    context = config.model.context_length
    kept = [torch.empty_like(p) for p in model.parameters()] if waiting else []
    model.eval()
    with torch.no_grad(), autocast(device, config.hardware.precision):
        scored(model, _batch(max(1, EVALUATION_TOKENS // context), context, device, model), count_right=False)
    model.train()
    del kept


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
