"""From a composed config to a finished run: prepare the data, resolve, find or make the directory, train, write down what became of it."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptlab.config import codec
from gptlab.config.errors import ConfigError, GptlabError, IOFailure, Stopped
from gptlab.config.registry import build
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.hardware.device import machine, peak_memory
from gptlab.model.transformer import meta_model
from gptlab.runner import checkpoint
from gptlab.runner.environment import environment, source_hash
from gptlab.runner.run import Run, join_study, locked, make_directory, now, run_of
from gptlab.runner.trainer import Trainer
from gptlab.tracker.console import PreparationProgress, RunProgress, say
from gptlab.tracker.guard import Guarded, TrackerWarning
from gptlab.tracker.jsonl import MetricsFile
from gptlab.tracker.protocol import Metrics, RunInfo


@dataclass(frozen=True)
class Outcome:
    """What became of a run: `state` is done, skipped, stopped or failed; `code` its exit code; `message` a sentence."""

    run: Run
    state: str
    code: int = 0
    message: str = ""


def train(config: Config, *, rerun: bool = False, title: str = "", settings: dict[str, str] | None = None, job: int = -1) -> Outcome:
    """Train a composed config to the end of its budget.

    The same config again is skipped when it is done, resumed when it stopped, retried from its last good checkpoint when it
    failed; `rerun` starts over. Raises GptlabError; the run's failed.json then holds the code and log.txt the traceback.
    """
    resolved = resolve(config, machine())
    _check_model(resolved)
    with contextlib.closing(_prepare(resolved)) as data:
        return _find_or_train(resolved, data, rerun=rerun, title=title, settings=settings or {}, job=job)


def _find_or_train(resolved: Config, data: Prepared, *, rerun: bool, title: str, settings: dict[str, str], job: int) -> Outcome:
    outside = codec.outside_sources(resolved)
    identity = codec.identity(resolved, data.hash, outside)
    run = run_of(resolved, identity)
    title = title or resolved.name or "base"
    arm = arm_of(resolved, data.hash, outside)
    done = run.read("done.json")
    if done is not None and not rerun:
        if not (run.directory / "config.json").exists():
            run.write("config.json", codec.to_json(resolved))  # somebody deleted it; it is the same config by its identity
        join_study(run, resolved, arm=arm, settings=settings, job=job)
        return _skip(run, done, title)
    trainer = _built(resolved, data, run)  # what cannot be built is said before anything is made
    make_directory(run)
    with locked(run), _Log(run):
        join_study(run, resolved, arm=arm, settings=settings, job=job)
        if rerun:
            _clear(run)
        elif (done := run.read("done.json")) is not None:  # another process finished it meanwhile
            return _skip(run, done, title)
        return _train(trainer, title)


def _check_model(config: Config) -> None:
    """Say what does not fit before text is prepared. What else a component raises is told when the model is really built."""
    try:
        meta_model(config.model, vocabulary=256)
    except GptlabError:
        raise
    except Exception:  # a component that cannot be built without memory
        return


def _built(config: Config, data: Prepared, run: Run) -> Trainer:
    try:
        return Trainer(config, data, run)
    except (GptlabError, OSError):
        raise
    except Exception as error:  # a component of the user's may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ConfigError(f"the model could not be built: {type(error).__name__}: {error} ({place})") from error


def arm_of(config: Config, manifest_hash: str, outside: dict[str, str]) -> str:
    """What all seeds of an arm share: the identity with every seed at 0."""
    seedless = replace(config, seed=0, seeds=replace(config.seeds, init=0, data=0, dropout=0))
    return codec.identity(seedless, manifest_hash, outside)


def _prepare(config: Config) -> Prepared:
    with PreparationProgress() as progress:
        return prepare(config.data, report=progress.update, background=True)


def _skip(run: Run, done: dict[str, Any], title: str) -> Outcome:
    other = "" if done.get("source") == source_hash() else f" by other gptlab sources ({done.get('source')})"
    loss = float(done["summary"].get("val/loss", "nan"))
    say(("✓", "green"), f" {title}  val {loss:.4f}  ", (f"done {done['finished']}{other}, skipped", "dim"))
    return Outcome(run, "skipped", message=f"done {done['finished']}{other}")


def _clear(run: Run) -> None:
    for name in ("done.json", "failed.json", "metrics.jsonl", "log.txt"):
        (run.directory / name).unlink(missing_ok=True)
    checkpoint.remove_all(run.checkpoints)


class _Log:
    """Writes a failure to the run's log.txt and failed.json, warnings to log.txt, and passes every exception on."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> None:
        self._show = warnings.showwarning
        warnings.showwarning = self._warn  # type: ignore[assignment]

    def _warn(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        self._append(f"{category.__name__}: {message} ({filename}:{lineno})\n")
        if issubclass(category, TrackerWarning):
            say((str(message), "yellow"))

    def _append(self, text: str) -> None:
        with (self.run.directory / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{now()} {text}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        warnings.showwarning = self._show
        if error is None or not isinstance(error, Exception):
            return
        if isinstance(error, Stopped):
            self._append(f"{error}\n")
            return
        self._append("".join(traceback.format_exception(kind, error, trace)))
        code = error.code if isinstance(error, GptlabError) else 1
        self.run.write("failed.json", {"code": code, "error": type(error).__name__, "message": str(error), "time": now()})
        if isinstance(error, OSError):
            raise IOFailure(f"{self.run.directory}: {error.strerror or error}; the traceback is in log.txt") from error
        if not isinstance(error, GptlabError):
            first = " ".join(str(error).split())[:300]
            raise GptlabError(f"{type(error).__name__}: {first}; the traceback is in {self.run.directory / 'log.txt'}") from error


def _train(trainer: Trainer, title: str) -> Outcome:
    config, data, run = trainer.config, trainer.data, trainer.run
    complaints = trainer.resume()
    run.write("config.json", codec.to_json(config))
    run.write("data.json", {"folder": str(data.folder), "hash": data.hash, "held_out": data.held_out, "manifest": data.manifest})
    run.write("environment.json", environment(trainer.device))
    (run.directory / "tokenizer.json").write_bytes((data.folder / "tokenizer.json").read_bytes())
    for complaint in complaints:
        say((f"passed over {complaint}", "yellow"))
    (run.directory / "failed.json").unlink(missing_ok=True)
    hardware = config.hardware
    resumed = f", resumed at step {trainer.state.step}" if trainer.state.step else ""
    line = (
        f"  {title}: {trainer.parameters:,} parameters, {hardware.device}, {hardware.precision}"
        f"{', compiled' if hardware.compile else ''}, {trainer.batch_tokens:,} tokens a step{resumed}"
    )
    if (dropped := trainer.loader.dropped) is not None:
        line += f"; best_fit packing drops {dropped:.1%} of the text"
    say((line, "dim"))
    logged = max((int(m.get("step", 0)) for m in run.metrics()), default=-1) if trainer.state.step else -1
    metrics = MetricsFile(run.metrics_file, trainer.state.step)
    tracker = Guarded(build(config.tracker))
    info = RunInfo(f"{config.study}-{run.identity}", config.study, config.name or "base", run.directory, _flat(config, trainer), logged)
    tracker.start(info)
    code = 1
    try:
        with RunProgress(title, trainer.steps) as progress:
            trainer.train(metrics, tracker, progress)
        summary = _summary(trainer)
        code = 0
        run.write("done.json", {"summary": summary, "finished": now(), "source": source_hash()})
        loss, rate = summary.get("val/loss", float("nan")), summary["train/tokens_per_second"]
        say(("✓", "green"), f" {title}  val {loss:.4f}  ", (f"{trainer.state.wall:.1f} s, {rate:,.0f} tokens/s", "dim"))
        return Outcome(run, "done", message=f"done in {trainer.state.wall:.1f} s")
    except GptlabError as error:
        code = error.code
        raise
    finally:
        metrics.close()
        tracker.finish(dict(trainer.latest), code)


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
