"""Preparation: from a corpus to shards, once: split, tokenise on every core, write, refuse what overlaps."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptlab.config import codec
from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import build, component_of
from gptlab.config.schema import DataConfig
from gptlab.data.corpus import Corpus, Piece, file_key, home, read_text, text_files
from gptlab.data.shard import FORMAT, Prepared, ShardWriter, TokenStream, open_prepared
from gptlab.data.tokenizer import Tokenizer, digest, to_json

UNIT = 1 << 20  # characters encoded at once
# Where a text may be cut without changing its tokens: before a space between letters, between a letter and a stop, after a
# newline between visible characters (o200k joins a newline and a slash). Holds for gpt2, cl100k and o200k, and a test checks it.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_]|[,.;:!?、。，；：！？…])|(?<=\S\n)(?=[^\s/])")
# What two texts share by chance is short: an overlap is more than a tenth of a set's probes, stretches of so many tokens.
PROBES, PROBE_TOKENS = 1000, 64
Report = Callable[[int, int], None]  # characters done, characters in all


def prepare(config: DataConfig, *, report: Report | None = None, threads: int | None = None) -> Prepared:
    """The prepared data of a config: found in $GPTLAB_HOME, or made now.

    Raises ConfigError, DataError or IOFailure; a half-made folder is never left behind.
    """
    corpus: Corpus = build(config.corpus)
    extra = {name: _validation_files(name, path) for name, path in config.validation.items()}
    try:
        key_of = {
            "format": FORMAT,
            "corpus": corpus.name,
            "fingerprint": corpus.fingerprint(),
            "tokenizer": codec.encode(config.tokenizer),
            "outside": [component_of(o).source_hash() for o in (config.corpus, config.tokenizer)],
            "validation_fraction": config.validation_fraction,
            "validation": {name: [file_key(f) for f in files] for name, files in extra.items()},
        }
    except OSError as error:
        raise IOFailure(f"{error.filename} could not be read ({error.strerror})") from error
    key = hashlib.sha256(json.dumps(key_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = home() / "data" / f"{corpus.name}-{key}"
    if (folder / "manifest.json").is_file():
        return open_prepared(folder)
    tokenizer: Tokenizer = build(config.tokenizer)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            _write(made, corpus, tokenizer, config, extra, report, threads or os.cpu_count() or 1)
            if folder.exists() and not (folder / "manifest.json").exists():
                shutil.rmtree(folder)  # somebody deleted a part of it
            try:
                made.rename(folder)
            except OSError:  # another process made the same folder first: theirs is as good
                if not (folder / "manifest.json").is_file():
                    raise
    except OSError as error:
        raise IOFailure(f"{folder} could not be written ({error.strerror or error})") from error
    return open_prepared(folder)


def _validation_files(name: str, path: str) -> list[Path]:
    if name in ("train", "val") or "/" in name:
        raise ConfigError(f"data.validation.{name}: choose another name; train and val are taken, and it cannot hold a slash")
    found = Path(path).expanduser()
    if not found.exists():
        raise ConfigError(f"data.validation.{name}={path}: there is no such file or folder")
    return text_files(found)


def _write(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: DataConfig,
    extra: dict[str, list[Path]],
    report: Report | None,
    threads: int,
) -> None:
    total = 0

    def counted() -> Iterator[str]:
        nonlocal total
        for text, _ in corpus.pieces():
            total += len(text)
            yield text
        for files in extra.values():
            yield from (text for file in files for text, _ in read_text(file))
        yield tokenizer.separator

    for_fitting = counted()
    tokenizer.fit(for_fitting)
    for _ in for_fitting:  # a tokeniser that has nothing to learn did not read it
        pass
    if total == 0:
        raise DataError(f"data/corpus={corpus.name} holds no text")
    dtype = np.dtype("<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4")
    border = int(total * (1 - config.validation_fraction))
    done = 0

    def tell(characters: int) -> None:
        nonlocal done
        done += characters
        if report:
            report(done, total)

    with ThreadPoolExecutor(threads) as pool:
        splits = {
            "train": _write_split(folder, "train", _between(corpus.pieces(), 0, border), tokenizer, dtype, pool, threads, tell),
            "val": _write_split(folder, "val", _between(corpus.pieces(), border, total), tokenizer, dtype, pool, threads, tell),
        }
        for name, files in extra.items():
            pieces = (piece for file in files for piece in read_text(file))
            splits[name] = _write_split(folder, name, pieces, tokenizer, dtype, pool, threads, tell)
    _refuse_overlap(folder, splits, dtype)
    written = to_json(tokenizer, config.tokenizer)
    manifest = {
        "format": FORMAT,
        "corpus": corpus.name,
        "tokenizer": {"name": written["name"], "vocabulary": tokenizer.vocabulary, "sha256": digest(written)},
        "dtype": dtype.str,
        "between_documents": "text" if tokenizer.end_of_text is None else "end_of_text",
        "splits": splits,
    }
    for name, content in (("tokenizer.json", written), ("manifest.json", manifest)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_overlap(folder: Path, splits: dict[str, Any], dtype: np.dtype[Any]) -> None:
    """Raise DataError when a set of data.validation is trained on: look its probes up in the training tokens."""
    wanted = {name: _probes(folder, split, dtype) for name, split in splits.items() if name not in ("train", "val")}
    if not wanted:
        return
    sought = np.unique(np.concatenate(list(wanted.values())))
    seen = np.zeros(len(sought), bool)
    for tokens in _stretches(folder, splits["train"], dtype):
        here = _window_hashes(tokens)
        place = np.minimum(np.searchsorted(sought, here), len(sought) - 1)
        seen[place[sought[place] == here]] = True
    for name, probes in wanted.items():
        found = seen[np.searchsorted(sought, probes)].mean() if len(probes) else 0.0
        if found > 0.1:
            raise DataError(
                f"data.validation.{name}: {found:.0%} of it stands in the training text too; "
                "a validation set must be text that is not trained on"
            )


def _probes(folder: Path, split: dict[str, Any], dtype: np.dtype[Any]) -> npt.NDArray[np.uint64]:
    """Hashes of up to PROBES stretches of PROBE_TOKENS, spread over a set; a shorter set has none."""
    stream = TokenStream(folder, {"dtype": dtype.str, "splits": {"this": split}}, "this")
    starts = np.unique(np.linspace(0, max(0, len(stream) - PROBE_TOKENS), PROBES, dtype=np.int64))
    if len(stream) < PROBE_TOKENS:
        return np.zeros(0, np.uint64)
    return np.concatenate([_window_hashes(stream.window(int(s), PROBE_TOKENS)) for s in starts])


def _stretches(folder: Path, split: dict[str, Any], dtype: np.dtype[Any]) -> Iterator[npt.NDArray[np.int64]]:
    stream = TokenStream(folder, {"dtype": dtype.str, "splits": {"this": split}}, "this")
    for start in range(0, len(stream) - PROBE_TOKENS + 1, UNIT):
        yield stream.window(start, min(UNIT + PROBE_TOKENS - 1, len(stream) - start))


def _window_hashes(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A hash of each stretch of PROBE_TOKENS (a power of 2), made by joining neighbours of 1, 2, 4 … tokens."""
    found, width, factor = tokens.astype(np.uint64) + np.uint64(1), 1, 0x9E3779B97F4A7C15
    while width < PROBE_TOKENS:
        found = found[:-width] * np.uint64(factor) + found[width:]
        width, factor = 2 * width, factor * factor % (1 << 64)
    return found


