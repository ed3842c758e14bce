"""`gptlab ablate --match`: the feed-forward of every arm made as wide as gives it the baseline's parameters, FLOPs or seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gptlab.config.arms import with_overrides
from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of, suggest
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config
from gptlab.config.sweeper import Study
from gptlab.data.prepared import Prepared
from gptlab.hardware.device import machine
from gptlab.model.transformer import count_parameters, flops_per_token, meta_model
from gptlab.runner.forecast import forecast

KINDS = ("params", "flops", "seconds")
KEY = "model.ffn.expansion"
TIMED = 2.0  # seconds that the steps of one size are timed
_TRIES = 40


@dataclass(frozen=True)
class Matched:
    """An arm's new expansion, and by how much it is off what was asked for: a share."""

    label: str
    before: float
    after: float
    off: float


def check_kind(kind: str | None) -> None:
    """Raises ConfigError for what arms cannot be matched in."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--match {kind}: arms can be matched in {', '.join(KINDS)}{suggest(kind, KINDS)}")


def matched(study: Study, kind: str, data: Sequence[Prepared]) -> tuple[Study, list[Matched]]:
    """The study with every arm but the baseline resized, and what was done. Raises ConfigError where an arm has nothing to resize."""
    base = next((i for i, a in enumerate(study.arms) if a.label == study.options.baseline), 0)
    configs = [compose(study.job(arm, study.seeds[0])) for arm in study.arms]
    target = _size(configs[base], data[base], kind)
    arms, told = list(study.arms), []
    for i, (arm, config, text) in enumerate(zip(study.arms, configs, data, strict=True)):
        if i == base:
            continue
        before = getattr(config.model.ffn, "expansion", None)
        if before is None:
            name = component_of(config.model.ffn).name
            raise ConfigError(
                f"--match {kind}: the arm {arm.label!r} has model/ffn={name}, nothing to resize; gelu, relu2, swiglu, geglu can be"
            )

        def size(expansion: float, config: Config = config, text: Prepared = text) -> float:
            return _size(_resized(config, expansion), text, kind)

        unit = getattr(config.model.ffn, "multiple_of", 1) / config.model.width
        after = _solve(size, target, before, unit, rough=kind == "seconds")
        told.append(Matched(arm.label, before, after, size(after) / target - 1))
        arms[i] = replace(arm, overrides=with_overrides(arm.overrides, [f"{KEY}={after:.6g}"]))
    return replace(study, arms=arms), told


def _resized(config: Config, expansion: float) -> Config:
    return replace(config, model=replace(config.model, ffn=replace(config.model.ffn, expansion=expansion)))  # type: ignore[call-arg]


def _size(config: Config, data: Prepared, kind: str) -> float:
    if kind == "seconds":
        made = forecast(config, data, seconds=TIMED)
        if made.seconds is None:
            raise ConfigError("--match seconds: an arm is not forecast to fit, so its steps cannot be timed")
        return made.seconds.step
    model = meta_model(resolve(config, machine()).model, data.vocabulary)
    return float(count_parameters(model)["total"]) if kind == "params" else flops_per_token(model)


def _solve(size: Callable[[float], float], target: float, start: float, step: float, *, rough: bool) -> float:
    """The expansion, in steps of whole hidden units, whose size is nearest the target. Sizes grow with it in a straight line."""
    low, high = start, 2 * start
    at_low, at_high = size(low), size(high)
    if at_high <= at_low:
        raise ConfigError("--match: a wider feed-forward is not larger here, so nothing can be matched by it")
    guess = max(step, round((start + (target - at_low) / (at_high - at_low) * start) / step) * step)
    if rough:  # a timing is too noisy to be refined
        return guess
    best, off = guess, abs(size(guess) - target)
    for _ in range(_TRIES):  # rounding within a component (multiple_of) can move the nearest a little
        near = [e for e in (best - step, best + step) if e > 0]
        closer = min(near, key=lambda e: abs(size(e) - target))
        if abs(size(closer) - target) >= off:
            break
        best, off = closer, abs(size(closer) - target)
    return best
