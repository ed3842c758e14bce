"""From a composed config to a finished run: prepare the data, resolve, find or make the directory, train, write down what became of it."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptlab.config import codec
from gptlab.config.dial import described
from gptlab.config.errors import ConfigError, DivergedError, GptlabError, OutOfMemory, Stopped
from gptlab.config.registry import build
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.hardware.device import device_memory, is_out_of_memory, machine, peak_memory, restored
from gptlab.hardware.load import OtherLoad
from gptlab.hardware.world import ElsewhereFailed, World
from gptlab.model.transformer import meta_model
from gptlab.runner import branch, checkpoint, inherit
from gptlab.runner.environment import environment, source_hash
from gptlab.runner.guard import BATCHES
from gptlab.runner.log import Log, memory_advice
from gptlab.runner.memory import fit_micro_batch
from gptlab.runner.mirror import Mirror
from gptlab.runner.passed import PASSED
from gptlab.runner.place import check_url
from gptlab.runner.resume import resume
from gptlab.runner.run import Run, join_study, locked, make_directory, now, run_of
from gptlab.runner.state import own_randomness
from gptlab.runner.tracked import run_info
from gptlab.runner.trainer import Trainer
from gptlab.tracker.console import PreparationProgress, RunProgress, say
from gptlab.tracker.guard import Guarded
from gptlab.tracker.jsonl import MetricsFile
from gptlab.tracker.none import NoTracker
from gptlab.tracker.protocol import Metrics, Tracker

_LAST: list[weakref.ref[Trainer]] = []  # the trainer of this process's last run: its memory is free before the next begins
MIRROR_SECONDS, STOPPED_MIRROR_SECONDS = 600.0, 60.0  # that the end of a run waits for its mirror


@dataclass(frozen=True)
class Outcome:
    """What became of a run: `state` is done, skipped, stopped or failed; `code` its exit code; `message` a sentence."""

    run: Run
    state: str
    code: int = 0
    message: str = ""


def train(
    config: Config,
    *,
    rerun: bool = False,
    title: str = "",
    settings: dict[str, str] | None = None,
    overrides: Sequence[str] = (),
    job: int = -1,
) -> Outcome:
    """Train a composed config to the end of its budget. `settings` name the run's arm; `overrides`, those of the command line, are noted
    in its study, so that it can be given again.

    The same config again is skipped when it is done, resumed when it stopped, retried from its last good checkpoint when it
    failed; `rerun` starts over. Under torchrun every rank calls this. Raises GptlabError; the run's failed.json then holds the code and
    log.txt the traceback. The process's random generators, threads and warnings are as before afterwards.
    """
    started = time.perf_counter()
    with own_randomness(), restored():
        if _LAST and _LAST.pop()() is not None:  # a failure's traceback, or a component, held it in a circle
            gc.collect()
        composed = resolve(config, machine())
        world = build(composed.hardware.strategy).join()
        _check_model(composed)
        resolved, origin = world.share(lambda: branch.settle(composed))
        with contextlib.closing(_prepare(resolved, world)) as data:
            if config.hardware.micro_batch == "auto":  # what fits depends on the vocabulary, which is known only now
                resolved = _with_fitting_micro_batch(resolved, data, world)
            labels = dict(settings or {}) | ({"trainer.start": str(origin.step)} if origin and settings else {})
            request = _Request(rerun, title or resolved.name or "base", labels, tuple(overrides), job, started, origin)
            try:
                outcome = _find_or_train(resolved, data, world, request)
            except (Stopped, DivergedError, ElsewhereFailed):  # every rank has come to this
                world.wait()  # torchrun ends the others as soon as one has left
                raise
            world.wait()
            return outcome


@dataclass(frozen=True)
class _Request:
    rerun: bool
    title: str
    settings: dict[str, str]
    overrides: tuple[str, ...]
    job: int
    started: float
    origin: branch.Origin | None


def _find_or_train(resolved: Config, data: Prepared, world: World, request: _Request) -> Outcome:
    outside = codec.outside_sources(resolved)
    identity = codec.identity(resolved, data.hash, outside)
    run = world.share(lambda: run_of(resolved, identity))
    origin = request.origin
    arm = branch.arm_of(resolved, data.hash, outside, world.share(lambda: branch.start_arm(run, origin)))

    def join_the_study() -> None:
        join_study(run, resolved, arm=arm, settings=request.settings, overrides=request.overrides, job=request.job)

    def look() -> dict[str, Any] | None:
        done = run.read("done.json")
        if done is not None and not request.rerun:
            if "config" not in (run.read("config.json") or {}):
                run.write("config.json", codec.to_json(resolved))  # somebody deleted or damaged it; it is the same config by its identity
            join_the_study()
        return done

    done = world.share(look)
    if resolved.trainer.mirror:
        check_url(resolved.trainer.mirror)
    if done is not None and not request.rerun:
        if resolved.trainer.mirror and world.first:  # what it still lacks of a run that is done
            missing = Mirror(resolved.trainer.mirror, run).close(MIRROR_SECONDS)
            if missing:
                say((missing, "yellow"))
        return _skip(run, done, request.title, resolved.trainer.resume)
    tracker: Tracker = build(resolved.tracker)
    trainer = _built(resolved, data, run, request.started)  # what cannot be built is said before anything is made
    if origin and world.share(lambda: request.rerun or not checkpoint.checkpoints(run.checkpoints)):
        origin.found = world.share(lambda: branch.check(trainer, origin))
    inherited = None  # the step of the weights it begins with, once they are there
    if resolved.trainer.init_from and world.share(lambda: request.rerun or not checkpoint.checkpoints(run.checkpoints)):
        inherited = inherit.fill(trainer)  # weights that do not fit are told before anything is made, too
    with contextlib.ExitStack() as held:

        def take() -> dict[str, Any] | None:
            make_directory(run)
            held.enter_context(locked(run))
            join_the_study()
            if request.rerun:
                _clear(run)
            return run.read("done.json")

        done = world.share(take)
        if done is not None:  # another process finished it meanwhile
            return _skip(run, done, request.title, resolved.trainer.resume)
        if resolved.trainer.mirror and world.first:
            held.enter_context(_mirrored(trainer, request.rerun))  # outside the log, so that a failure is copied too
        held.enter_context(Log(run, trainer))
        return _train(trainer, Guarded(tracker), request.title, origin, inherited)


def _with_fitting_micro_batch(config: Config, data: Prepared, world: World) -> Config:
    return world.share(lambda: fit_micro_batch(config, data.vocabulary, device_memory(torch.device(config.hardware.device))))


def _check_model(config: Config) -> None:
    """Say what does not fit before text is prepared. What else a component raises is told when the model is really built."""
    try:
        meta_model(config.model, vocabulary=256)
    except GptlabError:
        raise
    except Exception:  # a component that cannot be built without memory
        return


def _built(config: Config, data: Prepared, run: Run, started: float) -> Trainer:
    try:
        made = Trainer(config, data, run, started)
        _LAST.append(weakref.ref(made))
        return made
    except (GptlabError, OSError):
        raise
    except Exception as error:  # a component of the user's may raise anything
        if is_out_of_memory(error):
            raise OutOfMemory(memory_advice(config, data.vocabulary, "the model is built")) from error
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ConfigError(f"the model could not be built: {type(error).__name__}: {error} ({place})") from error


def _prepare(config: Config, world: World) -> Prepared:
    def prepared() -> Prepared:
        with PreparationProgress() as progress:
            return prepare(config.data, report=progress.update, background=True)

    if world.size == 1:
        return prepared()

    def first() -> None:  # the others find what rank 0 has made; on another machine the first to come makes it
        prepared().close()

    world.share(first, patient=True)
    found = prepared()
    world.wait(patient=True)
    return found


def _skip(run: Run, done: dict[str, Any], title: str, resume_from: str) -> Outcome:
    other = "" if done.get("source") == source_hash() else f" by other gptlab sources ({done.get('source')})"
    loss = float(done["summary"].get("val/loss", "nan"))
    say(("✓", "green"), f" {title}  val {loss:.4f}  ", (f"done {done['finished']}{other}, skipped", "dim"))
    if resume_from != "latest":
        say((f"  trainer.resume={resume_from} means nothing to a run that is done; --rerun trains it from its beginning", "yellow"))
    return Outcome(run, "skipped", message=f"done {done['finished']}{other}")


def _clear(run: Run) -> None:
    for name in ("done.json", "failed.json", "metrics.jsonl", PASSED, *(f.name for f in run.directory.glob("log*.txt"))):
        (run.directory / name).unlink(missing_ok=True)
    shutil.rmtree(run.directory / BATCHES, ignore_errors=True)
    checkpoint.remove_all(run.checkpoints)


def _train(trainer: Trainer, tracker: Tracker, title: str, origin: branch.Origin | None, inherited: int | None) -> Outcome:
    config, run, world = trainer.config, trainer.run, trainer.world
    if world.first:
        checkpoint.remove_partial(run.checkpoints)
    complaints = resume(trainer)
    if world.first:
        _write_down(trainer)
    for complaint in complaints:
        say((f"passed over {complaint}", "yellow"))
    if complaints and not trainer.state.step:
        say(("no checkpoint is whole: the run begins anew", "yellow"))
    if origin and not trainer.state.step:
        branch.begin(trainer, origin)
    elif config.trainer.init_from and not trainer.state.step:
        inherit.note(trainer, inherit.fill(trainer) if inherited is None else inherited)  # None: there were checkpoints, and none was whole
    _announce(trainer, title)
    if not world.first:
        with RunProgress(title, trainer.steps) as progress, contextlib.closing(trainer.writer):
            trainer.train(None, NoTracker(), progress)
        return Outcome(run, "done")
    logged = max((int(m.get("step", 0)) for m in run.metrics()), default=-1) if trainer.state.step else -1
    info = run_info(run, config, _flat(config, trainer), logged)
    code = 1
    with contextlib.ExitStack() as last:
        metrics = last.enter_context(contextlib.closing(MetricsFile(run.metrics_file, trainer.state.step)))
        tracker.start(info)
        try:
            with contextlib.closing(trainer.writer), RunProgress(title, trainer.steps) as progress, OtherLoad() as others:
                trainer.train(metrics, tracker, progress)
            summary = _summary(trainer) | others.metrics()
            code = 0
            run.write("done.json", {"summary": summary, "finished": now(), "source": source_hash()})
        except GptlabError as error:
            code = error.code
            raise
        finally:
            tracker.finish(_summary(trainer), code)
    loss, rate = summary.get("val/loss", float("nan")), summary["train/tokens_per_second"]
    say(("✓", "green"), f" {title}  val {loss:.4f}  ", (f"{trainer.state.wall:.1f} s, {rate:,.0f} tokens/s", "dim"))
    return Outcome(run, "done", message=f"done in {trainer.state.wall:.1f} s")


@contextlib.contextmanager
def _mirrored(trainer: Trainer, start_over: bool) -> Iterator[None]:
    """Copy what the run makes to its mirror while it is made, and wait for the last of it: briefly where the machine may soon be gone."""
    mirror = Mirror(trainer.config.trainer.mirror, trainer.run, start_over=start_over)
    trainer.writer.after.append(lambda made: mirror.push())
    seconds = STOPPED_MIRROR_SECONDS
    try:
        yield
        seconds = MIRROR_SECONDS
    finally:
        mirror.push()
        missing = mirror.close(seconds)
        if missing:
            say((missing, "yellow"))


def _write_down(trainer: Trainer) -> None:
    """What the run is made of, in its folder."""
    data, run = trainer.data, trainer.run
    run.write("config.json", codec.to_json(trainer.config))
    parts = {"parts": {name: part.manifest for name, part in data.parts.items()}} if data.parts else {}
    held_out = {"held_out": data.held_out, "held_out_text": data.held_out_text}
    run.write("data.json", {"folder": str(data.folder), "hash": data.hash, **held_out, "manifest": data.manifest, **parts})
    run.write("environment.json", environment(trainer.device) | {"ranks": trainer.world.size})
    (run.directory / "tokenizer.json").write_bytes((data.folder / "tokenizer.json").read_bytes())
    (run.directory / "failed.json").unlink(missing_ok=True)


def _announce(trainer: Trainer, title: str) -> None:
    hardware, ranks = trainer.config.hardware, trainer.world.size
    resumed = f", resumed at step {trainer.state.step}" if trainer.state.step else ""
    if trainer.start and trainer.state.step == trainer.start:
        resumed = f", from {trainer.config.trainer.start}"
    context = trainer.config.model.context_length
    parts = trainer.batch_tokens // context // ranks // trainer.micro_batch
    split = f" in micro-batches of {trainer.micro_batch} x {context:,}" if parts > 1 else ""
    line = (
        f"  {title}: {trainer.parameters:,} parameters, {hardware.device}{f' x {ranks}' if ranks > 1 else ''}, {hardware.precision}"
        f"{', compiled' if hardware.compile else ''}, {trainer.batch_tokens:,} tokens a step{split}{resumed}"
    )
    if (dropped := trainer.loader.dropped) is not None:
        line += f"; best_fit packing drops {dropped:.1%} of the text"
    say((line, "dim"))
    if (told := trainer.loader.described) and not trainer.objective.answers_problems:
        say((f"  {told}", "dim"))
    if broken := trainer.data.broken_rows:
        say((f"  {broken:,} row{'s' * (broken > 1)} of the text could not be read and {'are' if broken > 1 else 'is'} left out", "yellow"))
    if trainer.config.model.dial:
        say((f"  {described(trainer.config, trainer.steps)}", "dim"))


def _flat(config: Config, trainer: Trainer) -> dict[str, Any]:
    return codec.flatten(config) | {"parameters": trainer.parameters, "flops_per_token": trainer.flops_per_token}


def _summary(trainer: Trainer) -> Metrics:
    state = trainer.state
    tokens, seconds = (state.timed_tokens, state.timed_seconds) if state.timed_seconds else (state.tokens, state.seconds)
    return trainer.latest | {
        "step": state.step,
        "tokens": state.tokens,
        "flops": state.tokens * trainer.flops_per_token,
        "seconds": state.seconds,
        "wall": state.wall,
        "parameters": trainer.parameters,
        "train/tokens_per_second": tokens / seconds if seconds else 0.0,
        "memory/peak_bytes": peak_memory(trainer.device),
    }
