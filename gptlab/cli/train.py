"""`gptlab train`: hand the arguments to Hydra, train what it composes, and compare what a sweep made."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gptlab.config import compose
from gptlab.config.errors import ConfigError, GptlabError, Pruned, Stopped
from gptlab.config.explain import check_overrides, explain, references_as_text
from gptlab.config.folders import RUNS_TOO, runs_root
from gptlab.config.registry import suggest
from gptlab.config.schema import Config
from gptlab.config.sources import config_dir
from gptlab.config.stages import LAUNCH, OUTCOMES
from gptlab.config.sweep import Sweep, sweep
from gptlab.hardware.world import World, launched, leave
from gptlab.runner.reference import METRIC
from gptlab.runner.run import PICTURE, read_ablation, write_ablation
from gptlab.runner.stop import Requeued
from gptlab.runner.train import train as train_run
from gptlab.study.live import LiveTable
from gptlab.tracker.console import complain, console, say

RERUN, SIZE = "GPTLAB_RERUN", "GPTLAB_LAUNCH_SIZE"
MULTIRUN = {"-m", "--multirun"}


def train(arguments: Sequence[str], *, conclude: bool = True) -> int:
    """Run `gptlab train ARGUMENTS`; returns the exit code. Raises GptlabError for a single run that failed.

    `conclude`: compare a sweep's arms at its end.
    """
    own, passed = _own_options(references_as_text(arguments))
    check_overrides(a for a in passed if not a.startswith("-"))
    with contextlib.ExitStack() as stack:
        if "--scratch" in own:
            passed.append("tracker=none")
            stack.enter_context(_scratch())
        if "--rerun" in own:
            stack.enter_context(environment(RERUN, "1"))
        compose.prepare()
        shows_only = any(a in ("-h", "--help", "--hydra-help") or a.startswith(("-c", "--cfg", "-i", "--info", "-sc")) for a in passed)
        asked, live = (Sweep(False, None), contextlib.nullcontext()) if shows_only else _expect(passed, stack)
        outcomes = stack.enter_context(_launch_folder(runs_root() / ".launch" if asked.elsewhere else None))
        only_overrides = all(_is_override(a) or a in MULTIRUN for a in passed)
        with live:
            _run_hydra(passed, asked.launch if only_overrides else None)
        if any(a in ("-c", "--cfg") or a.startswith("--cfg=") for a in passed):
            print("# components: " + " ".join(compose.chosen([a for a in passed if _is_override(a)])))
        results = _read(outcomes)
        stopped = [r for r in results if r["state"] == "stopped"]
        if stopped:
            raise Stopped(stopped[0]["message"])
        if (launched() or World()).first and asked.stages:
            _after_stages(results)
        elif (launched() or World()).first and (asked.search or (results and results[0]["sweep"])):
            after_sweep(results, conclude=conclude, search=asked.search, study=asked.name or results[0]["study"])
        for result in results:
            if result["code"] and result["sweep"]:
                raise ExitWith("", 1)  # they have been told
            if result["code"]:
                raise ExitWith(result["message"], result["code"], everywhere=result.get("everywhere", False))
        leave()
        return 0


def _expect(passed: Sequence[str], stack: contextlib.ExitStack) -> tuple[Sweep, contextlib.AbstractContextManager[object]]:
    """What is asked for; of a sweep its size is noted, where that is known beforehand, and of arms how they are judged. The table of arms
    to be shown."""
    multirun = bool(MULTIRUN & set(passed))
    asked = sweep([a for a in passed if _is_override(a)], multirun=multirun)
    if asked.size and asked.swept:
        stack.enter_context(environment(SIZE, str(asked.size)))
    if asked.study is None or not (launched() or World()).first:
        return asked, contextlib.nullcontext()
    options = asked.study.options
    labels = [arm.label for arm in asked.study.arms]
    before = read_ablation(asked.name)
    looks = list(options.looks) or before.get("looks", [])  # a study that was looked at by a plan stays one
    sizes = [*before.get("seeds", []), len(asked.study.seeds)]
    told = {"baseline": options.baseline or labels[0], "effect": options.effect, "looks": looks, "arms": labels}
    write_ablation(asked.name, before | told | {"seeds": list(dict.fromkeys(sizes))})
    return asked, LiveTable(asked.name, labels, asked.study.seeds)


def _own_options(arguments: Sequence[str]) -> tuple[set[str], list[str]]:
    """What is ours, and what is Hydra's: options first, since it wants the overrides in one row. Raises ConfigError for neither's."""
    ours = {"--scratch", "--rerun"}
    passed = [a for a in arguments if a not in ours]
    known = [*get_args_parser()._option_string_actions, *ours]
    for argument in passed:
        option = argument.partition("=")[0]
        if option.startswith("--") and not any(k.startswith(option) for k in known):
            raise ConfigError(f"{option} is not an option of gptlab train{suggest(option, known)}; gptlab train --help lists them")
    overrides = [a for a in passed if _is_override(a)]
    return {a for a in arguments if a in ours}, [*(a for a in passed if a not in overrides), *overrides]


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    """Runs go to a temporary folder, which is deleted at the end; after a failure it is kept, with its log."""
    folder = tempfile.mkdtemp(prefix="gptlab-scratch-")
    say((f"scratch runs in {folder}, deleted at the end unless one fails", "dim"))
    try:
        with environment(RUNS_TOO, str(runs_root().resolve())), environment("GPTLAB_RUNS", folder):
            yield
    except BaseException:
        if os.listdir(folder):
            say((f"{folder} is kept", "dim"))
            raise
        shutil.rmtree(folder, ignore_errors=True)  # no run was begun
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set a variable that workers of a sweep inherit."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _launch_folder(shared: Path | None) -> Iterator[Path]:
    """A folder for Hydra's own notes and the outcomes that the tasks of this launch append; gone afterwards. In `shared`, where the tasks'
    machines have no other folder in common with this one."""
    if shared is not None:
        shared.mkdir(parents=True, exist_ok=True)
        shared = shared.resolve()
    folder = Path(tempfile.mkdtemp(prefix="gptlab-launch-", dir=shared))
    try:
        with environment(LAUNCH, str(folder)):
            yield folder / OUTCOMES
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if shared is not None:
            with contextlib.suppress(OSError):  # another launch's
                shared.rmdir()


def _run_hydra(arguments: list[str], launch: Callable[[Callable[[DictConfig], Any]], None] | None) -> None:
    application = hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(task)
    before, sys.argv = sys.argv, ["gptlab train", *arguments]
    try:
        if launch is None:
            application()
        else:
            launch(task)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    except _Leave:
        pass  # its reason is among the outcomes
    except SystemExit as leave:
        # argparse has said what is wrong with an option; --help ends with 0
        if leave.code not in (0, None):
            raise ExitWith("", leave.code if isinstance(leave.code, int) else 2) from None
    finally:
        sys.argv = before


class ExitWith(GptlabError):
    """An exit with a code of its own; an empty message has been said already."""

    def __init__(self, message: str, code: int, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.code, self.everywhere = code, everywhere


class _Leave(BaseException):
    """Ends a sweep at once; not an Exception, so that Hydra lets it pass without a word."""


def task(composed: DictConfig) -> float | None:
    """One job of Hydra's; its held-out loss, for sweepers that choose by it (None: none was measured). In a sweep a failure is recorded
    and the sweep goes on; a signal ends it."""
    compose.prepare()
    job = HydraConfig.get()
    sweep = job.mode == RunMode.MULTIRUN
    overrides = list(job.overrides.task)
    number = int(job.job.num) if sweep else -1
    title = f"{composed.arm}, seed {composed.seed}" if composed.arm else compose.name_of(overrides) or "base"
    state: dict[str, Any] = {"sweep": sweep, "job": number, "title": title, "study": str(composed.study)}
    try:
        config = _side_by_side(compose.to_config(composed, overrides), job.launcher.get("n_jobs"))
        state["title"] = title if config.arm else config.name or title
        title = (f"{number + 1}/{os.environ[SIZE]} " if sweep and SIZE in os.environ else "") + state["title"]
        again, chosen = bool(os.environ.get(RERUN)), compose.settings(overrides)
        outcome = train_run(config, rerun=again, title=title, settings=chosen, overrides=overrides, job=number)
    except Pruned as error:
        _note(state | {"state": "pruned", "code": 0, "message": str(error)})
        say(("–", "yellow"), f" {title}  {error}")
        return None
    except GptlabError as error:
        stopped = isinstance(error, Stopped)
        told = {"code": error.code, "message": str(error), "everywhere": error.everywhere}
        _note(state | told | {"state": "stopped" if stopped else "failed"})
        if stopped and str(job.launcher.get("_target_", "")).endswith("BasicLauncher"):
            raise _Leave from error  # elsewhere the job ends, and the others with it as they get the signal themselves
        if sweep and not stopped:
            say(("✗", "red"), f" {title}  {error}")
        if sweep and (launched() or World()).size > 1 and not error.everywhere:
            raise _Leave from error  # the other ranks wait for this one in the midst of a step: no further job can begin
        return None
    except Requeued:
        raise  # the job has not ended
    except (Exception, SystemExit) as error:  # something outside a run, which has a log of its own
        if not sweep:
            raise
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _note(state | {"state": "failed", "code": 1, "message": message})
        say(("✗", "red"), f" {title}  {message}")
        return None
    _note(state | {"state": outcome.state, "code": outcome.code, "message": outcome.message, "run": outcome.run.identity})
    loss = (outcome.run.read("done.json") or {}).get("summary", {}).get(METRIC)
    return None if loss is None else float(loss)


def _side_by_side(config: Config, processes: int | None) -> Config:
    """Share the cores among the processes of a launcher: threads that outnumber them wait for one another most of the time."""
    cores = os.cpu_count() or 1
    if processes is None or config.hardware.threads:
        return config
    threads = max(1, cores // (processes if processes > 0 else cores))
    return replace(config, hardware=replace(config.hardware, threads=threads))


def _note(result: dict[str, Any]) -> None:
    folder = os.environ.get(LAUNCH)
    if folder:
        with (Path(folder) / OUTCOMES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda r: int(r["job"]))


def _after_stages(results: list[dict[str, Any]]) -> None:
    """Say which runs the last one came through, let it speak, and tell of the stage that failed."""
    from gptlab.cli.lineage import lineage

    made = [r["run"] for r in results if r.get("run")]
    if made:
        say()
        lineage(made[-1], price=0.0, as_json=False)
        say(f"talk to it: gptlab chat {made[-1]}")
    for result in results:
        if result["state"] == "failed":
            complain(f"failed: {result['title']}: {result['message']} (exit {result['code']}); the stages after it were not begun")


def after_sweep(results: list[dict[str, Any]], *, study: str, conclude: bool = True, search: str = "") -> None:
    """Say what the sweep did, compare its arms (of a `search`: what it found), draw them, let the best speak (if it is to `conclude`), and
    tell of each failure."""
    from gptlab.study.compare import compare
    from gptlab.study.report import draw_curves, show

    failed = [r for r in results if r["state"] == "failed"]
    counts = {state: sum(r["state"] == state for r in results) for state in ("done", "skipped", "pruned")}
    pruned = f", {counts['pruned']} given up" if counts["pruned"] else ""
    say(f"\n{len(results)} runs: {counts['done']} trained, {counts['skipped']} skipped{pruned}, {len(failed)} failed")
    if search:
        from gptlab.cli.search import show_search

        show_search(search, study)
    elif conclude and len(failed) < len(results):
        comparison = compare(study)
        show(comparison)
        picture = draw_curves(study, runs_root() / study / PICTURE)
        say(f"\nloss curves: {picture}")
        _speak(study, min(comparison.rows, key=lambda r: r.loss.mean).label)
    for result in failed:
        complain(f"failed: {result['title']}: {result['message']} (exit {result['code']})")


def _speak(study: str, label: str) -> None:
    from gptlab.study.compare import collect

    arm = next(a for a in collect(study)[0] if a.label == label)
    seed = min(arm.runs)
    samples = sorted((arm.runs[seed].directory / "samples").glob("*.txt"))
    if samples:
        say(f"\na sample of the best arm ({label}, seed {seed}), from gptlab sample {arm.runs[seed].identity}:\n")
        console.print(samples[-1].read_text(encoding="utf-8").strip("\n"), markup=False, highlight=False)
