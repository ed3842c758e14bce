"""Prepared data: a folder of shards with its manifest and tokeniser, a stream that still grows, or a mix of several of these."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import DataError
from gptlab.config.lock import held, holder
from gptlab.data.shard import FORMAT, TokenStream, manifest_hash
from gptlab.data.synthetic import Task
from gptlab.data.tokenizer import Tokenizer, digest, from_json

MANIFEST, PROGRESS, TOKENIZER = "manifest.json", "progress.json", "tokenizer.json"
POLL_SECONDS = 0.2  # between two looks at a stream that grows
TELL_SECONDS = 10.0, 60.0  # of waiting before it is told, and between two such lines
# A stream is shuffled within stripes, so that training can begin on the first: it is 4 M tokens, then they double up to 128 M.
FIRST_STRIPE, LARGEST_STRIPE = 1 << 22, 1 << 27


@dataclass(frozen=True)
class Prepared:
    """Prepared data. A mix has `parts` with their `weights`; a generated one its `task`; a stream the `limit` of its training tokens."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    limit: int | None = None
    parts: dict[str, Prepared] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    task: Task | None = None
    ensure: Callable[[], None] = lambda: None  # starts what makes a stream grow; raises what stopped it
    packed: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)  # held-out chats as rows, by context
    _streams: dict[str, TokenStream] = field(default_factory=dict, repr=False, compare=False)

    @property
    def hash(self) -> str:
        """SHA-256 of what the data are: the manifest's content, or what a stream is made of and how much of it is used."""
        own = self.manifest
        if self.limit is not None:
            own = own | {"limit": self.limit}
        if self.parts:
            own = own | {"parts": {n: [p.hash, self.weights[n]] for n, p in self.parts.items()}}
        return manifest_hash(own)

    @property
    def vocabulary(self) -> int:
        return int(self.manifest["tokenizer"]["vocabulary"])

    @cached_property
    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """(vocabulary,): the bytes of each token; asked for at every evaluation, and slow to tell for 200,000 tokens."""
        return self.tokenizer.byte_lengths()

    @property
    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = np.dtype(self.manifest["dtype"])
        return found

    @property
    def chat(self) -> bool:
        """Whether it holds chats: documents of which the assistant wrote a part."""
        return "chat" in self.manifest

    @property
    def pairs(self) -> bool:
        """Whether its chats come in pairs, a better answer and a worse one."""
        return bool(self.manifest.get("pairs"))

    def written(self, split: str) -> TokenStream:
        """Of each token of a split of chats 1 where the assistant wrote it, else 0."""
        name = f"{split}.written"
        if name not in self._streams:
            self._streams[name] = TokenStream([(self.folder, self.manifest["written"][split])], np.dtype("<u1"))
        return self._streams[name]

    @property
    def streams_on(self) -> bool:
        """Whether the training text is a stream, read in stripes."""
        return not self.parts and self.task is None and "train" not in self.manifest["splits"]

    @property
    def validation_names(self) -> list[str]:
        """The held-out sets: `val`, then a mix's sources, then those of data.validation."""
        return ["val", *self.parts, *self.extra_sets]

    @property
    def extra_sets(self) -> list[str]:
        """The sets of data.validation."""
        return [name for name in self.manifest["splits"] if name not in ("train", "val")]

    @property
    def held_out(self) -> dict[str, Any]:
        """What pins each held-out set: the hashes of its shards, or a task's own description."""
        if self.task is not None:
            return {"val": self.task.fingerprint()}
        found: dict[str, Any] = {n: [s["sha256"] for s in v["shards"]] for n, v in self.manifest["splits"].items() if n != "train"}
        if self.chat and not self.parts:
            found["val"] = [*found["val"], *(s["sha256"] for s in self.manifest["written"]["val"]["shards"])]
        for name, part in self.parts.items():
            found[name] = part.held_out["val"]
        if self.parts:
            found["val"] = [h for part in self.parts.values() for h in part.held_out["val"]]
        return found

    @cached_property
    def held_out_text(self) -> str | None:
        """SHA-256 of the text of the set `val`, its documents joined by a blank line, whatever the tokeniser; None of a task."""
        if self.task is not None:
            return None
        val = self.stream("val")
        ids = val.window(0, len(val))
        end = self.tokenizer.end_of_text
        documents = [ids] if end is None else np.split(ids, np.flatnonzero(ids == end))
        text = "\n\n".join(self.tokenizer.decode([i for i in part.tolist() if i != end]) for part in documents)
        return hashlib.sha256(text.strip("\n").encode("utf-8", "surrogatepass")).hexdigest()

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split. Raises DataError when there is no such split, or a shard is missing or altered.

        Opened, and its files checked, once: a held-out set is measured again and again.
        """
        if split not in self._streams:
            self._streams[split] = self._open(split)
        return self._streams[split]

    def _open(self, split: str) -> TokenStream:
        if split in self.parts:
            return self.parts[split].stream("val")
        if self.parts and split == "val":
            return TokenStream([(p.folder, p.manifest["splits"]["val"]) for p in self.parts.values()], self.dtype)
        if split == "train" and self.streams_on:
            return GrowingStream(self.folder, self.dtype, self.limit, self.ensure)
        if split not in self.manifest["splits"]:
            raise DataError(f"{self.folder}: there is no set {split!r}; there are {', '.join(self.manifest['splits'])}")
        return TokenStream([(self.folder, self.manifest["splits"][split])], self.dtype)

    @property
    def splits(self) -> list[str]:
        """The sets of a folder of its own: train, val, those of data.validation."""
        return ["train", *(n for n in self.manifest["splits"] if n != "train")]

    def split_counts(self, split: str) -> dict[str, Any]:
        """Tokens, bytes, characters, documents, and what was skipped and removed of a split, as far as it is written."""
        if split == "train" and self.streams_on:
            found: dict[str, Any] = read_progress(self.folder)["splits"]["train"]
            return found
        counts: dict[str, Any] = self.manifest["splits"][split]
        return counts

    @property
    def broken_rows(self) -> int:
        """Rows of the sources whose text could not be read."""
        parts = self.parts.values() or [self]
        return sum(part.split_counts(split).get("skipped", {}).get("broken", 0) for part in parts if not part.task for split in part.splits)

    def close(self) -> None:
        """Stop what goes on in the background."""
        for part in self.parts.values():
            part.close()
        stop = getattr(self.ensure, "stop", None)
        if stop is not None:
            stop()


class GrowingStream(TokenStream):
    """The training tokens of a stream, as far as they are written: its length grows with each record of the preparation."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], limit: int | None, ensure: Callable[[], None]) -> None:
        self.folder, self.limit, self.ensure = folder, limit, ensure
        self.ended = False
        super().__init__([self._part()], dtype, limit)

    def _part(self) -> tuple[Path, dict[str, Any]]:
        split = read_progress(self.folder)["splits"]["train"]
        self.ended = split["ended"]
        # The last shard and the index may be longer by now than recorded: they are checked by their length alone.
        shards = [dict(s) for s in split["shards"]]
        if shards:
            shards[-1].pop("sha256")
        return self.folder, {**split, "shards": shards, "index": {"file": "train.documents"}}

    @property
    def complete(self) -> bool:
        """Whether all that will ever be used is there."""
        return self.ended or (self.limit is not None and self._length >= self.limit)

    def reach(self, tokens: int) -> int:
        """Wait until so many tokens are there, or the stream is complete; returns how many there are."""
        told = time.monotonic() + TELL_SECONDS[0]
        while self._length < tokens and not self.complete:
            self._refresh()  # first: what was written before a failure is used before the failure is told
            if self._length < tokens and not self.complete:
                self.ensure()
                time.sleep(POLL_SECONDS)
            if time.monotonic() > told:
                told = time.monotonic() + TELL_SECONDS[1]
                print(f"gptlab: waiting for text: {self._length:,} of {tokens:,} tokens are prepared", file=sys.stderr, flush=True)
        return self._length

    def _refresh(self) -> None:
        split = self._part()
        if sum(s["tokens"] for s in split[1]["shards"]) > self._length or self.ended:
            super().__init__([split], self.dtype, self.limit)


