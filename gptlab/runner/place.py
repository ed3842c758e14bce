"""Addresses of mirrors: a plain folder, or anything fsspec knows. Below one lies STUDY/RUN/, laid out as the run's own directory."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import split_protocol, url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from fsspec.registry import get_filesystem_class, known_implementations  # type: ignore[import-untyped]

from gptlab.config.errors import CheckpointError, ConfigError
from gptlab.config.registry import suggest
from gptlab.runner.checkpoint import MANIFEST
from gptlab.runner.guard import BATCHES

ENDS = ("done.json", "failed.json")  # what became of a run: copied behind its last checkpoint
FOLDERS = ("samples", BATCHES)
_SMALL = (".json", ".jsonl", ".txt")  # the endings of the files that lie directly in a run's directory and belong to it
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko"}
_PACKAGES |= {"abfs": "adlfs", "az": "adlfs", "smb": "smbprotocol", "oci": "ocifs", "webhdfs": "requests"}
_CANNOT_WRITE = ("http", "https", "github", "git", "data", "zip", "tar", "reference", "jupyter")
_SECRETS = {
    "s3": "in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in ~/.aws/credentials",
    "gs": "in the file that GOOGLE_APPLICATION_CREDENTIALS names",
    "hf": "in HF_TOKEN, or with `hf auth login`",
    "sftp": "in an SSH key of ~/.ssh",
}


def check_url(url: str) -> None:
    """Raise ConfigError where an address cannot be one of a mirror. Asks no network."""
    if not url.strip():
        raise ConfigError("the mirror's address is empty; give a folder, or an address as in s3://BUCKET/FOLDER")
    protocol, rest = split_protocol(url)
    if protocol is None:
        return
    # user:secret@host, but not host:22/a@b
    if re.match(r"[^/@:]*:(?!\d+(/|$))[^@]*@", rest) or re.search(r"[?&][^=]*(sig|token|secret|password|key)[^=]*=", rest, re.IGNORECASE):
        where = _SECRETS.get(protocol, f"in the environment (FSSPEC_{protocol.upper()}_PASSWORD=…)")
        raise ConfigError(f"the mirror's {protocol}:// address holds a secret, which would be written into config.json; it belongs {where}")
    if "::" in url or protocol in _CANNOT_WRITE:
        raise ConfigError(f"the mirror's address {url} cannot be written to; give a folder, s3://, gs:// or hf://")
    try:
        get_filesystem_class(protocol)
    except ValueError as error:
        near = suggest(protocol, known_implementations)
        raise ConfigError(
            f"the mirror's address {url}: no such protocol as {protocol}://{near}; a folder, s3, gs and hf are usual"
        ) from error
    except ImportError as error:
        package = _PACKAGES.get(protocol) or error.name or f"the one that fsspec names ({error})"
        raise ConfigError(f"the mirror's address {url} needs the package {package}: pip install {package}") from error


def absolute(url: str) -> str:
    """An address that stays the same wherever it is used: a plain folder becomes an absolute path."""
    return url if split_protocol(url)[0] else os.path.abspath(os.path.expanduser(url))


def reason(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """A filesystem raises whatever its service's package does; here it is an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(reason(error)) from error


@dataclass(frozen=True)
class Place:
    """A folder at an address. Everything may raise OSError."""

    fs: Any
    path: str

    @classmethod
    @_os_errors()
    def of(cls, url: str) -> Place:
        fs, path = url_to_fs(absolute(url))
        return cls(fs, str(path).rstrip("/"))

    def below(self, name: str) -> Place:
        return Place(self.fs, f"{self.path}/{name}")

    @_os_errors()
    def names(self, folder: str = "") -> dict[str, bool]:
        """What lies in a folder: names, and whether each is a folder itself; nothing where there is no folder."""
        path = f"{self.path}/{folder}".rstrip("/")
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(path or self.fs.root_marker, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        entries = ((str(entry["name"]).rstrip("/"), entry["type"] == "directory") for entry in found)
        return {name.rpartition("/")[2]: is_folder for name, is_folder in entries if name.strip("/") != path.strip("/")}

    @_os_errors()
    def read(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self.path}/{name}"))

    @_os_errors()
    def size(self, name: str) -> int | None:
        self.fs.invalidate_cache()
        found = self.fs.size(f"{self.path}/{name}")
        return None if found is None else int(found)

    @_os_errors()
    def put(self, file: Path, name: str) -> None:
        """Copy a file there, piece by piece."""
        folder, _, own = f"{self.path}/{name}".rpartition("/")
        if not self.fs.async_impl:  # those are object stores, which have no folders
            self.fs.makedirs(folder, exist_ok=True)
        if not isinstance(self.fs, LocalFileSystem):
            self.fs.put_file(str(file), f"{folder}/{own}")
            return
        partial = Path(folder) / f".{own}.part"  # a reader of a folder finds the old file or the new one
        try:
            self.fs.put_file(str(file), str(partial))
            with partial.open("rb") as opened:
                os.fsync(opened.fileno())
            partial.replace(Path(folder) / own)
        finally:
            partial.unlink(missing_ok=True)

    @_os_errors()
    def get(self, name: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(f"{self.path}/{name}", str(file))

    @_os_errors()
    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.path}/{name}")

    def remove_checkpoint(self, name: str) -> None:
        """Delete a checkpoint, its manifest first."""
        for file in sorted(self.names(f"checkpoints/{name}"), key=lambda n: n != MANIFEST):
            self.remove(f"checkpoints/{name}/{file}")
        if not self.fs.async_impl:
            with contextlib.suppress(OSError, NotImplementedError):
                self.fs.rmdir(f"{self.path}/checkpoints/{name}")

    def small(self) -> set[str]:
        """The files beside the checkpoints, by their path in the run's directory."""
        found = {n for n, is_folder in self.names().items() if not is_folder and is_small(n)}
        for folder in FOLDERS:
            found |= {f"{folder}/{n}" for n, is_folder in self.names(folder).items() if not is_folder and not n.startswith(".")}
        return found

    def checkpoints(self) -> list[str]:
        """The names of the checkpoints, whole or not, the newest first."""
        return sorted((n for n in self.names("checkpoints") if step_in(n) >= 0), reverse=True)


def is_small(name: str) -> bool:
    return name.endswith(_SMALL) and not name.startswith(".")


def step_in(name: str) -> int:
    """The step of a checkpoint's name; -1 for another name."""
    found = re.fullmatch(r"step-(\d{9})", name)
    return int(found[1]) if found else -1


def plain(name: str, what: str) -> str:
    """A name from elsewhere that may become a file's here. Raises CheckpointError."""
    if not name or name.startswith(".") or re.search(r"[/\\\x00-\x1f]", name):
        raise CheckpointError(f"{what} {name!r} is no plain name: nothing was written")
    return name


def contents(manifest: bytes, where: str) -> dict[str, tuple[int, str]]:
    """The bytes and the sha256 of each file of a manifest. Raises ValueError, or CheckpointError for a name that leads elsewhere."""
    try:
        files = {str(n): (int(f["bytes"]), str(f["sha256"])) for n, f in json.loads(manifest)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no manifest of a checkpoint ({reason(error)})") from error
    if not files or min(size for size, _ in files.values()) < 0:
        raise ValueError("its manifest lists no files")
    for name in files:
        if plain(name, f"{where}: the file") == MANIFEST:
            raise CheckpointError(f"{where} lists itself")
    return files
