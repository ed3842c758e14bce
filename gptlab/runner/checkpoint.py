"""Checkpoints: a folder of safetensors and JSON with a manifest of hashes, written aside and renamed when it is durable.

Loading verifies every hash, falls back to the newest good checkpoint, and runs no code from the artifact.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptlab.config.errors import CheckpointError, IOFailure
from gptlab.data.shard import file_hash
from gptlab.hardware.world import World, reached
from gptlab.runner import sharded

FORMAT = 1
_NAME = re.compile(r"^step-(\d{9})$")
MODEL, STATE, DATA, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
_STATE_KEYS = {"state": {"step"}, "optimizer": {"groups", "scalars"}, "scaler": set[str]()}  # of state.json
# What begins the names of tensors that are not the model's; no module of a model is called so.
OPTIMIZER, CALLBACKS, AVERAGE, OBJECTIVE = BESIDE = ("optimizer.", "callbacks.", "average.", "objective.")


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:09d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def save(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    metrics: Mapping[str, float] | None = None,
    shard: sharded.Shard | None = None,
) -> Path:
    """Write a checkpoint of a step: model weights, the optimizer's tensors, JSON state, and what was measured at the step.

    `shard`: what this rank writes of it, where all ranks write it together and each calls this. The folder gets its final name
    only when every byte is on disk. Raises IOFailure when the disk fails; nothing half-made stays.
    """
    final = folder / checkpoint_name(step)
    temporary, replaced = folder / f".{final.name}.part", folder / f".{final.name}.old.part"
    first = shard is None or shard.world.first
    try:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        if shard is None:
            save_file(dict(model), temporary / MODEL)
            save_file(dict(tensors), temporary / STATE)
            hashes = {f.name: _settled(f) for f in (temporary / MODEL, temporary / STATE)}
        else:
            hashes = _written_together(temporary, {**model, **tensors}, shard)
        if first:
            (temporary / DATA).write_text(json.dumps(state) + "\n", encoding="utf-8")
            hashes[DATA] = _settled(temporary / DATA)
            manifest = {"format": FORMAT, "step": step, "files": dict(sorted(hashes.items())), "metrics": dict(metrics or {})}
            (temporary / MANIFEST).write_text(json.dumps(manifest | {"sha256": _seal(manifest)}, indent=1) + "\n", encoding="utf-8")
            _sync(temporary / MANIFEST)
            if final.exists():  # of the same step, from before it was trained again
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            temporary.rename(final)
            _sync(folder)
        if shard is not None:
            _meet(shard.world)
    except (OSError, SafetensorError) as error:
        raise IOFailure(_unwritten(final, _size(model) + _size(tensors), error)) from error
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
    return final


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, so that it notices damage to itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _settled(file: Path) -> dict[str, Any]:
    _sync(file)
    return {"sha256": file_hash(file), "bytes": file.stat().st_size}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _meet(world: World) -> None:
    with reached("the writing of a checkpoint"):
        dist.barrier(group=world.writers())


def _written_together(folder: Path, tensors: Mapping[str, Tensor], shard: sharded.Shard) -> dict[str, Any]:
    """Every rank writes its file; the hashes of all. Raises IOFailure on every rank when one fails."""
    world = shard.world
    _meet(world)  # the folder is there
    mine: dict[str, Any] | str
    try:
        file = sharded.write(folder, tensors, shard)
        mine = {file.name: _settled(file)} if file else {}
    except (OSError, SafetensorError) as error:
        mine = _unwritten(folder, _size(tensors), error)
    found: list[Any] = [None] * world.size
    with reached("the hashes of a checkpoint"):
        dist.all_gather_object(found, mine, group=world.writers())
    for rank, part in enumerate(found):
        if isinstance(part, str):
            raise IOFailure(f"rank {rank}: {part}")
    return {name: entry for part in found for name, entry in part.items()}


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _unwritten(final: Path, needed: int, error: Exception) -> str:
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in reason
    if not full:
        return f"{final}: the checkpoint could not be written ({reason})"
    free = shutil.disk_usage(final.parent).free
    return (
        f"{final}: the disk is full: the checkpoint needs {needed:,} bytes and {free:,} are free; the older ones are untouched; make room, "
        "or lower callbacks.checkpoint.keep, or move the run with GPTLAB_RUNS"
    )


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((d for d in folder.iterdir() if _NAME.match(d.name)), reverse=True)


def clean(folder: Path, step: int, *, keep: int, keep_every: int = 0, best: bool = False) -> None:
    """Once the checkpoint of `step` is durable, delete all but the newest `keep`, every `keep_every`-th step and the `best` one.

    One that is cut or incomplete does not count among the `keep`. Later steps go too: they are of a past that was gone back on.
    """
    found = checkpoints(folder)
    past = [c for c in found if step_of(c) <= step]
    whole = [c for c in past if problem(c, hashes=False) is None]
    oldest = whole[min(keep, len(whole)) - 1] if whole else None
    stay = {c for c in past if oldest is None or step_of(c) >= step_of(oldest)}
    stay |= {c for c in past if keep_every and step_of(c) % keep_every == 0}
    stay |= {c for c in [best_of(folder, step)] if best and c is not None}
    for old in found:
        if old not in stay:
            shutil.rmtree(old)


def remove_partial(folder: Path) -> None:
    """Delete what a crash left half-made."""
    for partial in folder.glob(".*.part"):
        shutil.rmtree(partial, ignore_errors=True)


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises CheckpointError when it cannot be read."""
    try:
        found = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its manifest cannot be read ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("files"), dict):
        told = found.get("format") if isinstance(found, dict) else found
        raise CheckpointError(f"its manifest has format {told!r}; this gptlab reads {FORMAT}")
    seal = found.pop("sha256", None)  # absent from those of an older gptlab
    if (seal is not None and seal != _seal(found)) or not found.keys() <= {"format", "step", "files", "metrics"}:
        raise CheckpointError("its manifest is not the one that was written (sha256)")
    return found


