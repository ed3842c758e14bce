"""Shards: text tokenised once into memory-mapped little-endian arrays, with a record that says what they hold."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import DataError, IOFailure

FORMAT = 2
SHARD_TOKENS = 100_000_000
ALWAYS_HASHED = 64 << 20  # bytes; a larger shard is hashed again only when its size or date has changed
OPEN_FILES = 256  # at once: a large corpus has more shards than a process may have files
INDEX_READ = 512  # numbers of an index read at once
Tokens = npt.NDArray[np.int64]


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that a reader, or a power cut, finds the old file or the new one."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as opened:
        json.dump(content, opened, indent=1, ensure_ascii=False)
        opened.write("\n")
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(file)


def write_json_safely(file: Path, content: Any) -> None:
    """The same, for a file beside others that must stay readable: a full disk is one sentence."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError as error:
        raise IOFailure(f"{file} could not be written ({error.strerror or error})") from error


class _File:
    """A file of numbers, as far as it is valid: checked when it is first opened, read in place.

    Read and not mapped: the pages of a map count as memory of the process, two megabytes around every window that is touched,
    and a fault costs more than the call.
    """

    _opened: ClassVar[OrderedDict[int, weakref.ref[_File]]] = OrderedDict()  # those that are open, by id, the latest used last

    def __init__(self, file: Path, dtype: np.dtype[Any], length: int, sha256: str | None) -> None:
        self.file, self.dtype, self.length = file, dtype, length
        _verify(file, length * dtype.itemsize, sha256)
        self._descriptor: int | None = None

    def descriptor(self) -> int:
        """The open file, for reading in place, until the next call of any file's."""
        if self._descriptor is None:
            while len(self._opened) >= OPEN_FILES:
                oldest = next(iter(self._opened.values()))()
                assert oldest is not None  # it leaves when it dies
                oldest.close()
            self._descriptor = os.open(self.file, os.O_RDONLY)
            self._opened[id(self)] = weakref.ref(self)
        self._opened.move_to_end(id(self))
        return self._descriptor

    def close(self) -> None:
        """Close the file until it is read again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._opened.pop(id(self), None)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """`length` numbers from `start`."""
        found = np.empty(length, self.dtype)
        view, at = found.data.cast("B"), start * self.dtype.itemsize
        while len(view):
            count = os.preadv(self.descriptor(), [view], at)
            if count == 0:
                raise DataError(f"{self.file} ends before its place {start + length:,}; it was cut while it was read")
            view, at = view[count:], at + count
        return found


def _verify(file: Path, expected: int, sha256: str | None) -> None:
    """Raise DataError unless the file has its size and its content. `sha256` None: it still grows, and only its size counts."""
    mend = f"delete {file.parent} and run again to prepare the data anew"
    if not file.is_file():
        raise DataError(f"{file} is missing; {mend}")
    status = file.stat()
    if status.st_size != expected and (sha256 is not None or status.st_size < expected):
        raise DataError(f"{file} has {status.st_size:,} bytes, its manifest says {expected:,}; {mend}")
    if sha256 is None:
        return
    mark, content = _seal(file, sha256)
    if expected > ALWAYS_HASHED and mark.is_file() and mark.read_text() == content:
        return
    found = file_hash(file)
    if found != sha256:
        raise DataError(f"{file} has sha256 {found[:12]}…, its manifest says {sha256[:12]}…; {mend}")
    seal(file, sha256)


def _seal(file: Path, sha256: str) -> tuple[Path, str]:
    status = file.stat()
    return file.with_name(f"{file.name}.seen"), f"{status.st_size} {status.st_mtime_ns} {sha256}"


def seal(file: Path, sha256: str) -> None:
    """Note that a large file has this content, so that it is hashed again only when its size or date changes."""
    mark, content = _seal(file, sha256)
    if file.stat().st_size > ALWAYS_HASHED and os.access(file.parent, os.W_OK):
        mark.write_text(content)


def file_hash(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class TokenStream:
    """The tokens of a split as one long array over its shards, and where its documents begin.

    `parts` are (folder, what the manifest says of a split) and are joined; `limit` cuts the end off. Raises DataError when a
    shard is missing or altered.
    """

    def __init__(self, parts: list[tuple[Path, dict[str, Any]]], dtype: np.dtype[Any], limit: int | None = None) -> None:
        self.dtype = dtype
        self._shards: list[_File] = []
        self._documents: list[tuple[int, _File]] = []  # tokens before the part, where its documents begin
        total = 0
        for folder, split in parts:
            index = split["index"]
            self._documents.append((total, _File(folder / index["file"], np.dtype("<u8"), split["documents"], index.get("sha256"))))
            for shard in split["shards"]:
                self._shards.append(_File(folder / shard["file"], dtype, shard["tokens"], shard.get("sha256")))
                total += shard["tokens"]
        self._starts = np.cumsum([0, *(s.length for s in self._shards)])
        self._length = total if limit is None else min(total, limit)

    def __len__(self) -> int:
        return self._length

    def beginning(self, tokens: int) -> TokenStream:
        """The same stream, at most so long."""
        found = copy.copy(self)
        found._length = min(self._length, tokens)
        return found

    def window(self, start: int, length: int) -> Tokens:
        """`length` tokens from `start`, across shards where need be."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[npt.NDArray[Any]] = []
        while length > 0:
            shard, offset = self._shards[first], start - int(self._starts[first])
            parts.append(shard.read(offset, min(length, shard.length - offset)))
            start, length, first = start + len(parts[-1]), length - len(parts[-1]), first + 1
        return np.concatenate(parts).astype(np.int64) if len(parts) > 1 else parts[0].astype(np.int64)

    def windows(self, starts: Tokens, length: int) -> Tokens:
        """Windows of equal length: (n,) first tokens -> (n, length) tokens."""
        found = np.empty((len(starts), length), self.dtype)
        size, width = self.dtype.itemsize, length * self.dtype.itemsize
        view = found.data.cast("B")
        shard = np.searchsorted(self._starts, starts, side="right") - 1
        local = starts - self._starts[shard]
        inside = starts + length <= self._starts[shard + 1]
        for place in np.unique(shard[inside]).tolist():
            here = np.flatnonzero(inside & (shard == place))
            descriptor = self._shards[place].descriptor()
            for row, at in zip((here * width).tolist(), (local[here] * size).tolist(), strict=True):
                if os.preadv(descriptor, (view[row : row + width],), at) != width:
                    raise DataError(f"{self._shards[place].file} was cut while it was read")
        for row in np.flatnonzero(~inside).tolist():  # over the border of a shard
            found[row] = self.window(int(starts[row]), length)
        return found.astype(np.int64)

    def document_starts(self, start: int = 0, end: int | None = None) -> Tokens:
        """The places in [start, end) where a document begins, at the border token before it where there is one."""
        end = self._length if end is None else min(end, self._length)
        found = []
        for before, index in self._documents:
            low, high = (_first_at_least(index, max(place - before, 0)) for place in (start, end))
            found.append(index.read(low, high - low).astype(np.int64) + before)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def documents(self, starts: Tokens, length: int) -> Tokens:
        """For windows as in `windows`: the number of each token's document within its window, (n, length), from 0."""
        found = np.zeros((len(starts), length), np.int64)
        for row, start in enumerate(starts.tolist()):
            borders = self.document_starts(start + 1, start + length) - start
            found[row, borders] = 1
        return found.cumsum(1)


