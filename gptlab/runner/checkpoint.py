"""Checkpoints: a folder of safetensors and JSON with a manifest of hashes, written aside and renamed when it is durable.

Loading verifies every hash, falls back to the newest good checkpoint, and runs no code from the artifact.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptlab.config.errors import CheckpointError, IOFailure
from gptlab.data.shard import file_hash

FORMAT = 1
_NAME = re.compile(r"^step-(\d{9})$")


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:09d}"


def save(folder: Path, step: int, model: Mapping[str, Tensor], state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint of a step: model weights, JSON state, and the other tensors (optimizer, RNG).

    The folder gets its final name only when every byte is on disk. Raises IOFailure when the disk fails; nothing half-made stays.
    """
    final = folder / checkpoint_name(step)
    temporary = folder / f".{final.name}.{os.getpid()}.part"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in model.items()}, temporary / "model.safetensors")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        files = {}
        for file in sorted(temporary.iterdir()):
            _sync(file)
            files[file.name] = {"sha256": file_hash(file), "bytes": file.stat().st_size}
        manifest = temporary / "manifest.json"
        manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
        _sync(manifest)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except OSError as error:
        raise IOFailure(f"{final}: the checkpoint could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((d for d in folder.iterdir() if _NAME.match(d.name)), reverse=True)


def keep_last(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a crash left half-made."""
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    for partial in folder.glob(".*.part"):
        shutil.rmtree(partial, ignore_errors=True)


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file matches its hash."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')!r}; this gptlab reads {FORMAT}"
    for name, expected in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if file_hash(file) != expected["sha256"]:
            return f"{name} is not the file that was written (sha256)"
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


def require_good(folder: Path) -> Path:
    """`newest_good`, or CheckpointError saying what is wrong with each."""
    complaints: list[str] = []
    found = newest_good(folder, complaints)
    if found is None:
        raise CheckpointError("; ".join(complaints) if complaints else f"{folder} holds no checkpoint")
    return found


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights, on the CPU."""
    return load_file(checkpoint / "model.safetensors")


def load_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON state and the other tensors."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8")), load_file(checkpoint / "state.safetensors")


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state as JSON data and tensors named `optimizer.<parameter>.<key>`."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return {"groups": state["param_groups"], "scalars": scalars}, tensors


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer back what `pack_optimizer` took."""
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in packed["scalars"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": packed["groups"]})


def pack_rng(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_rng(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give torch's generators back what `pack_rng` took."""
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


def remove_all(folder: Path) -> None:
    """Delete every checkpoint of a run."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
