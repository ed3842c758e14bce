"""Where the time of a training step goes: its phases by the clock, its operators by torch's profiler, and the least its products need."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from gptlab.hardware.device import peak_flops, synchronise
from gptlab.hardware.precision import DTYPES
from gptlab.runner.trainer import Trainer
from gptlab.tracker.console import console, say

PHASES = ("batch", "forward", "backward", "clipping", "update")
REST = "the rest"  # of train_step: seeds, moving the batch, reading loss and norm, the guard, freeing gradients
CLOCKED_SECONDS, PROFILED_SECONDS, PRODUCT_SECONDS = 2.5, 0.5, 0.25  # about how long to measure
SQUARE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # rows of the square product whose rate is the device's, launches aside
WORTH_SAYING = 0.03  # how far two measurements of one step may differ unremarked

Steps = Callable[[int], float]  # a number of steps -> their seconds
Around = Callable[[str], AbstractContextManager[Any]]

# Kinds of operator by name, the first that fits; an operator that is called within another has the outer one's kind.
KINDS = (
    ("attention kernel", r"attention|^_?softmax|_softmax_backward"),
    ("loss", r"log_softmax|nll_loss|cross_entropy"),
    ("matrix products", r"mm$|mm_|^mm|matmul|linear$|linear_pointwise|^mv$|^dot$|einsum|bilinear|convolution"),
    ("normalisation", r"layer_norm|rms_norm|batch_norm|group_norm|vector_norm"),
    ("embedding and gather", r"embedding|index|gather|scatter|take"),
    ("optimizer and clipping", r"^_foreach|^_fused_(adam|sgd|adagrad)|^_amp_"),
    (
        "copies and layout",
        r"copy|^to$|clone|contiguous|^cat$|^stack$|split|chunk|view|reshape|transpose|^t$|permute|expand|as_strided|slice|select|unbind"
        r"|squeeze|detach|alias|empty|zeros|ones|fill_|zero_|resize|narrow|repeat|unfold|pad|item|local_scalar|set_|lift",
    ),
)
ELEMENTWISE, FUSED, OVERHEAD = "activation and elementwise", "fused by torch.compile", "Python and launching"


def breakdown(trainer: Trainer, steps: Steps) -> dict[str, Any]:
    """One step of `steps(count)`, which runs the trainer's own `train_step`, in parts: milliseconds and shares, as JSON holds them."""
    clocked = _clocked(trainer, steps)
    found = clocked | {"update_ms": clocked["phases_ms"]["update"], "update_share": clocked["phases_share"]["update"]}
    return found | _profiled(trainer, steps, clocked["bare_step_ms"]) | {"limit": limit(trainer, clocked["bare_step_ms"])}