def stripes(tokens: int) -> list[int]:
    """The borders of a stream's stripes up to a length: 0, 4 M, 8 M, 16 M … then every 128 M, and the length."""
    found = [0]
    size = FIRST_STRIPE
    while found[-1] < tokens:
        found.append(min(tokens, found[-1] + size))
        size = min(max(size, found[-1]), LARGEST_STRIPE)
    return found


def read_progress(folder: Path) -> dict[str, Any]:
    """How far the preparation of a folder is. Raises DataError if its record cannot be read."""
    file = folder / PROGRESS
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); delete {folder} and run again") from error
    return found


def open_prepared(folder: Path, *, limit: int | None = None, ensure: Callable[[], None] = lambda: None) -> Prepared:
    """Open a prepared folder. Raises DataError when its manifest or tokeniser does not match."""
    file = folder / MANIFEST
    mend = f"delete {folder} and run again"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(f"{file} has format {manifest['format']!r}, this gptlab reads format {FORMAT}; {mend}")
        expected = manifest["tokenizer"]["sha256"]
        if "val" not in manifest["splits"]:
            raise DataError(f"{file} lists the splits {', '.join(manifest['splits']) or 'none'}, and not val; {mend}")
        np.dtype(manifest["dtype"])
        vocabulary, largest = manifest["tokenizer"]["vocabulary"], max(s.get("largest", 0) for s in manifest["splits"].values())
        if largest >= vocabulary:
            raise DataError(f"{file}: the token id {largest} is beyond the model's vocabulary of {vocabulary:,}; {mend}")
        written = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        tokenizer = from_json(written, str(folder / TOKENIZER))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: its manifest or tokeniser cannot be read ({type(error).__name__}: {error}); {mend}") from error
    found = digest(written)
    if found != expected:
        raise DataError(
            f"{folder / TOKENIZER} is {tokenizer.name} with sha256 {found[:12]}…, "
            f"its manifest says {manifest['tokenizer'].get('name')} with {expected[:12]}…; {mend}"
        )
    return Prepared(folder, manifest, tokenizer, limit=limit, ensure=ensure)


def lock_file(folder: Path) -> Path:
    """The lock of a folder's preparation; it lies beside the folder, which may be deleted and made anew."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def preparing(folder: Path) -> Iterator[bool]:
    """Hold the preparation of a folder: True, or False where another process holds it now."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(lock_file(folder)) as mine:
        yield mine


def preparer(folder: Path) -> str | None:
    """Who prepares a folder now; None if nobody does."""
    return holder(lock_file(folder))
