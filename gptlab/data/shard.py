"""Shards: text tokenised once into memory-mapped little-endian arrays, with a manifest that says what they hold."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import DataError
from gptlab.data.tokenizer import Tokenizer, digest, from_json

FORMAT = 1
SHARD_TOKENS = 100_000_000


@dataclass(frozen=True)
class Prepared:
    """Prepared data: its folder, its manifest, its tokeniser."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest: the data's part in a run's identity."""
        return manifest_hash(self.manifest)

    @property
    def validation_names(self) -> list[str]:
        """The held-out sets: `val`, then those of data.validation."""
        return [name for name in self.manifest["splits"] if name != "train"]

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split. Raises DataError when a shard is missing or altered."""
        return TokenStream(self.folder, self.manifest, split)


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class TokenStream:
    """The tokens of a split as one long array over its shards."""

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        dtype = np.dtype(manifest["dtype"])
        if split not in manifest["splits"]:
            raise DataError(f"{folder}: there is no set {split!r}; there are {', '.join(manifest['splits'])}")
        self._arrays: list[npt.NDArray[Any]] = []
        for shard in manifest["splits"][split]["shards"]:
            file = folder / shard["file"]
            _verify(file, shard, dtype)
            self._arrays.append(np.memmap(file, dtype, "r") if shard["tokens"] else np.zeros(0, dtype))
        self._starts = np.cumsum([0, *(len(a) for a in self._arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def window(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """`length` tokens from `start`, across shards where need be."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[npt.NDArray[Any]] = []
        while length > 0:
            array, offset = self._arrays[first], start - int(self._starts[first])
            part = array[offset : offset + length]
            parts.append(part)
            start, length, first = start + len(part), length - len(part), first + 1
        return np.concatenate(parts).astype(np.int64) if len(parts) > 1 else parts[0].astype(np.int64)


def _verify(file: Path, shard: dict[str, Any], dtype: np.dtype[Any]) -> None:
    if not file.is_file():
        raise DataError(f"{file} is missing; delete {file.parent} and run again to prepare the data anew")
    expected = shard["tokens"] * dtype.itemsize
    if file.stat().st_size != expected:
        raise DataError(f"{file} has {file.stat().st_size:,} bytes, its manifest says {expected:,}; delete {file.parent} and run again")
    found = file_hash(file)
    if found != shard["sha256"]:
        raise DataError(f"{file} has sha256 {found[:12]}…, its manifest says {shard['sha256'][:12]}…; delete {file.parent} and run again")


def file_hash(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def open_prepared(folder: Path) -> Prepared:
    """Open a prepared folder. Raises DataError when its manifest or tokeniser does not match."""
    file = folder / "manifest.json"
    mend = f"delete {folder} and run again"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(f"{file} has format {manifest['format']!r}, this gptlab reads format {FORMAT}; {mend}")
        expected = manifest["tokenizer"]["sha256"]
        if {"train", "val"} - set(manifest["splits"]):
            raise DataError(f"{file} lists the splits {', '.join(manifest['splits']) or 'none'}, not train and val; {mend}")
        np.dtype(manifest["dtype"])
        written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer = from_json(written, str(folder / "tokenizer.json"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: its manifest or tokeniser cannot be read ({type(error).__name__}: {error}); {mend}") from error
    found = digest(written)
    if found != expected:
        raise DataError(
            f"{folder / 'tokenizer.json'} is {tokenizer.name} with sha256 {found[:12]}…, "
            f"its manifest says {manifest['tokenizer'].get('name')} with {expected[:12]}…; {mend}"
        )
    return Prepared(folder, manifest, tokenizer)


class ShardWriter:
    """Appends tokens to shard after shard, hashing as it goes."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shards: list[dict[str, Any]]) -> None:
        self.folder, self.split, self.dtype, self.shards = folder, split, dtype, shards
        self._open()

    def _open(self) -> None:
        self.name = f"{self.split}-{len(self.shards):05d}.bin"
        self.file = (self.folder / self.name).open("wb")
        self.hash, self.tokens = hashlib.sha256(), 0

    def write(self, ids: npt.NDArray[Any]) -> None:
        while len(ids):
            if self.tokens == SHARD_TOKENS:
                self.close()
                self._open()
            part, ids = ids[: SHARD_TOKENS - self.tokens], ids[SHARD_TOKENS - self.tokens :]
            data = part.tobytes()
            self.file.write(data)
            self.hash.update(data)
            self.tokens += len(part)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.shards.append({"file": self.name, "tokens": self.tokens, "sha256": self.hash.hexdigest()})
