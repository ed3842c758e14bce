"""A run on disk: its directory, its identity, its lock, what became of it, and how to find it again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptlab.config import codec
from gptlab.config.errors import ConfigError, GptlabError, IOFailure
from gptlab.config.folders import roots, runs_root
from gptlab.config.lock import held
from gptlab.config.lock import holder as lock_holder
from gptlab.config.registry import suggest
from gptlab.config.schema import Config
from gptlab.tracker.jsonl import read_metrics

ABLATION = "ablation.json"  # in a study's folder: how its arms are to be judged
MEMBERS = "members.jsonl"  # in a study's folder: the runs it compares, wherever they lie
PICTURE = "curves.png"  # beside it: the loss curves of its last sweep
PARENT = "parent.json"  # in a run's folder: whose weights it began with


@dataclass(frozen=True)
class Run:
    """A run's directory and what it holds."""

    directory: Path

    @property
    def identity(self) -> str:
        """The hash its name ends with."""
        return self.directory.name.rpartition("-")[2]

    @property
    def study(self) -> str:
        return self.directory.parent.name

    @property
    def name(self) -> str:
        """What differs from the base: the folder's name less the identity."""
        return self.directory.name.rpartition("-")[0] or "base"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.directory / "metrics.jsonl"

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None if it is not there or cut off."""
        try:
            found: dict[str, Any] = json.loads((self.directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        partial = self.directory / f".{name}.part"
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(partial, self.directory / name)

    def config(self) -> Config:
        """The resolved config. Raises CheckpointError or ConfigError."""
        data = self.read("config.json")
        if data is None:
            raise ConfigError(f"{self.directory} is not a run: it has no readable config.json")
        return codec.from_json(data, str(self.directory / "config.json"))

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.metrics_file)

    @property
    def state(self) -> str:
        """done, failed, running, stopped (it has a checkpoint) or new."""
        if self.read("done.json"):
            return "done"
        if holder(self.directory):
            return "running"
        if self.read("failed.json"):
            return "failed"
        return "stopped" if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()) else "new"


@contextlib.contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold a run for this process. Raises GptlabError, naming the holder, if another has it; a dead holder's lock is free."""
    file = run.directory / ".lock"
    with held(file) as mine:
        if not mine:
            by = file.read_text(encoding="utf-8").strip() or "another process"
            raise GptlabError(f"{run.directory} is being trained by {by}; wait for it or stop it")
        yield


def holder(directory: Path) -> str | None:
    """Who trains a run now; None if nobody does."""
    return lock_holder(directory / ".lock")


def run_of(config: Config, identity: str) -> Run:
    """The run of an identity: where it lies, in whatever study, or where it will. Nothing is made."""
    known = next((r for r in all_runs() if r.identity == identity), None)
    return known or Run(runs_root() / config.study / f"{config.name or 'base'}-{identity}")


def make_directory(run: Run) -> None:
    """Make the run's directory. Raises IOFailure."""
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IOFailure(f"{run.directory} could not be made ({error.strerror}); GPTLAB_RUNS=FOLDER puts runs elsewhere") from error


def join_study(run: Run, config: Config, *, arm: str, settings: dict[str, str], overrides: Sequence[str], job: int) -> None:
    """Note in the study's folder that it compares this run. `arm` names the config less its seeds; `overrides` made it."""
    folder = runs_root() / config.study
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings or {"name": re.sub(r",?seed=\d+", "", config.name)}
    line = {"identity": run.identity, "name": config.name, "arm": arm, "settings": settings, "seed": config.seed, "job": job}
    line |= {"label": config.arm, "overrides": list(overrides), "time": time.time()}
    with (folder / MEMBERS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def members(study: str) -> list[dict[str, Any]]:
    """The runs a study compares, in the order they were first asked for; the last word about each counts."""
    found: dict[str, dict[str, Any]] = {}
    for line in read_metrics(runs_root() / study / MEMBERS):
        first = found.get(line["identity"], line)
        found[line["identity"]] = {**line, "job": first["job"], "time": first["time"]}
    return sorted(found.values(), key=lambda m: (m["time"] if m["job"] < 0 else 0, m["job"], m["time"]))


def write_ablation(study: str, told: dict[str, Any]) -> None:
    """Note how the study's arms are to be judged: which is the baseline, what difference is worth knowing, when it is looked at."""
    folder = runs_root() / study
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{ABLATION}.part"
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / ABLATION)


