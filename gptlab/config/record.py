"""`record`: a component tells a number of the training step that it is part of, and the step's line of metrics.jsonl holds it."""

from __future__ import annotations

import math
import re
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError

_NAME = re.compile(r"[a-z0-9_./-]+")
LINE = ("step", "tokens", "flops", "seconds", "wall")  # what every line of metrics.jsonl begins with

_current: dict[str, list[Tensor | float]] | None = None  # of the step that is being made, where its line will be written


def record(name: str, value: Tensor | float) -> None:
    """Add a scalar to this training step's line of metrics.jsonl and of the tracker; `from gptlab import record`.

    For a model part, an objective, an optimizer or a callback (in `before_update`). Of several calls with one name, as in several
    micro-batches, the mean is written; under several ranks that of what rank 0 recorded. A tensor is copied where it lies, without
    its graph, and becomes a number only when the line is written.

    Nothing is done outside of a training step; in a step whose line is not known beforehand to be written (trainer.log_every, and
    the last; a spike, or the end of a run by the clock, is known too late); and in code that torch.compile has compiled, where the
    call leaves no trace in the graph.
    Raises ConfigError for a name with other characters than a-z 0-9 _ . / -, one that the line has already, and for what is no scalar.
    """
    if torch.compiler.is_compiling():  # first, so that no guard of the compiled code looks at what may change with every step
        return
    if _current is None:
        return
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"record({name!r}, …): a name is made of a-z, 0-9, _, ., / and -, as in attention/entropy")
    if name in LINE:
        raise _taken(name)
    _current.setdefault(name, []).append(_scalar(name, value))


def recording() -> bool:
    """Whether `record` would write down what it is given now: for numbers that take work to find."""
    return _current is not None and not torch.compiler.is_compiling()


def _scalar(name: str, value: Any) -> Tensor | float:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ConfigError(f"record({name!r}, …) takes one real number, not a {value.dtype} tensor of shape {tuple(value.shape)}")
        return value.detach().clone()  # a parameter, say, has another value once the line is written
    if not isinstance(value, SupportsFloat):  # as a text is not
        raise ConfigError(f"record({name!r}, …) takes a number or a tensor that holds one, not {type(value).__name__}")
    return float(value)


def _taken(name: str) -> ConfigError:
    return ConfigError(f"record({name!r}, …): every line of metrics.jsonl has a {name} of its own; choose another name")


class Recording:
    """While it is entered, and if `wanted`, `record` collects."""

    def __init__(self, wanted: bool) -> None:
        self._found: dict[str, list[Tensor | float]] | None = {} if wanted else None

    def __enter__(self) -> Recording:
        global _current
        self._outer, _current = _current, self._found
        return self

    def __exit__(self, *error: object) -> None:
        global _current
        _current = self._outer

    def metrics(self, own: dict[str, float | int | str]) -> dict[str, float | int | str]:
        """The mean of what was recorded under each name, beside what the line has already. Every rank calls it; raises ConfigError."""
        told = dict(own)
        for name, values in (self._found or {}).items():
            if name in own:
                raise _taken(name)
            told[name] = _mean([_number(v) for v in values])
        return told


def _number(value: Tensor | float) -> float:
    if isinstance(value, Tensor) and hasattr(value, "full_tensor"):  # an optimizer's, of a sharded parameter
        return float(value.full_tensor())
    return float(value)


def _mean(values: list[float]) -> float:
    # fsum refuses to add inf and -inf
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values) / len(values)