@contextlib.contextmanager
def _within(trainer: Trainer, around: Around) -> Iterator[None]:
    """In here each phase of a step runs inside `around(its name)`; the trainer's code is untouched."""

    def wrapped(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def call(*arguments: Any, **named: Any) -> Any:
            with around(name):
                return function(*arguments, **named)

        return call

    with (
        patch.object(trainer.loader, "batch", wrapped(trainer.loader.batch, "batch")),
        patch.object(trainer, "forward", wrapped(trainer.forward, "forward")),
        patch.object(Tensor, "backward", wrapped(Tensor.backward, "backward")),
        patch.object(nn.utils, "clip_grad_norm_", wrapped(nn.utils.clip_grad_norm_, "clipping")),
        patch.object(trainer.optimizer, "step", wrapped(trainer.optimizer.step, "update")),
    ):
        yield


def _clocked(trainer: Trainer, steps: Steps) -> dict[str, Any]:
    """Seconds of each phase, in steps that alternate with bare ones: what the clocks cost shows in the same minute."""
    spent: dict[str, float] = {}

    @contextlib.contextmanager
    def clock(name: str) -> Iterator[None]:
        synchronise(trainer.device)
        started = time.perf_counter()
        yield
        synchronise(trainer.device)
        spent[name] += time.perf_counter() - started

    bare, rows = [], []
    for _ in range(_count(CLOCKED_SECONDS, 2 * steps(1))):
        bare.append({"step": steps(1)})
        spent = dict.fromkeys(PHASES, 0.0)
        with _within(trainer, clock):
            seconds = steps(1)
        rows.append(spent | {REST: seconds - sum(spent.values())})
    phases, alone = _middle(rows), _middle(bare)["step"]
    total = sum(phases.values())
    return {
        "bare_step_ms": 1000 * alone,
        "clocked_step_ms": 1000 * total,
        "clocks_add": total / alone - 1,
        "phases_ms": {name: 1000 * seconds for name, seconds in phases.items()},
        "phases_share": {name: seconds / total for name, seconds in phases.items()},
    }


def _count(seconds: float, step: float) -> int:
    return max(3, min(50, round(seconds / step)))


def _middle(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of the middle half of the steps, by their totals: means add up, and a step that something disturbed is left out."""
    ordered = sorted(rows, key=lambda row: sum(row.values()))
    kept = ordered[len(rows) // 4 : len(rows) - len(rows) // 4]
    return {name: sum(row[name] for row in kept) / len(kept) for name in rows[0]}


def _profiled(trainer: Trainer, steps: Steps, bare_ms: float) -> dict[str, Any]:
    """Milliseconds of a step by kind of operator; what no operator accounts for is Python and launching, on a GPU the time it stands idle.

    The profiler lengthens a step: CPU times are scaled to the bare one. A GPU's kernels take as long as ever, and are not.
    """
    on_gpu = trainer.device.type == "cuda"
    if trainer.device.type not in ("cpu", "cuda"):
        return {"kinds_ms": {}, "kinds_share": {}, "profiled_step_ms": None}
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    count = _count(PROFILED_SECONDS, bare_ms / 1000)
    profile = torch.profiler.profile(activities=activities, acc_events=True)
    with _within(trainer, lambda name: torch.profiler.record_function(f"phase {name}")), _silent(), profile:
        profiled_ms = 1000 * steps(count) / count
    events: Any = profile.events()  # type: ignore[no-untyped-call]
    found = {kind: us / 1000 / count for kind, us in by_kind(events or [], on_gpu).items()}
    scale = min(1.0, bare_ms / max(sum(found.values()), 1e-9)) if on_gpu else bare_ms / profiled_ms
    kinds = {kind: ms * scale for kind, ms in sorted(found.items(), key=lambda item: -item[1])}
    kinds[OVERHEAD] = max(0.0, bare_ms - sum(kinds.values()))
    return {"kinds_ms": kinds, "kinds_share": {kind: ms / bare_ms for kind, ms in kinds.items()}, "profiled_step_ms": profiled_ms}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """In here nothing reaches standard error: the profiler's C++ library writes there when it starts and stops, at any log level."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def by_kind(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Microseconds by kind, of a profiler's events: an operator's own CPU time, or on a GPU that of the kernels it launched."""
    spent: defaultdict[str, float] = defaultdict(float)
    kernels = 0.0
    for event in events:
        if event.device_type.name != "CPU":
            kernels += 0.0 if event.is_user_annotation else event.time_range.elapsed_us()
        elif (kind := _kind(event)) is not None:
            spent[kind] += sum(k.duration for k in event.kernels) if on_gpu else event.self_cpu_time_total
    if on_gpu:  # kernels of a compiled graph may belong to no operator
        spent[FUSED] += max(0.0, kernels - sum(spent.values()))
    return {kind: us for kind, us in spent.items() if us}


def _kind(event: Any) -> str | None:
    """The kind of the outermost operator around an event that has one; None for what is no operator's: Python, autograd's engine."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    names.reverse()
    if "phase update" in names or "phase clipping" in names:
        return "optimizer and clipping" if _is_operator(names[-1]) else None
    operators = [name.partition("::")[2] for name in names if _is_operator(name)]
    known = next((kind for name in operators for kind, pattern in KINDS if re.search(pattern, name)), None)
    if known is not None or (operators and _is_operator(names[-1])):
        return known or ELEMENTWISE
    return FUSED if re.search(r"CompiledFxGraph|^triton_|^cpp_fused", names[-1]) else None


def _is_operator(name: str) -> bool:
    return "::" in name and not name.startswith(("autograd::", "torch::autograd::"))


def limit(trainer: Trainer, step_ms: float) -> dict[str, Any]:
    """The least a step of `step_ms` could take: its products by gptlab's formula, at rates that products have here and now, in GFLOP/s.

    `own_shapes` are the products of the model's own matrices, forward and backward; attention's are counted at their rate.
    """
    device, precision = trainer.device, trainer.config.hardware.precision
    side = SQUARE[device.type]
    rates = {}
    for name in dict.fromkeys((precision, "fp32", "bf16")):
        a = torch.randn(side, side, device=device).to(DTYPES[name])
        rates[name] = 2e-9 * side**3 / _seconds(functools.partial(torch.mm, a, a), device)
    gflop = 1e-9 * trainer.flops_per_token * trainer.batch_tokens
    own = _own_rate(trainer, DTYPES[precision])
    peak = peak_flops(device)
    return {
        "products_gflop": gflop,
        "precision": precision,
        "square": side,
        "square_gflops": rates,
        "own_shapes_gflops": own,
        "least_ms": 1000 * gflop / rates[precision],
        "own_shapes_least_ms": 1000 * gflop / own,
        "achieved_gflops": 1000 * gflop / step_ms,
        "mfu": None if peak is None else 1e12 * gflop / step_ms / peak,
    }


def _own_rate(trainer: Trainer, dtype: torch.dtype) -> float:
    """GFLOP/s over the three products of every matrix of the model (head included) with a micro-batch's tokens."""
    config, roles, model = trainer.config, trainer.model.roles(), trainer.model
    tokens = int(config.hardware.micro_batch) * config.model.context_length
    untied = "head" in roles.values()
    shapes = Counter(
        tuple(p.shape)
        for name, p in model.named_parameters()
        if p.dim() == 2 and (roles[name] in ("matrix", "head") or (p is model.embedding.weight and not untied))
    )
    flops = seconds = 0.0
    for (out, width), count in shapes.items():
        drawn = [torch.randn(shape, device=trainer.device).to(dtype) for shape in ((tokens, width), (tokens, out), (out, width))]
        x, gradient, weight = drawn
        for a, b in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            seconds += count * _seconds(functools.partial(torch.mm, a, b), trainer.device, share=1 / (3 * len(shapes)))
            flops += 2.0 * count * tokens * out * width
    return 1e-9 * flops / seconds


def _seconds(call: Callable[[], object], device: torch.device, share: float = 2.0) -> float:
    """The shortest time of a call, over `share` of PRODUCT_SECONDS and at least three calls."""
    together = 1 if device.type == "cpu" else 20  # a GPU's queue must not run dry between two
    call()
    synchronise(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) * together < share * PRODUCT_SECONDS:
        started = time.perf_counter()
        for _ in range(together):
            call()
        synchronise(device)
        times.append((time.perf_counter() - started) / together)
    return min(times)


def show(found: dict[str, Any], tokens_per_second: float) -> None:
    """Print the parts of a step, in at most 100 columns."""
    bare = found["bare_step_ms"]
    apart = found["clocks_add"]
    _table("a step by phase", found["phases_ms"], found["phases_share"])
    if abs(apart) > WORTH_SAYING:
        change = f"{100 * abs(apart):.0f} % {'more' if apart > 0 else 'less'}"
        say(f"these steps took {found['clocked_step_ms']:.1f} ms, {change} than without clocks ({bare:.1f} ms)")
    say(f"the update takes {found['update_ms']:.2f} ms, {100 * found['update_share']:.1f} % of a step")
    if found["kinds_ms"]:
        _table("a step by operator", found["kinds_ms"], found["kinds_share"])
        say(f"by torch's profiler, whose steps took {found['profiled_step_ms']:.1f} ms, scaled to the {bare:.1f} ms of one without it")
    else:
        say("torch's profiler does not see the operators of this device")
    _show_limit(found["limit"], bare, tokens_per_second)


def _show_limit(bound: dict[str, Any], bare: float, tokens_per_second: float) -> None:
    gflop, precision, side = bound["products_gflop"], bound["precision"], bound["square"]
    rates = {f"{side} x {side}, {name}": rate for name, rate in bound["square_gflops"].items()}
    rates[f"the model's shapes, {precision}"] = bound["own_shapes_gflops"]
    shown = _columns("matrix products here", "GFLOP/s", "ms a step", "% of it")
    for name, rate in rates.items():
        shown.add_row(name, f"{rate:,.0f}", f"{1000 * gflop / rate:.2f}", f"{100_000 * gflop / rate / bare:.1f}")
    console.print(shown)
    amount = f"{gflop:,.2f}" if gflop < 100 else f"{gflop:,.0f}"
    say(f"a step's {amount} GFLOP of products need at least {bound['least_ms']:.1f} ms of its {bare:.1f} ms in {precision},")
    say(f"and in the model's shapes {bound['own_shapes_least_ms']:.1f} ms")
    used = f"{100 * bound['least_ms'] / bare:.0f} % of what products reach in {precision}"
    if bound["mfu"] is not None:
        used = f"{100 * bound['mfu']:.1f} % of this GPU's bf16 peak (MFU)"
    say(f"the whole step makes {bound['achieved_gflops']:,.0f} GFLOP/s, {used}, {tokens_per_second:,.0f} tokens/s")


def _table(title: str, milliseconds: dict[str, float], shares: dict[str, float]) -> None:
    shown = _columns(title, "ms", "%")
    for name, value in milliseconds.items():
        shown.add_row(name, f"{value:.2f}", f"{100 * shares[name]:.1f}")
    shown.add_section()
    shown.add_row("together", f"{sum(milliseconds.values()):.2f}", f"{100 * sum(shares.values()):.1f}")
    console.print(shown)


def _columns(title: str, *numbers: str) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column(title, min_width=26)
    for name in numbers:
        shown.add_column(name, justify="right", min_width=9)
    return shown