def read_ablation(study: str) -> dict[str, Any]:
    """What `write_ablation` noted; empty where nothing was, or it is cut off."""
    try:
        found: dict[str, Any] = json.loads((runs_root() / study / ABLATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def all_runs(root: Path | None = None) -> list[Run]:
    """Every run under the root, the oldest first."""
    root = root or runs_root()
    if not root.is_dir():
        return []
    found = [Run(f.parent) for f in root.glob("*/*/config.json")]
    return sorted(found, key=lambda r: ((r.directory / "config.json").stat().st_mtime, r.directory.name))


def studies() -> list[str]:
    """The names of the studies under the root."""
    root = runs_root()
    return sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")) if root.is_dir() else []


def find_run(reference: str) -> Run:
    """A run by directory, identity, unique prefix of identity or name, or `latest`. What is named whole goes before what only begins so.

    Raises ConfigError when none or several match.
    """
    given = Run(Path(reference))
    if "config" in (given.read("config.json") or {}):
        return given
    if (given.directory / "config.json").exists():
        raise ConfigError(f"{given.directory / 'config.json'} cannot be read: the run's own command writes it again, and trains nothing")
    runs = [run for root in reversed(roots()) for run in all_runs(root)]
    if not runs:
        raise ConfigError(f"there are no runs in {runs_root()} yet; `gptlab train` makes one, GPTLAB_RUNS=FOLDER looks elsewhere")
    if reference == "latest":
        return runs[-1]
    matches = [r for r in runs if r.identity == reference]
    matches = matches or [r for r in runs if reference in (r.name, f"{r.study}/{r.name}")]
    matches = matches or [r for r in runs if r.identity.startswith(reference) or r.directory.name.startswith(reference)]
    matches = matches or [r for r in runs if f"{r.study}/{r.directory.name}".startswith(reference)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        some = ", ".join(f"{r.study}/{r.directory.name}" for r in matches[:4]) + (", …" if len(matches) > 4 else "")
        more = "give more of the identity" if len({r.identity for r in matches}) > 1 else "give the directory of one"
        raise ConfigError(f"{reference!r} matches {len(matches)} runs ({some}); {more}")
    known = [word for r in runs for word in (r.identity, r.directory.name, f"{r.study}/{r.name}")]
    raise ConfigError(f"no run matches {reference!r}{suggest(reference, known)}; `gptlab runs list` shows them")


def find_study(name: str) -> str:
    """The study of this name. Raises ConfigError, naming the nearest."""
    known = [study for study in studies() if members(study)]
    if name in known:
        return name
    if not known:
        raise ConfigError(f"there are no studies in {runs_root()} yet; `gptlab train -m … study={name}` makes one")
    raise ConfigError(f"no study is called {name!r}{suggest(name, known)}; there {'is' if len(known) == 1 else 'are'} {', '.join(known)}")


def remove_run(run: Run) -> None:
    """Delete a run that nobody is training."""
    held = holder(run.directory)
    if held:
        raise GptlabError(f"{run.directory} is being trained by {held}; stop it first")
    root, folder = runs_root().resolve(), run.directory.resolve()
    if folder.parent.parent != root:
        raise ConfigError(f"{folder} does not lie in a study below {root}: delete it yourself, or set GPTLAB_RUNS to its runs folder")
    shutil.rmtree(folder)
    known = {r.identity for r in all_runs()}
    if not any(folder.parent.glob("*/config.json")) and not any(m["identity"] in known for m in members(folder.parent.name)):
        for rest in (MEMBERS, ABLATION, PICTURE):  # the study compares nothing any more
            (folder.parent / rest).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something of the user's lies there
            folder.parent.rmdir()


def now() -> str:
    """This moment, in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
