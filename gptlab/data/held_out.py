"""Held-out sets from the user's files: pinned where they are first measured, and kept out of the training text where that is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.schema import DataConfig
from gptlab.data.corpus import file_key, home
from gptlab.data.filter import Filter
from gptlab.data.pipeline import Section, read_section
from gptlab.data.reader import Piece, read_file, text_files
from gptlab.data.shard import file_hash, write_json_safely


def validation_files(config: DataConfig) -> dict[str, list[Path]]:
    """The files of each set of data.validation. Raises ConfigError for a name that is taken or a path that is not there."""
    found = {}
    for name, path in config.validation.items():
        if name in ("train", "val") or "/" in name:
            raise ConfigError(f"data.validation.{name}: choose another name; train and val are taken, and it cannot hold a slash")
        found[name] = text_files(path, f"data.validation.{name}")
    return found


def check_pins(config: DataConfig, files: dict[str, list[Path]]) -> None:
    """Raise DataError when a set is not what it was when it was first measured: losses on it could not be compared."""
    for name, found in files.items():
        pin = _pin_file(name, config.validation[name])
        if not pin.is_file():
            continue
        try:
            pinned = json.loads(pin.read_text(encoding="utf-8"))
            pinned["files"], pinned["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{pin} cannot be read ({type(error).__name__}: {error}); delete it to pin the set anew") from error
        if pinned["files"] != [file_key(f) for f in found] and pinned["sha256"] != (now := _content_hash(found)):
            raise DataError(
                f"data.validation.{name}={config.validation[name]} has moved: its sha256 was {pinned['sha256'][:12]}… when it was first "
                f"measured, and is {now[:12]}…; restore it, give the new text another name, or delete {pin}"
            )


def pin(config: DataConfig, files: dict[str, list[Path]]) -> None:
    """Remember what each set is."""
    for name, found in files.items():
        file = _pin_file(name, config.validation[name])
        keys = [file_key(f) for f in found]
        if not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["files"] != keys:
            write_json_safely(file, {"path": config.validation[name], "files": keys, "sha256": _content_hash(found)})


def _pin_file(name: str, path: str) -> Path:
    key = hashlib.sha256(f"{name}\n{Path(path).expanduser().resolve()}".encode()).hexdigest()[:16]
    return home() / "validation" / f"{name}-{key}.json"


def _content_hash(files: Iterable[Path]) -> str:
    return hashlib.sha256("".join(file_hash(f) for f in files).encode()).hexdigest()


class Files:
    """The files of a set as a corpus."""

    name = "validation"

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def fingerprint(self) -> dict[str, Any]:
        return {"files": [file_key(f) for f in self.files]}

    def pieces(self) -> Iterator[Piece]:
        for file in self.files:
            yield from read_file(file)


def make_filter(config: DataConfig, held_out: dict[str, Section], extra: dict[str, list[Path]]) -> Filter:
    """The filter of a config, with the texts that must stay out of the training text."""
    sets: list[tuple[str, Iterator[str]]] = []
    for name, path in config.filter.benchmarks.items():
        sets.append((name, _documents(p for f in text_files(path, f"data.filter.benchmarks.{name}") for p in read_file(f))))
    if config.filter.validation_overlap:
        sets += [(name, _documents(piece for piece, _, _ in read_section(section))) for name, section in held_out.items()]
        sets += [(name, _documents(Files(files).pieces())) for name, files in extra.items()]
    return Filter(config.filter, sets)


def _documents(pieces: Iterable[Piece]) -> Iterator[str]:
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.last:
            yield "".join(parts)
            parts = []
