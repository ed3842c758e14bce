"""`gptlab cooldown`: finished models from checkpoints of one run at a constant rate, each with the parent's config but for its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptlab.cli.train import ExitWith, after_sweep
from gptlab.config import compose
from gptlab.config.codec import options_in
from gptlab.config.errors import ConfigError, GptlabError, Stopped
from gptlab.config.explain import check_overrides, explain, wrong_key
from gptlab.config.registry import check_choices, component, load_components
from gptlab.config.resolve import parse_budget
from gptlab.config.schema import Config
from gptlab.config.slots import SLOTS
from gptlab.hardware.device import machine
from gptlab.hardware.world import World, launched, leave
from gptlab.runner import checkpoint
from gptlab.runner.branch import find_parent, step_of
from gptlab.runner.run import Run, members
from gptlab.runner.train import train
from gptlab.tracker.console import say


def cooldown(reference: str, *, at: str, length: str, overrides: Sequence[str], rerun: bool) -> int:
    """Cool a run at each of its steps `at`, for `length` beyond it; returns the exit code. Raises GptlabError."""
    load_components()
    parent = find_parent(reference)
    steps = _steps(parent, at)
    base = changed(_taken_over(parent, length), overrides)
    if base.seed != parent.config().seed:
        raise ConfigError(f"seed={base.seed} differs from the {parent.config().seed} of run {parent.identity}, which goes on: leave it out")
    told = [m["settings"] for m in members(parent.study) if m["identity"] == parent.identity]
    common = {k: v for k, v in (told[-1] if told else {}).items() if k not in ("name", "schedule", "trainer.budget")}
    common |= {"schedule": "cooldown"} | compose.settings(o for o in overrides if not o.startswith("seed"))
    results: list[dict[str, Any]] = []
    for number, step in enumerate(steps):
        start = f"{parent.directory}@{step}"
        name = base.name or f"cooldown,start={parent.identity[:4]}_{step},length={parse_length(length)}"
        config = replace(base, name=name, trainer=replace(base.trainer, start=start))
        title = (f"{number + 1}/{len(steps)} " if len(steps) > 1 else "") + f"cooldown from step {step:,}"
        result: dict[str, Any] = {"job": number, "title": title, "study": config.study, "code": 0, "message": ""}
        try:
            result["state"] = train(config, rerun=rerun, title=title, settings=common | {"trainer.start": start}).state
        except GptlabError as error:
            if len(steps) == 1 or isinstance(error, Stopped) or ((launched() or World()).size > 1 and not error.everywhere):
                raise
            result |= {"state": "failed", "code": error.code, "message": str(error)}
            say(("✗", "red"), f" {title}  {error}")
        results.append(result)
    if len(steps) > 1 and (launched() or World()).first:
        after_sweep(results, study=results[0]["study"])
    if any(r["code"] for r in results):
        raise ExitWith("", 1)  # they have been told
    leave()
    return 0


def _steps(parent: Run, at: str) -> list[int]:
    """The steps that `--at` names: of every checkpoint that is kept (`all`), or a list of steps, `best` and `latest`."""
    if at.strip() == "all":
        found = [checkpoint.step_of(c) for c in checkpoint.checkpoints(parent.checkpoints)]
        if not found:
            raise ConfigError(f"run {parent.identity} keeps no checkpoint to cool from")
    else:
        found = [step_of(parent, word.strip()) for word in at.split(",")]
    return sorted(set(found))


def parse_length(length: str) -> str:
    """`--length` as a budget beyond the start, less its plus. Raises ConfigError for one that `trainer.budget` could not hold."""
    text = length.strip().removeprefix("+")
    try:
        parse_budget(f"+{text}")
    except ConfigError:
        raise ConfigError(f"--length {length} needs an amount and a unit: 20% (of the steps before), 100steps, 1Mtokens or 2min") from None
    return text


def _taken_over(parent: Run, length: str) -> Config:
    """The parent's config, all of it, with another end: cooldown over `length`."""
    config = parent.config()
    ranks = (parent.read("environment.json") or {}).get("ranks", 1)
    micro = config.hardware.micro_batch if ranks == machine().ranks else "auto"  # it divides a rank's rows
    trainer = replace(config.trainer, budget=f"+{parse_length(length)}", resume="latest", profile="")
    schedule = cast(Any, component("schedule", "cooldown").options())
    return replace(config, name="", schedule=schedule, trainer=trainer, hardware=replace(config.hardware, micro_batch=micro))


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """A typed config with values (`trainer.log_every=1`) and components (`tracker=none`) replaced. Raises ConfigError."""
    compose.prepare()
    check_overrides(overrides)
    tree = OmegaConf.structured(config)
    try:
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key, package, value = override.key_or_group, override.package, override.value()
            if override.is_sweep_override() or override.is_delete() or key in ("model", "data", "hardware", "experiment"):
                raise ConfigError(
                    f"{override.input_line}: gptlab cooldown takes single values and components: tracker=none, schedule.shape=sqrt"
                )
            if key in SLOTS:
                OmegaConf.update(tree, package or key.replace("/", "."), component(key, str(value)).options(), merge=False, force_add=True)
            elif OmegaConf.select(tree, key, throw_on_missing=False, default=tree) is tree:
                raise ConfigError(wrong_key(key))
            else:
                OmegaConf.update(tree, key, value)
        with compose.without_environment():
            made = cast(Config, OmegaConf.to_object(tree))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    for path, options in options_in(made):
        check_choices(options, path)
    return made
