"""Where and with what a run was made: versions, sources, hardware."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gptlab.hardware.device import describe

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def source_hash() -> str:
    """Hash of gptlab's own Python files: two runs with the same one were made by the same code."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(_PACKAGE)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def environment(device: torch.device) -> dict[str, Any]:
    """What goes to environment.json. No variable of the environment is copied."""
    packages = ("gptlab", "torch", "numpy", "hydra-core", "omegaconf", "wandb", "tiktoken", "safetensors")
    return {
        "source": source_hash(),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "hardware": describe(device),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def _commit() -> str | None:
    """The git commit of a checkout, marked when files differ from it; None outside one."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_PACKAGE, capture_output=True, text=True, timeout=5, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=_PACKAGE, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + (" with changes" if changes.stdout.strip() else "")