def _between(pieces: Iterable[Piece], start: int, end: int) -> Iterator[Piece]:
    """The part of a text from one character to another; a document over the border is cut, and so ends, there."""
    at = 0
    for text, last in pieces:
        low, high = max(start - at, 0), min(end - at, len(text))
        at += len(text)
        if low < high or (last and start < at <= end):
            yield text[low:high], last or at >= end
        if at >= end:
            return


def _units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Work for one thread: about UNIT characters, cut where tokens cannot change."""
    unit: list[Piece] = []
    size = 0
    held = ""
    for text, last in pieces:
        held += text
        while len(held) >= UNIT and (not last or len(held) >= 2 * UNIT):
            # Search backwards in growing stretches; a text with no safe place at all is cut where it stands.
            cut = next((c for back in (1 << 10, 1 << 14, UNIT) if (c := _last_cut(held, UNIT - back, UNIT))), UNIT)
            yield [*unit, (held[:cut], False)]
            unit, size, held = [], 0, held[cut:]
        if last:
            unit.append((held, True))
            size, held = size + len(held), ""
            if size >= UNIT:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def _last_cut(text: str, start: int, end: int) -> int:
    found = 0
    for match in _CUT.finditer(text, max(start, 1), end):
        found = match.start()
    return found


def _write_split(
    folder: Path,
    split: str,
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    pool: ThreadPoolExecutor,
    threads: int,
    tell: Callable[[int], None],
) -> dict[str, Any]:
    counts = {"tokens": 0, "bytes": 0, "characters": 0, "documents": 0}
    shards: list[dict[str, Any]] = []
    between = [tokenizer.end_of_text] if tokenizer.end_of_text is not None else tokenizer.encode(tokenizer.separator).tolist()
    separator = np.array(between, np.uint32)

    def encode(unit: list[Piece]) -> tuple[npt.NDArray[Any], int, int, int]:
        parts: list[npt.NDArray[Any]] = []
        for text, last in unit:
            parts += [tokenizer.encode(text), separator] if last else [tokenizer.encode(text)]
        ids = np.concatenate(parts)
        if len(ids) and int(ids.max()) >= 1 << (8 * dtype.itemsize):
            raise DataError(f"token id {int(ids.max())} does not fit {dtype}")
        size = sum(len(text.encode("utf-8")) for text, _ in unit)
        return ids.astype(dtype), size, sum(len(text) for text, _ in unit), sum(last for _, last in unit)

    def encoded() -> Iterator[tuple[npt.NDArray[Any], int, int, int]]:
        waiting: deque[Future[tuple[npt.NDArray[Any], int, int, int]]] = deque()
        for unit in _units(pieces):
            waiting.append(pool.submit(encode, unit))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    held: npt.NDArray[Any] | None = None  # one unit behind, so that the last separator can be dropped
    writer = ShardWriter(folder, split, dtype, shards)
    for ids, size, characters, documents in encoded():
        for name, amount in (("bytes", size), ("characters", characters), ("documents", documents)):
            counts[name] += amount
        tell(characters)
        if held is not None:
            writer.write(held)
        held = ids
    if held is not None:
        writer.write(held[: len(held) - len(separator)])
    writer.close()
    counts["tokens"] = sum(s["tokens"] for s in shards)
    return {**counts, "shards": shards}
