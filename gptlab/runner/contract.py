"""What a component promises, checked: `gptlab components check FILE` for yours, the tests for all of gptlab's own."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from gptlab.config.codec import decode, encode
from gptlab.config.errors import GptlabError, IOFailure
from gptlab.config.registry import Component, build, component_of, has_default
from gptlab.config.slots import Options
from gptlab.data import tokenizer as tokenizers
from gptlab.model.transformer import Transformer, new_model
from gptlab.optimizer.groups import parameter_groups
from gptlab.runner.contract_model import VOCABULARY, Broken, Promise, model_promises, require, same, tiny, tokens

TEXT = "To be, or not to be:\n\tthat is the question. Ünïcode, 日本語, ½ & 🙂.\r\n<|endoftext|>  "


@dataclass(frozen=True)
class Check:
    """One promise: whether it holds, and what there is to say about it."""

    name: str
    passed: bool
    detail: str = ""


def contract(component: Component, options: Options | None = None) -> list[Check]:
    """Check a component with `options` (its defaults, when None). An exception within a check fails that check alone."""
    slot = component.slot.path
    if options is None:
        missing = [f.name for f in fields(component.options) if not has_default(component.options, f.name)]
        if missing:
            return [Check("options", True, f"skipped: no default for {', '.join(missing)}")]
        options = component.options()
    chosen = options
    promises: dict[str, Promise] = {"options": lambda: _options(component, chosen)}
    if slot.startswith("model/"):
        promises |= model_promises(slot.removeprefix("model/"), chosen)
    elif slot == "optimizer":
        promises |= {"descent": lambda: _descent(chosen), "resume": lambda: _resume(chosen)}
    elif slot == "schedule":
        promises |= {"range": lambda: _range(chosen), "continuity": lambda: _continuity(chosen)}
    elif slot == "data/tokenizer" and not getattr(component.factory, "comes_fitted", False):
        promises |= {"round trip": lambda: _round_trip(chosen), "restore": lambda: _restore(chosen)}
    else:
        promises["build"] = lambda: _build(chosen)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it does
    try:
        return [_checked(name, promise) for name, promise in promises.items()]
    finally:
        torch.set_num_threads(threads)


def _checked(name: str, promise: Promise) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex without a compiler says at length that it is slow
            return Check(name, True, promise())
    except (Broken, GptlabError) as error:
        return Check(name, False, str(error))
    except Exception as error:  # whatever a component raises is what the check has to report
        return Check(name, False, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")


def _options(component: Component, options: Options) -> str:
    read = decode(component.slot.base, json.loads(json.dumps(encode(options))), component.slot.path)
    require(read == options, f"written as JSON and read back, {options} became {read}")
    return ""


def _build(options: Options) -> str:
    build(options)
    return ""


def _stepper(options: Options, model: Transformer) -> tuple[Any, Callable[[], float]]:
    """An optimizer for the model, and a function that does one step on one batch and returns the loss before it."""
    optimizer = build(options, groups=parameter_groups(model, model.roles()), device=torch.device("cpu"))

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens()).flatten(0, 1), tokens().roll(-1, 1).flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return optimizer, step


def _descent(options: Options) -> str:
    _, step = _stepper(options, new_model(tiny(), VOCABULARY, seed=0))
    before, after = step(), step()
    require(after < before, f"a step took the loss of its own batch from {before:.4f} to {after:.4f}")
    return ""


def _resume(options: Options) -> str:
    model, other = new_model(tiny(), VOCABULARY, seed=0), new_model(tiny(), VOCABULARY, seed=1)
    optimizer, step = _stepper(options, model)
    step(), step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(model.state_dict())
    resumed, other_step = _stepper(options, other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    step(), other_step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        same(a, b, 0.0, f"{name} after a step of the optimizer and of one with its saved state")
    return ""


def _factors(options: Options) -> Iterator[tuple[float, list[float]]]:
    schedule = build(options, batch_tokens=768, steps=None, start=100)
    for total in (1000, 2000.5, 20_000):
        yield total, [schedule(step, total) for step in range(int(total) + 10)]  # an estimated end may be overrun


def _range(options: Options) -> str:
    for total, values in _factors(options):
        for step, value in enumerate(values):
            require(math.isfinite(value) and 0 <= value <= 1, f"the factor at step {step} of {total} is {value}, not in [0, 1]")
        require(values[0] > 0, "the factor of the first step is 0: its batch is wasted")
    return ""


def _continuity(options: Options) -> str:
    for total, values in _factors(options):
        for step, (value, following) in enumerate(pairwise(values)):
            require(abs(following - value) <= 0.25, f"the factor jumps from {value:.3f} to {following:.3f} after step {step} of {total}")
    return ""


def _fitted(options: Options) -> tokenizers.Tokenizer | str:
    if hasattr(options, "vocabulary") and getattr(component_of(options).factory, "learns", False):
        chosen: Any = options
        options = replace(chosen, vocabulary=300)  # the text is short
    try:
        made: tokenizers.Tokenizer = build(options)
    except IOFailure as error:
        return f"skipped: {error}"
    made.fit([TEXT])
    return made


def _round_trip(options: Options) -> str:
    made = _fitted(options)
    if isinstance(made, str):
        return made
    ids = made.encode(TEXT)
    require(made.decode(ids.tolist()) == TEXT, f"a text encoded and decoded became {made.decode(ids.tolist())!r}")
    require(int(ids.max()) < made.vocabulary, f"an id of {int(ids.max())} with a vocabulary of {made.vocabulary}")
    require(len(made.encode("")) == 0, "the empty text has tokens")
    return ""


def _restore(options: Options) -> str:
    made = _fitted(options)
    if isinstance(made, str):
        return made
    read = tokenizers.from_json(json.loads(json.dumps(tokenizers.to_json(made, options))), "tokenizer")
    require(read.encode(TEXT).tolist() == made.encode(TEXT).tolist(), "the tokeniser read back from its state gives other ids")
    return ""
