"""A run's identity: stable where nothing changed, different wherever a number could."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from gptlab.config import codec
from gptlab.config.compose import compose
from gptlab.config.registry import component_of, components
from gptlab.config.resolve import Machine, resolve
from gptlab.config.schema import Config
from gptlab.config.slots import Options
from tests.change import transform

DATA = "0" * 64
MACHINE = Machine(devices=("cpu",))
# Computed once. A change here orphans every run on every disk: it needs a very good reason.
GOLDEN = {
    (): "d5528458e8",
    ("model=llama", "data=shakespeare_gpt2", "seed=7", "optimizer=sgd", "schedule=wsd"): "62535cbbcd",
    ("model/attention=window", "trainer.budget=50Mtokens", "hardware.precision=bf16", "seeds.data=3"): "4e62ecbecc",
}

# Written out here and not taken from schema.NOT_IDENTITY: what leaves the identity leaves it on purpose, and in two places.
FREE = ("arm", "model.dial", "hardware.device", "hardware.strategy", "hardware.checkpointing", "objective.chunk",
        "hardware.threads", "hardware.micro_batch", "data.corpus", "data.tokenizer",
        "data.validation_fraction", "data.validation", "data.filter", "tracker", "trainer.log_every",
        "trainer.on_nonfinite", "trainer.max_passed",
        "trainer.log_spikes", "trainer.time_limit", "trainer.resume", "trainer.profile", "trainer.mirror",
        "study", "name", "seed")  # fmt: skip


def _identity(config: Config) -> str:
    return codec.identity(config, DATA, {})


def _resolved(*overrides: str) -> Config:
    return resolve(compose(overrides), MACHINE)


@pytest.mark.parametrize("overrides", GOLDEN, ids=lambda o: " ".join(o) or "default")
def test_golden_identities_stand(overrides: tuple[str, ...]) -> None:
    assert _identity(_resolved(*overrides)) == GOLDEN[overrides]


def _places(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, dataclass that owns the field, value) of every leaf, and of every component."""
    for field in dataclasses.fields(value):
        here, inner = f"{path}.{field.name}".lstrip("."), getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            if isinstance(inner, Options):
                yield here, field, inner
            yield from _places(inner, here)
        elif field.name != "callbacks":
            yield here, field, inner


def _others(path: str, field: Any, value: Any) -> list[Any]:
    if isinstance(value, Options):
        own = component_of(value)
        return [c.options() for c in components(own.slot.path) if c is not own]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value + 0.125, value * 3 + 1e-9]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, dict):
        return [{**value, "another": "x"}]
    if isinstance(value, list):
        return [[*value, 1]]
    assert value is None, f"{path}: teach this test to change a {type(value)}"
    return [1]


def test_each_single_change_changes_the_identity_except_what_cannot_change_the_numbers() -> None:
    config = _resolved("model/attention=multihead", "model/norm=layernorm")
    before, tried, seen = _identity(config), 0, {_identity(config)}
    for path, field, value in _places(config):
        free = any(path == n or path.startswith(n + ".") for n in FREE)
        for other in _others(path, field, value):
            found = _identity(transform(config, path, lambda _, other=other: other))
            tried += 1
            assert (found == before) == free, f"{path}: {value!r} -> {other!r}"
            assert free or found not in seen, f"{path}: another change had this identity"
            seen.add(found)
    assert tried > 60


def test_callbacks_of_a_run_do_not_change_it() -> None:
    config = _resolved()
    changed = copy.deepcopy(config)
    changed.callbacks.pop("samples")
    changed.callbacks["checkpoint"].every = 3  # type: ignore[attr-defined]
    assert _identity(changed) == _identity(config)


def test_a_field_added_later_at_its_default_changes_nothing() -> None:
    config = _resolved()
    model, norm = type(config.model), type(config.model.norm)
    own = component_of(config.model.norm)
    bigger = dataclasses.make_dataclass("Bigger", [("later", int, dataclasses.field(default=3))], bases=(model,), kw_only=True, slots=True)
    options = dataclasses.make_dataclass("More", [("later", int, dataclasses.field(default=3))], bases=(norm,), kw_only=True, slots=True)
    from gptlab.config.registry import _BY_OPTIONS

    _BY_OPTIONS[options] = own
    try:
        values = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(model)}
        values["norm"] = options(**{f.name: getattr(config.model.norm, f.name) for f in dataclasses.fields(norm)})
        assert _identity(dataclasses.replace(config, model=bigger(**values))) == _identity(config)
        assert _identity(dataclasses.replace(config, model=bigger(**values, later=4))) != _identity(config)
    finally:
        del _BY_OPTIONS[options]


def test_data_and_outside_sources_are_part_of_it() -> None:
    config = _resolved()
    assert codec.identity(config, "1" * 64, {}) != _identity(config)
    assert codec.identity(config, DATA, {"model/norm=mine": "a"}) != _identity(config)
    assert codec.identity(config, DATA, {"model/norm=mine": "a"}) != codec.identity(config, DATA, {"model/norm=mine": "b"})
    assert codec.outside_sources(config) == {}


def test_seed_and_its_seeds_are_one_thing() -> None:
    assert _identity(_resolved("seed=5")) == _identity(_resolved("seeds.init=5", "seeds.data=5", "seeds.dropout=5"))
    assert _identity(_resolved("seed=5")) != _identity(_resolved("seed=6"))


def test_the_device_and_the_study_do_not_matter_but_the_precision_does() -> None:
    plain = _identity(_resolved("hardware.precision=fp32"))
    assert _identity(_resolved("hardware.precision=fp32", "study=other", "tracker=none", "hardware.threads=1")) == plain
    gpu = Machine(devices=("cuda", "cpu"), gpu_bf16=True)
    assert _identity(resolve(compose(["hardware.precision=fp32"]), gpu)) == plain
    assert _identity(_resolved("hardware.precision=bf16")) != plain
