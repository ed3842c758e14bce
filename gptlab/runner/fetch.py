"""Bring a run back from its mirror, on another machine: the same command resumes it there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from gptlab.config.errors import CheckpointError, ConfigError, GptlabError, IOFailure
from gptlab.config.lock import held
from gptlab.runner import checkpoint
from gptlab.runner.checkpoint import MANIFEST
from gptlab.runner.place import ENDS, FOLDERS, Place, check_url, contents, plain, reason, step_in
from gptlab.runner.run import Run, locked
from gptlab.tracker.console import say


def fetch(url: str, root: Path, *, report: Callable[[str], None] | None = None, force: bool = False, all_checkpoints: bool = False) -> Run:
    """Bring a run back from a mirror to ROOT/STUDY/RUN/: what it wrote down and its newest checkpoint that is whole, or all of them.

    `url` is the run's own address, or one above it that holds a single run. A run that is here already gets what is newer; one that is
    further along here is refused unless `force`, which replaces its checkpoints. `report` is told a line at a time. Nothing that is
    brought is run or unpickled. Raises ConfigError (no run there, several, or further along here), GptlabError (it is being trained
    or fetched), CheckpointError (nothing usable, or a name that leads elsewhere) and IOFailure (network or disk).
    """
    check_url(url)
    tell = report or say
    try:
        place = _only_run(url)
        study, name = (plain(part, f"{url}: the name") for part in ["", "", *place.path.split("/")][-2:])
        run, staging = Run(root / study / name), root / f".{study}-{name}.fetch"  # not where runs are looked for
        staging.mkdir(parents=True, exist_ok=True)
        with held(staging / ".lock") as mine:
            if not mine:
                raise GptlabError(f"{run.directory} is being fetched by another process; wait for it")
            for part in ("checkpoints", *FOLDERS):  # of a fetch that was killed
                shutil.rmtree(staging / part, ignore_errors=True)
            try:
                with locked(run) if run.directory.is_dir() else contextlib.nullcontext():
                    _bring(place, url, run, staging, tell, force, all_checkpoints)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise IOFailure(f"{url} could not be fetched ({reason(error)}); the same command tries again") from error
    _restore_pins(run, tell)
    return run


def _only_run(url: str) -> Place:
    """The one run at an address or below it. Raises ConfigError when there is none, or several."""
    top = Place.of(url)
    found = list(_runs(top, 2))
    if not found:
        raise ConfigError(f"{url} holds no run: there is no config.json in it, nor in its folders' folders; give a mirror's address")
    if len(found) > 1:
        base = url.rstrip("/")
        some = ", ".join(f"{base}/{p.path.removeprefix(top.path).strip('/')}" for p in found[:4]) + (", …" if len(found) > 4 else "")
        raise ConfigError(f"{url} holds {len(found)} runs; give the address of one: {some}")
    return found[0]


def _runs(place: Place, depth: int) -> Iterator[Place]:
    names = place.names()
    if names.get("config.json") is False:
        yield place
    elif depth:
        for name, is_folder in sorted(names.items()):
            if is_folder and not name.startswith("."):
                yield from _runs(place.below(name), depth - 1)


def _bring(place: Place, url: str, run: Run, staging: Path, tell: Callable[[str], None], force: bool, everything: bool) -> None:
    """Download into `staging`, verify, and move into place."""
    good = checkpoint.newest_good(run.checkpoints)
    here, there = step_in(good.name) if good else -1, place.checkpoints()
    if here > max((step_in(name) for name in there), default=-1) >= 0 and not force:
        raise ConfigError(f"{run.directory} is at step {here}, further than {url} at step {step_in(there[0])}; --force takes the latter")
    complaints: list[str] = []
    brought: list[str] = []
    for name in there:
        if not force and step_in(name) <= here and not (everything and not (run.checkpoints / name).is_dir()):
            continue
        wrong = _download(place, name, staging / "checkpoints" / name)
        if wrong is None:
            brought.append(name)
            if not everything:
                break
        else:
            shutil.rmtree(staging / "checkpoints" / name, ignore_errors=True)
            complaints.append(f"{name}: {wrong}")
            tell(f"passed over {complaints[-1]}")
    if not brought and (good is None or force):
        raise CheckpointError(f"{url} has no usable checkpoint ({'; '.join(complaints) or 'none was copied yet'})")
    newest = step_in(brought[0]) if brought else -1
    small = sorted(place.small()) if force or newest > here else []
    for file in small:
        place.get("/".join(plain(part, f"{url}: the file") for part in file.split("/")), staging / file)
    if small and "config" not in (Run(staging).read("config.json") or {}):
        raise CheckpointError(f"{url}: its config.json cannot be read; was it copied whole?")
    if run.directory.is_dir():
        _merge(staging, run, small, brought, force)
    else:
        run.directory.parent.mkdir(exist_ok=True)
        staging.rename(run.directory)
    tell(f"{run.directory}: {f'brought to step {newest}' if newest > here or force else f'nothing newer than step {here} there'}")


def _merge(staging: Path, run: Run, small: list[str], brought: list[str], force: bool) -> None:
    """Move what was brought into a run that is here: metrics before the checkpoints that need them, done.json behind them."""
    if force:
        checkpoint.remove_all(run.checkpoints)
    if small:
        for end in ENDS:
            (run.directory / end).unlink(missing_ok=True)
    checkpoints = [f"checkpoints/{name}" for name in brought]
    for name in (*(f for f in small if f not in ENDS), *checkpoints, *(f for f in small if f in ENDS)):
        target = run.directory / name
        target.parent.mkdir(exist_ok=True)
        if target.is_dir():  # a damaged one of this name
            shutil.rmtree(target)
        (staging / name).replace(target)


def _download(place: Place, name: str, folder: Path) -> str | None:
    """Bring a checkpoint and verify it: what is wrong with it, or None. Raises CheckpointError for names that lead elsewhere."""
    path = f"checkpoints/{name}"
    try:
        manifest = place.read(f"{path}/{MANIFEST}")
        files = contents(manifest, name)
        needed, free = sum(size for size, _ in files.values()), shutil.disk_usage(folder.parents[1]).free
        if needed > free:
            raise IOFailure(
                f"{name} needs {needed:,} bytes and {folder.parents[2]} has {free:,} free; GPTLAB_RUNS=FOLDER puts runs elsewhere"
            )
        for file, (size, _) in files.items():
            if (there := place.size(f"{path}/{file}")) not in (size, None):
                return f"{file} has {there} bytes, not {size}"
            place.get(f"{path}/{file}", folder / file)
        (folder / MANIFEST).write_bytes(manifest)
        if step_in(name) != json.loads(manifest).get("step"):
            return "its manifest is another step's"
        return checkpoint.problem(folder)
    except FileNotFoundError:
        return "it was not copied whole"
    except ValueError as error:
        return str(error)


def _restore_pins(run: Run, tell: Callable[[str], None]) -> None:
    """Pin data sets of the hub to the commits that the run was trained on, where nothing is pinned here: its identity depends on them.

    data.json tells a stream's commit in its manifest, and a mix's in those of its `parts`.
    """
    from gptlab.data import hub

    try:
        config, data = run.read("config.json") or {}, run.read("data.json") or {}
        corpus, manifests = config["config"]["data"]["corpus"], {"": data["manifest"], **data.get("parts", {})}
        wanted = []
        for name, options in corpus.get("sources", {"": corpus}).items():
            fingerprint = manifests.get(name, {}).get("key", {}).get("fingerprint", {})
            if options["name"] == "hub" and fingerprint.get("dataset") == options["dataset"]:
                wanted.append((str(options["dataset"]), str(options.get("revision", "")), str(fingerprint["revision"])))
    except (KeyError, TypeError, AttributeError):
        tell(f"{run.directory}: its data.json does not tell what it was trained on; nothing is pinned")
        return
    for dataset, revision, commit in wanted:
        pinned = hub.Hub(dataset=dataset, revision=revision).pin(commit)
        if pinned == commit:
            tell(f"{dataset} is pinned to commit {commit[:12]}, which the run was trained on")
        else:
            tell(f"{dataset} is pinned to {pinned[:12]} here, and the run was trained on {commit[:12]}: delete the pin in $GPTLAB_HOME/hub")