def problem(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint; None if every file matches its hash. Without `hashes`: its size, which costs nothing."""
    try:
        files = manifest_of(checkpoint)["files"]
    except CheckpointError as error:
        return str(error)
    if DATA not in files or not any(name.endswith(".safetensors") for name in files):
        return "its manifest names no state and no weights"
    strange = sorted(f.name for f in checkpoint.glob("*.safetensors") if f.name not in files)
    if strange:  # a reader of shards would take it for one
        return f"{strange[0]} is not in its manifest"
    with ThreadPoolExecutor(4) as pool:  # hashing runs beside hashing
        return next((p for p in pool.map(lambda item: _file_problem(checkpoint / item[0], item[1], hashes), files.items()) if p), None)


def _file_problem(file: Path, expected: Mapping[str, Any], hashes: bool) -> str | None:
    try:
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file.name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if hashes and file_hash(file) != expected["sha256"]:
            return f"{file.name} is not the file that was written (sha256)"
    except (OSError, KeyError, TypeError) as error:
        return f"{file.name} cannot be checked ({error})"
    return None


def newest_good(folder: Path, complaints: list[str] | None = None) -> Path | None:
    """The newest checkpoint whose hashes all match; None if there is none. What was passed over goes to `complaints`."""
    for checkpoint in checkpoints(folder):
        wrong = problem(checkpoint)
        if wrong is None:
            return checkpoint
        if complaints is not None:
            complaints.append(f"{checkpoint}: {wrong}")
    return None


def best_of(folder: Path, until: float = math.inf) -> Path | None:
    """The checkpoint (`until` a step) with the lowest held-out loss; None if none was measured. Hashes are not looked at."""
    found: list[tuple[float, Path]] = []
    for checkpoint in (c for c in checkpoints(folder) if step_of(c) <= until):
        with contextlib.suppress(CheckpointError):
            loss = manifest_of(checkpoint).get("metrics", {}).get("val/loss")
            if isinstance(loss, float):
                found.append((loss, checkpoint))
    return min(found)[1] if found else None


def lowest_loss(folder: Path, until: float = math.inf) -> float:
    """The held-out loss of the best checkpoint (`until` a step); infinity if there is none."""
    found = best_of(folder, until)
    return math.inf if found is None else float(manifest_of(found)["metrics"]["val/loss"])


def choose(folder: Path, which: str = "latest", complaints: list[str] | None = None) -> Path:
    """A run's checkpoint: `latest` (the newest whose hashes match), `best` (lowest held-out loss), a step, or a folder or its name.

    Raises CheckpointError when it is not there or damaged; of `latest`, when every one is.
    """
    if which == "latest":
        told: list[str] = [] if complaints is None else complaints
        newest = newest_good(folder, told)
        if newest is None:
            raise CheckpointError("; ".join(told) if told else f"{folder} holds no checkpoint")
        return newest
    steps = [str(step_of(c)) for c in checkpoints(folder)]
    if which == "best":
        found = best_of(folder)
        if found is None:
            raise CheckpointError(f"{folder} holds no checkpoint that was measured on held-out text")
    elif which.isdigit():
        found = folder / checkpoint_name(int(which))
        if not found.is_dir():
            raise CheckpointError(f"{folder} holds no checkpoint of step {which}; there are {', '.join(steps) or 'none'}")
    else:
        found = folder / which if _NAME.match(which) else Path(which)
        if not found.is_dir() or found.resolve().parent != folder.resolve():
            there = ", ".join(steps) or "none"
            raise CheckpointError(f"{which} is no checkpoint of this run: give latest, best, one of its steps ({there}) or its folder")
    wrong = problem(found)
    if wrong is not None:
        raise CheckpointError(f"{found}: {wrong}")
    return found


def require_good(folder: Path) -> Path:
    """`newest_good`, or CheckpointError saying what is wrong with each."""
    return choose(folder)


def load_tensors(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's weights and all other tensors, whole, on the CPU. Raises CheckpointError for files that hold no tensors."""
    if not sharded.is_sharded(checkpoint):
        return _tensors(checkpoint / MODEL), _tensors(checkpoint / STATE)
    with _readable(checkpoint):
        whole = sharded.load_whole(checkpoint)
    return {k: v for k, v in whole.items() if not k.startswith(BESIDE)}, {k: v for k, v in whole.items() if k.startswith(BESIDE)}


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights, whole, on the CPU. Raises CheckpointError for files that hold no tensors."""
    return _tensors(checkpoint / MODEL) if not sharded.is_sharded(checkpoint) else load_tensors(checkpoint)[0]


def _tensors(file: Path) -> dict[str, Tensor]:
    with _readable(file):
        return load_file(file)


@contextlib.contextmanager
def _readable(what: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, FileNotFoundError, ValueError) as error:  # the hashes match: somebody wrote it so
        raise CheckpointError(f"{what} is no file of a checkpoint's ({' '.join(str(error).split())[:200]})") from error


def fill(model: nn.Module, weights: Mapping[str, Tensor], where: Path | str) -> None:
    """Give a model its weights. Raises CheckpointError where they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit its config.json: {' '.join(str(error).split())[:300]}") from error


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state. Raises CheckpointError for what gptlab has not written."""
    with _readable(checkpoint / DATA):
        found: dict[str, Any] = json.loads((checkpoint / DATA).read_text(encoding="utf-8"))
        for key, inner in _STATE_KEYS.items():
            if not isinstance(found, dict) or not isinstance(found.get(key), dict) or not inner <= found[key].keys():
                raise ValueError(f"{key} is not as gptlab writes it")
    return found


def remove_all(folder: Path) -> None:
    """Delete every checkpoint of a run."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
