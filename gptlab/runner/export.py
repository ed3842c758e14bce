"""A run as one file: its weights in safetensors, its config and tokeniser in the header, and a hash over all of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptlab.config import codec
from gptlab.config.errors import CheckpointError, ConfigError, IOFailure
from gptlab.config.registry import load_components
from gptlab.config.schema import Config
from gptlab.data.tokenizer import Tokenizer, from_json
from gptlab.model.linear import undrawn
from gptlab.model.transformer import Transformer
from gptlab.runner import checkpoint
from gptlab.runner.averages import load_weights
from gptlab.runner.run import Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARK, VERSION, HASH = "gptlab_export", "1", "sha256"  # keys of the header's metadata: what it is, and the hash of all the rest
REQUIRED = ("config", "tokenizer", "step", HASH)


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its size, the model's parameters (a tied matrix once), the step, the held-out loss and its step."""

    file: Path
    bytes: int
    parameters: int
    step: int
    loss: float | None  # the last one measured up to the step
    loss_step: int | None
    weights: str  # trained or average


def export(
    run: Run,
    file: Path | None = None,
    *,
    which: str = "latest",
    weights: str = "default",
    dtype: str = "fp32",
    force: bool = False,
) -> Exported:
    """Write a run's weights, config and tokeniser to one file: `file`, or <the run's folder>.safetensors here. `read_export` reads it.

    `which` checkpoint: latest, best, a step or its folder; `weights`: as `load` takes them, floating-point ones written as `dtype`.
    Raises ConfigError for a setting that means nothing or a file that is there already (unless `force`), CheckpointError when the
    checkpoint is not usable, IOFailure when the file cannot be written; nothing half-made stays.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    file = file or Path(f"{run.directory.resolve().name}.safetensors")
    if file.is_dir():
        raise ConfigError(f"--output {file} is a folder; name a file in it")
    if file.exists() and not force:
        raise ConfigError(f"{file} is there already; --force replaces it, --output FILE writes another")
    load_components()
    config = run.config()
    chosen = checkpoint.choose(run.checkpoints, which)
    tokenizer = _tokenizer(run)
    held, tensors, metric = load_weights(chosen, weights)
    parameters = _parameters(config, int(tokenizer["vocabulary"]), tensors, chosen)
    tensors = {name: cast(name, weight, dtype) for name, weight in tensors.items()}
    step = checkpoint.step_of(chosen)
    measured = [(int(m["step"]), float(m[metric])) for m in run.metrics() if metric in m and int(m["step"]) <= step]
    loss_step, loss = measured[-1] if measured else (None, None)
    metadata = _metadata(run, config, tokenizer)
    metadata |= {"step": str(step), "dtype": dtype, "weights": held}
    metadata |= {} if loss is None else {"val/loss": str(loss), "val/step": str(loss_step)}
    metadata[HASH] = _digest(metadata, tensors)
    _write(file, tensors, metadata)
    return Exported(file, file.stat().st_size, parameters, step, loss, loss_step, held)


def _tokenizer(run: Run) -> dict[str, Any]:
    file = run.directory / "tokenizer.json"
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        from_json(data, str(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    return data


def _parameters(config: Config, vocabulary: int, weights: Mapping[str, Tensor], chosen: Path) -> int:
    """How many parameters the model has, after a check that these weights are all of its state."""
    with undrawn():
        model = Transformer(config.model, vocabulary)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{chosen} does not fit its config.json: {' '.join(str(error).split())[:300]}") from error
    return sum(p.numel() for p in model.parameters())


def cast(name: str, weight: Tensor, dtype: str) -> Tensor:
    if not weight.is_floating_point():
        return weight
    made = weight.to(DTYPES[dtype])
    if dtype == "fp16" and bool((made.isinf() & ~weight.isinf()).any()):
        raise ConfigError(f"--dtype fp16: {name} holds values beyond 65,504, the largest number of fp16; use bf16 or fp32")
    return made


def _metadata(run: Run, config: Config, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """What the header says of the run. `gptlab` and `source`, the version and the hash of the sources, are those that trained it."""
    made = run.read("environment.json") or {}
    return {
        "format": "pt",  # what other libraries that read safetensors ask for
        MARK: VERSION,
        "config": json.dumps(codec.to_json(config)),
        "tokenizer": json.dumps(tokenizer),
        "identity": Run(run.directory.resolve()).identity,
        "gptlab": str((made.get("packages") or {}).get("gptlab", "unknown")),
        "source": str(made.get("source", "unknown")),
    }


def _digest(metadata: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header's texts (less the hash itself) and of every weight: name, dtype, shape, bytes."""
    digest = hashlib.sha256(json.dumps(sorted((k, v) for k, v in metadata.items() if k != HASH)).encode())
    for name in sorted(weights):
        weight = weights[name]
        digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(file: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial, metadata=metadata)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        needed = sum(w.numel() * w.element_size() for w in weights.values())
        raise IOFailure(f"{file} could not be written ({getattr(error, 'strerror', None) or error}); it needs {needed:,} bytes") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_export(file: Path) -> tuple[Config, Tokenizer, dict[str, Tensor], dict[str, str]]:
    """The config, the tokeniser, the weights (on the CPU) and the header's texts of a file that `export` wrote.

    Everything is checked against the file's hash, and nothing of it is run. Raises CheckpointError for a file that is missing,
    damaged or no export of gptlab's, ConfigError for a component that is not registered here.
    """
    load_components()
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            version = metadata.get(MARK)
            weights = {name: opened.get_tensor(name) for name in opened.keys()} if version == VERSION else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is no safetensors file, or damaged ({error})") from error
    if version is None:
        raise CheckpointError(f"{file} is a safetensors file, and none that `gptlab export` wrote: its header holds no config of gptlab's")
    if version != VERSION:
        raise CheckpointError(f"{file}: export version {version!r}; this gptlab reads version {VERSION}")
    missing = [key for key in REQUIRED if key not in metadata]
    if missing or metadata[HASH] != _digest(metadata, weights):
        raise CheckpointError(
            f"{file} is damaged: " + (f"its header lacks {', '.join(missing)}" if missing else "its content does not match its sha256")
        )
    try:
        config = codec.from_json(json.loads(metadata["config"]), f"{file}: config")
        tokenizer = from_json(json.loads(metadata["tokenizer"]), f"{file}: tokenizer")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its config or tokeniser cannot be read ({type(error).__name__}: {error})") from error
    return config, tokenizer, weights, metadata