def _first_at_least(index: _File, place: int) -> int:
    """How many of an index's rising numbers are below a place."""
    low, high = 0, index.length
    while high - low > INDEX_READ:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if int(index.read(middle, 1)[0]) < place else (low, middle)
    return low + int(np.searchsorted(index.read(low, high - low), np.uint64(place)))


@dataclass
class SplitState:
    """What has been written of a split: the manifest's entry for it, and where a reader goes on."""

    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    documents: int = 0
    largest: int = 0  # the largest token id
    skipped: dict[str, int] = field(default_factory=dict)  # rows of the source without a text, by reason
    removed: dict[str, int] = field(default_factory=dict)  # documents that a filter took out, by reason
    shards: list[dict[str, Any]] = field(default_factory=list)
    mark: Any = None  # where the source stands; None: at its beginning
    ended: bool = False  # whether there is nothing more

    def entry(self, index: dict[str, Any]) -> dict[str, Any]:
        """The manifest's entry."""
        counts = {n: getattr(self, n) for n in ("tokens", "bytes", "characters", "documents", "largest", "skipped", "removed")}
        return {**counts, "shards": self.shards, "index": index}


class SplitWriter:
    """Appends tokens to shard after shard and document starts to an index, hashing as it goes; goes on from a state.

    What lies in the files behind the state's figures (a kill came between writing and recording) is cut off.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], state: SplitState) -> None:
        self.folder, self.split, self.dtype, self.state = folder, split, dtype, state
        self.index_name = f"{split}.documents"
        self._index, self._index_hash = self._resume(self.index_name, 8 * state.documents)
        last = state.shards[-1] if state.shards else None
        if last is None:
            self._open_next()
        else:  # a full one too: the next is begun when there is something to write
            self._file, self._hash = self._resume(last["file"], last["tokens"] * dtype.itemsize)

    def _resume(self, name: str, size: int) -> tuple[Any, Any]:
        """Open a file for appending behind its first `size` bytes, with the hash of those."""
        file = self.folder / name
        if size and (not file.is_file() or file.stat().st_size < size):
            raise DataError(f"{file} is missing or shorter than the {size:,} bytes recorded; delete {self.folder} and run again")
        opened = file.open("r+b" if size else "w+b")
        opened.truncate(size)
        digest, left = hashlib.sha256(), size
        while left:
            part = opened.read(min(left, 1 << 20))
            digest.update(part)
            left -= len(part)
        opened.seek(size)
        return opened, digest

    def _open_next(self) -> None:
        name = f"{self.split}-{len(self.state.shards):05d}.bin"
        self._file, self._hash = self._resume(name, 0)
        self.state.shards.append({"file": name, "tokens": 0, "sha256": self._hash.hexdigest()})

    def write(self, ids: npt.NDArray[Any], starts: Tokens) -> None:
        """Append tokens, and the places among them where documents begin."""
        places = (starts + self.state.tokens).astype("<u8").tobytes()
        self._index.write(places)
        self._index_hash.update(places)
        self.state.documents += len(starts)
        self.state.tokens += len(ids)
        self.state.largest = max(self.state.largest, int(ids.max(initial=0)))
        while len(ids):
            shard = self.state.shards[-1]
            if shard["tokens"] >= SHARD_TOKENS:
                self._finish()
                self._open_next()
                continue
            part, ids = ids[: SHARD_TOKENS - shard["tokens"]], ids[SHARD_TOKENS - shard["tokens"] :]
            data = part.tobytes()
            self._file.write(data)
            self._hash.update(data)
            shard["tokens"] += len(part)

    def index(self) -> dict[str, Any]:
        """The index file, as the manifest names it."""
        return {"file": self.index_name, "sha256": self._index_hash.hexdigest()}

    def flush(self) -> None:
        """Make what is written durable, so that a record may speak of it."""
        self.state.shards[-1]["sha256"] = self._hash.hexdigest()
        for file in (self._file, self._index):
            file.flush()
            os.fsync(file.fileno())

    def _finish(self) -> None:
        self.flush()
        self._file.close()
        shard = self.state.shards[-1]
        seal(self.folder / shard["file"], shard["sha256"])

    def close(self) -> None:
        self._file.close()
        self._index.close()
