"""The Hugging Face hub: a model brought here, and one sent there."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlab.config.errors import ConfigError, IOFailure

NAME = re.compile(r"[\w.-]+/[\w.-]+")
GPT2 = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def is_name(source: str) -> bool:
    """Whether a source could be a model on the hub."""
    return source in GPT2 or NAME.fullmatch(source) is not None


def fetch(name: str, files: Sequence[str], revision: str | None = None) -> tuple[Path, str]:
    """The folder of a model (in the hub library's own cache; what is there is not fetched again), and its commit.

    Raises ConfigError where there is no such model or revision or it is gated, IOFailure where the hub cannot be reached.
    """
    hub, name = _library(), GPT2.get(name, name)
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        raise _told(error, name, revision) from error
    return folder, folder.name


def push(folder: Path, name: str, *, private: bool) -> str:
    """Send a folder to the hub as the model `name`, which is made where it is not there. Its address.

    Raises ConfigError without an account or the right to write there, IOFailure where the hub cannot be reached.
    """
    hub = _library()
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"--push {name} is no name on the hub: OWNER/MODEL")
    try:
        api = hub.HfApi()
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Exported by gptlab")
    except Exception as error:
        raise _told(error, name, None, writing=True) from error
    return address


def _library() -> Any:
    return importlib.import_module("huggingface_hub")  # datasets brings it


def _told(error: Exception, name: str, revision: str | None, *, writing: bool = False) -> Exception:
    """A sentence for what the hub's library raises."""
    errors = importlib.import_module("huggingface_hub.errors")
    status = getattr(getattr(error, "response", None), "status_code", None)
    at = f"{name}@{revision}" if revision else name
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(f"{at} is gated: ask for access on its page, then `hf auth login` or HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{at}: the hub has no such revision")
    if writing and (status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)):
        return ConfigError(f"--push {name}: the hub does not let this account write there; `hf auth login` or HF_TOKEN gives another")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(f"{at}: the hub has no such model, or only for those with a token (`hf auth login`); nor is it a folder here")
    first: BaseException = error
    while (before := first.__cause__ or first.__context__) is not None:  # the library's own words go round it
        first = before
    said = " ".join(str(first).split())[:150] or type(first).__name__
    return IOFailure(f"{at}: the hub could not be reached ({said}); HF_HUB_OFFLINE=1 takes what was fetched before")
