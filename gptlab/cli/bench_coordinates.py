"""`gptlab bench coordinates`: do a model's parts move by as much at every width? The coordinate check of muP (Yang et al., 2022)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, component_of
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config
from gptlab.config.slots import Parametrisation
from gptlab.data.loader import Batch, Loader
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.data.sources import training_rows
from gptlab.hardware.device import machine, set_up
from gptlab.model.transformer import Transformer, new_model
from gptlab.optimizer.groups import parameter_groups
from gptlab.tracker.console import console, say

MODEL = "model=dial", "model.context_length=64"  # unless another is named
TOKENS = 512  # of a step
RATE = 0.1  # of the optimizer's rate, as in a warm-up: at the full one a fresh model's first steps are so long that they meet no law
LIMIT = 0.1  # a slope above it grows with the width: by 1.23 from 64 to 512
MOST_SHOWN = 12  # parts of a table

Moved = dict[str, list[float]]  # part -> its mean absolute change since the start, after each step
Slopes = dict[str, list[float]]  # part -> the slope after each step from which on it moves


def coordinates(overrides: Sequence[str], *, widths: str, steps: int, seeds: int, as_json: bool) -> None:
    """Train some steps at each width, with the chosen parametrisation (mup) and with `standard`, and print how the changes grow."""
    chosen = _widths(widths)
    if steps < 1 or seeds < 1:
        raise ConfigError(f"--steps {steps} and --seeds {seeds} must be at least 1")
    picks = any(o.startswith(("model=", "experiment=")) for o in overrides)
    config = resolve(compose([*([] if picks else MODEL), *overrides]), machine())
    own = config.model.parametrisation
    compared: list[Any] = [own if component_of(own).name != "standard" else _options("mup"), _options("standard")]
    data = prepare(config.data)
    found = {component_of(p).name: slopes_of(config, data, p, chosen, steps, range(seeds)) for p in compared}
    if as_json:
        print(json.dumps({"widths": chosen, "steps": steps, "seeds": seeds, "slopes": found}, indent=1))
        return
    _show(found, chosen, steps, seeds)


def _options(name: str) -> Parametrisation:
    options = component("model/parametrisation", name).options()
    assert isinstance(options, Parametrisation)
    return options


def _widths(text: str) -> list[int]:
    try:
        widths = sorted({int(w) for w in text.split(",")})
    except ValueError:
        widths = []
    if len(widths) < 2 or widths[0] < 1:
        raise ConfigError(f"--widths {text} must be at least two whole numbers: 64,128,256,512")
    return widths


def slopes_of(
    config: Config, data: Prepared, parametrisation: Parametrisation, widths: Sequence[int], steps: int, seeds: Sequence[int]
) -> Slopes:
    """Slopes of log2(change) against log2(width), after each step: 0 where a part moves alike at every width, 1/2 or 1 where it does not.

    Changes are means over `seeds`. The heads keep the width that they have in `config` and grow in number.
    Raises ConfigError for a width that these heads do not divide.
    """
    head_width = config.model.width // config.model.heads
    moved: list[list[Moved]] = []
    for width in widths:
        if width % head_width:
            raise ConfigError(f"--widths: heads of {head_width} (model.width / model.heads) do not divide {width}")
        model = replace(config.model, width=width, heads=width // head_width, parametrisation=parametrisation)
        moved.append([changes(replace(config, model=model), data, steps, seed) for seed in seeds])
    slopes: Slopes = {}
    for part in moved[0][0]:
        sizes = [[statistics.mean(of[part][step] for of in of_width) for of_width in moved] for step in range(steps)]
        # A part behind weights that begin at 0 moves from the second step or the third on, and model/ffn=none never.
        moving = [of_step for of_step in sizes if all(size > 0 for size in of_step)]
        if moving:
            x = [math.log2(width) for width in widths]
            slopes[part] = [statistics.linear_regression(x, [math.log2(size) for size in of_step]).slope for of_step in moving]
    return slopes


def changes(config: Config, data: Prepared, steps: int, seed: int) -> Moved:
    """Train `steps` steps in fp32 at a tenth of the optimizer's rate. How far what a part gives for the first batch has moved by each."""
    device, context = set_up(config.hardware), config.model.context_length
    model = new_model(config.model, data.vocabulary, seed).to(device)
    groups = parameter_groups(model, model.roles(), model.widening())
    optimizer: torch.optim.Optimizer = build(config.optimizer, groups=groups, device=device)
    for group in optimizer.param_groups:
        group["lr"] *= RATE
    objective: Callable[[Transformer, Batch], Tensor] = build(config.objective)
    rows = max(1, TOKENS // context)
    loader = Loader(training_rows(data, context, config.data.packing, seed, config.data.too_long), rows, documents=model.sees_documents)
    probe, moved = loader.batch(0).to(device), dict[str, list[float]]()
    start = outputs(model, probe)
    for step in range(steps):
        batch = loader.batch(step).to(device)
        optimizer.zero_grad(set_to_none=True)
        (objective(model.train(), batch) / batch.token_weight).backward()  # type: ignore[no-untyped-call]
        if config.trainer.gradient_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.gradient_clip)
        optimizer.step()
        for part, now in outputs(model, probe).items():
            moved.setdefault(part, []).append(float((now - start[part]).abs().mean()))
    return moved


@torch.no_grad()
def outputs(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    """What each part gives: the embedded tokens, what attention and feed-forward of each block add to the stream, and the logits."""
    found: dict[str, Tensor] = {}
    with _kept(model, found):
        found["logits"] = model.eval()(batch.inputs, document=batch.document).float()
    return found


@contextmanager
def _kept(model: Transformer, found: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, given, out: found.update({name: out.float()})

    parts: dict[str, nn.Module] = {"embedded": model.embedded}
    for layer, block in enumerate(model.blocks):
        parts |= {f"{name} {layer}": part for name, part in block.named_children() if name in ("attention", "ffn")}
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _show(found: dict[str, Slopes], widths: Sequence[int], steps: int, seeds: int) -> None:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("moved since the start", min_width=22)
    for name in found:
        shown.add_column(name, justify="right", min_width=12)
    parts = list(next(iter(found.values())))
    for part in [*parts[: MOST_SHOWN - 1], *parts[MOST_SHOWN - 1 :][-1:]]:
        shown.add_row(part, *(f"{max(slopes[part], key=abs):+.3f}" if part in slopes else "" for slopes in found.values()))
    console.print(shown)
    say(
        (
            f"slope of log2(mean change) against log2(width) over {', '.join(map(str, widths))}: the steepest of {steps} steps, "
            f"{seeds} seed{'s' if seeds > 1 else ''}",
            "dim",
        )
    )
    for name, slopes in found.items():
        growing = [part for part, of in slopes.items() if max(of) > LIMIT]
        what = f"grow with the width: {', '.join(growing)}" if growing else f"nothing grows with the width (no slope above {LIMIT})"
        say((f"{name}: ", "bold"), what)
