"""Preparation: from a corpus to shards, once: learn what is to be learned, split, tokenise, write, refuse what overlaps.

A preparation that was stopped goes on where it stood. A stream (`data/corpus=hub`) holds out its beginning and can be trained on
while a process of its own goes on writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import codec
from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import build, component_of
from gptlab.config.schema import DataConfig
from gptlab.config.slots import Corpus as CorpusOptions
from gptlab.data.background import Background
from gptlab.data.corpus import Corpus, file_key, home
from gptlab.data.filter import Filter
from gptlab.data.learn import learned_tokenizer
from gptlab.data.mix import Mix
from gptlab.data.overlap import refuse_overlap
from gptlab.data.pipeline import Encoder, Section, pieces_from, read_section, write_section
from gptlab.data.prepared import MANIFEST, PROGRESS, TOKENIZER, Prepared, holder, open_prepared, preparing, read_progress
from gptlab.data.reader import read_file, text_files
from gptlab.data.shard import FORMAT, SplitState, SplitWriter, write_json
from gptlab.data.synthetic import Task
from gptlab.data.tokenizer import Tokenizer, digest, from_json, to_json

KEPT = 1_000_000  # tokens from which a half-made folder of local text is worth going on with
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a preparation is: `done` of `total` (None: not known) in `unit`."""

    source: str
    stage: str  # reading, val, train, …
    unit: str  # characters, tokens
    done: int
    total: int | None
    rows: int = 0
    tokens: int = 0
    bytes: int = 0  # of text, so far in all
    waiting: str = ""  # the process that does the work


Report = Callable[[Progress], None]


def prepare(config: DataConfig, *, report: Report | None = None, threads: int | None = None, background: bool = False) -> Prepared:
    """The prepared data of a config: found in $GPTLAB_HOME, or made now.

    `background`: of a stream make only what training needs to begin; the rest is made by another process while it is used.
    Raises ConfigError, DataError or IOFailure. What is finished of a large preparation is kept, and the next call goes on from there.
    """
    corpus: Corpus = build(config.corpus)
    _check(config, corpus)
    if isinstance(corpus, Task):
        return _prepare_task(config, corpus)
    extra = {name: _validation_files(name, path) for name, path in config.validation.items()}
    tell = report or (lambda progress: None)
    workers = threads or os.cpu_count() or 1
    try:
        if not isinstance(corpus, Mix):
            learned = learned_tokenizer(config, {"": corpus}, extra, shared=False, report=_reading(tell))
            return _Work(config, config.corpus, corpus, learned, extra, tell, workers).run(background)
        learned = learned_tokenizer(config, corpus.sources, extra, shared=True, report=_reading(tell))
        parts: dict[str, Prepared] = {}
        for name, source in corpus.sources.items():
            parts[name] = _Work(config, corpus.options[name], source, learned, {}, tell, workers, name).run(background)
        whole = _Work(config, config.corpus, corpus, learned, extra, tell, workers).run_sets(parts)
    except OSError as error:
        raise IOFailure(f"{error.filename or home()} could not be read or written ({error.strerror or error})") from error
    return Prepared(whole.folder, whole.manifest, whole.tokenizer, parts=parts, weights=corpus.weights)


def _check(config: DataConfig, corpus: Corpus) -> None:
    if config.packing not in ("concatenate", "best_fit"):
        raise ConfigError(f"data.packing={config.packing} is not one of concatenate, best_fit")
    if isinstance(corpus, Mix) and not corpus.sources:
        raise ConfigError("data.corpus.sources is empty; add one with +data/corpus@data.corpus.sources.NAME=text")
    taken = corpus.sources if isinstance(corpus, Mix) else {}
    for name in config.validation:
        if name in taken:
            raise ConfigError(f"data.validation.{name}: a source of the mix has this name, and a held-out set of its own; choose another")


def _reading(tell: Report) -> Callable[[str, int, int | None], None]:
    return lambda source, done, total: tell(Progress(source, "reading", "characters", done, total))


def _validation_files(name: str, path: str) -> list[Path]:
    if name in ("train", "val") or "/" in name:
        raise ConfigError(f"data.validation.{name}: choose another name; train and val are taken, and it cannot hold a slash")
    return text_files(path, f"data.validation.{name}")


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _manifest(corpus: str, tokenizer: Tokenizer, written: dict[str, Any], dtype: np.dtype[Any], splits: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "corpus": corpus,
        "tokenizer": {"name": written["name"], "vocabulary": tokenizer.vocabulary, "sha256": digest(written)},
        "dtype": dtype.str,
        "between_documents": "text" if tokenizer.end_of_text is None else "end_of_text",
        "splits": splits,
    }


def _prepare_task(config: DataConfig, task: Task) -> Prepared:
    """A generated task has no shards: a manifest, and a tokeniser whose ids are the places in the task's alphabet."""
    tokenizer: Tokenizer = build(config.tokenizer)
    tokenizer.fit([task.alphabet])
    if tokenizer.encode(task.alphabet).tolist() != list(range(len(task.alphabet))):
        raise ConfigError(f"data/corpus={task.name} is made of single characters: it needs data/tokenizer=char")
    written = to_json(tokenizer, config.tokenizer)
    manifest = _manifest(task.name, tokenizer, written, np.dtype("<u2"), {"train": task.fingerprint(), "val": task.fingerprint()})
    folder = home() / "data" / f"{task.name}-{_key(manifest)}"
    if not (folder / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TOKENIZER, written)
        write_json(folder / MANIFEST, manifest)
    opened = open_prepared(folder)
    return Prepared(folder, opened.manifest, opened.tokenizer, task=task)


@dataclass
class _Work:
    """The preparation of one corpus."""

    config: DataConfig
    options: CorpusOptions
    corpus: Corpus
    learned: dict[str, Any] | None  # a tokeniser that was fitted beforehand
    extra: dict[str, list[Path]]
    tell: Report
    threads: int
    source: str = ""  # its name in a mix

    def __post_init__(self) -> None:
        self.streamed = hasattr(self.corpus, "held_out_characters")
        self.limit: int | None = getattr(self.corpus, "limit", None)
        self.key: dict[str, Any] = {
            "format": FORMAT,
            "corpus": self.corpus.name,
            "fingerprint": self.corpus.fingerprint(),
            "tokenizer": digest(self.learned) if self.learned else codec.encode(self.config.tokenizer),
            "outside": [component_of(o).source_hash() for o in (self.options, self.config.tokenizer)],
            "validation_fraction": self.config.validation_fraction,
            "validation": {name: [file_key(f) for f in files] for name, files in self.extra.items()},
        }
        if self.config.filter != type(self.config.filter)():
            self.key["filter"] = codec.encode(self.config.filter)
        self.folder = home() / "data" / f"{self.corpus.name}-{_key(self.key)}"

    def found(self) -> bool:
        """Whether all that is asked for is there."""
        if not (self.folder / MANIFEST).is_file():
            return False
        return not self.streamed or self._enough()

    def _enough(self) -> bool:
        train = read_progress(self.folder)["splits"].get("train", {})
        return bool(train.get("ended")) or (self.limit is not None and train.get("tokens", 0) >= self.limit)

    def run(self, background: bool) -> Prepared:
        """Make what is missing, or wait for the process that does."""
        ensure: Callable[[], None] = lambda: None  # noqa: E731
        while not self.found():
            if background and self.streamed and (self.folder / MANIFEST).is_file():
                ensure = Background(self.alone(), self.folder)
                ensure()
                self._await_first(ensure)
                break
            with preparing(self.folder) as mine:
                if mine and not self.found():
                    self._make(background)
            if not mine:
                self.tell(Progress(self.source, "waiting", "tokens", 0, None, waiting=holder(self.folder) or ""))
                time.sleep(POLL_SECONDS)
        return open_prepared(self.folder, limit=self.limit, ensure=ensure)

    def alone(self) -> DataConfig:
        """The config of this corpus by itself: what a process of its own is told."""
        return replace(self.config, corpus=self.options, validation={} if self.source else self.config.validation)

    def _await_first(self, ensure: Callable[[], None]) -> None:
        """Wait for the first record of the training text."""
        while "train" not in read_progress(self.folder)["splits"]:
            ensure()
            self.tell(Progress(self.source, "train", "tokens", 0, None, waiting="another process"))
            time.sleep(POLL_SECONDS)

    def run_sets(self, parts: dict[str, Prepared]) -> Prepared:
        """Of a mix: its own tokeniser and the held-out sets of data.validation, which belong to no source."""
        while not (self.folder / MANIFEST).is_file():
            with preparing(self.folder) as mine:
                if not mine:
                    time.sleep(POLL_SECONDS)
                    continue
                self.folder.mkdir(parents=True, exist_ok=True)
                assert self.learned is not None
                tokenizer = from_json(self.learned, str(self.folder))
                write_json(self.folder / TOKENIZER, self.learned)
                progress: dict[str, Any] = {"splits": {}}
                for name in self.extra:
                    self._write_split(name, Section(_Files(self.extra[name])), tokenizer, progress, None)
                sets = self._entries(progress)
                val = {"shards": [], "tokens": sum(p.manifest["splits"]["val"]["tokens"] for p in parts.values())}
                write_json(self.folder / MANIFEST, _manifest("mix", tokenizer, self.learned, _dtype(tokenizer), {"val": val, **sets}))
        whole = open_prepared(self.folder)
        for part in parts.values():
            if whole.extra_sets and not part.streams_on:
                refuse_overlap(part.stream("train"), {name: whole.stream(name) for name in whole.extra_sets})
        return whole

    def _make(self, background: bool) -> None:
        """Write the folder, from where it stands. What was written of a stream or of much text is kept when something fails."""
        if self.folder.exists() and not (self.folder / PROGRESS).exists():
            shutil.rmtree(self.folder)  # somebody deleted a part of it
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "failed.json").unlink(missing_ok=True)
        try:
            tokenizer, progress = self._plan()
            if self.streamed:
                self._make_stream(tokenizer, progress, background)
            else:
                self._make_local(tokenizer, progress)
        except BaseException as error:
            written = self._written()
            if written < KEPT and not (self.streamed and (self.folder / PROGRESS).exists()):
                shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise IOFailure(self._disk(error, written)) from error
            raise

    def _written(self) -> int:
        """Tokens that the record speaks of."""
        try:
            return sum(s["tokens"] for s in read_progress(self.folder)["splits"].values())
        except DataError:
            return 0

    def _disk(self, error: OSError, written: int) -> str:
        said = f"{self.folder} could not be written ({error.strerror or error})"
        kept = f"; the {written:,} tokens written are kept, and the same command goes on from there" if written >= KEPT else ""
        try:
            progress = read_progress(self.folder)
        except DataError:
            return said
        total, done = progress.get("total"), sum(s["characters"] for s in progress["splits"].values())
        size = _dtype(from_json(json.loads((self.folder / TOKENIZER).read_text()), "tokenizer")).itemsize
        needed = (self.limit - written) * size if self.limit else int(written * size * (total / done - 1)) if total and done else 0
        return said + (f"; it needs about {max(needed, 0):,} bytes more" if needed > 0 else "") + kept

    def _plan(self) -> tuple[Tokenizer, dict[str, Any]]:
        """The fitted tokeniser, and the record of what is done; on the first call the text is read once where that is needed."""
        if (self.folder / PROGRESS).is_file() and (self.folder / TOKENIZER).is_file():
            written = json.loads((self.folder / TOKENIZER).read_text(encoding="utf-8"))
            return from_json(written, str(self.folder / TOKENIZER)), read_progress(self.folder)
        tokenizer = from_json(self.learned, str(self.folder)) if self.learned else build(self.config.tokenizer)
        sizes = {"corpus": 0, "sets": 0}
        texts = self._all_texts(tokenizer.separator, sizes)
        if self.learned is None:
            tokenizer.fit(texts)
        if not self.streamed:
            for _ in texts:  # a tokeniser that has nothing to learn did not read it
                pass
            if sizes["corpus"] == 0:
                raise DataError(f"data/corpus={self.corpus.name} holds no text")
        write_json(self.folder / TOKENIZER, self.learned or to_json(tokenizer, self.config.tokenizer))
        progress: dict[str, Any] = {"total": None if self.streamed else sum(sizes.values()), "corpus": sizes["corpus"], "splits": {}}
        write_json(self.folder / PROGRESS, progress)
        return tokenizer, progress

    def _all_texts(self, separator: str, sizes: dict[str, int]) -> Iterator[str]:
        """Every text that will be tokenised, counted; of a stream, as many characters as tokens are asked for."""
        enough = getattr(self.corpus, "held_out_characters", 0) + self.limit if self.streamed and self.limit else None
        for piece, _ in pieces_from(self.corpus, None):
            sizes["corpus"] += len(piece.text)
            self.tell(Progress(self.source, "reading", "characters", sizes["corpus"], enough))
            yield piece.text
            if enough is not None and sizes["corpus"] > enough:
                break
        other: Corpus | None = getattr(self.corpus, "validation", None)
        if other is not None:
            yield from (piece.text for piece, _ in pieces_from(other, None))
        for files in self.extra.values():
            for piece in _Files(files).pieces():
                sizes["sets"] += len(piece.text)
                yield piece.text
        yield separator

    def _make_local(self, tokenizer: Tokenizer, progress: dict[str, Any]) -> None:
        total = progress["corpus"]
        border = int(total * (1 - self.config.validation_fraction))
        held_out = Section(self.corpus, border, total)
        for name in self.extra:
            self._write_split(name, Section(_Files(self.extra[name])), tokenizer, progress, None)
        self._write_split("val", held_out, tokenizer, progress, None)
        filter_ = self._filter({"val": held_out})
        self._write_split("train", Section(self.corpus, 0, border), tokenizer, progress, filter_)
        splits = self._entries(progress)
        write_json(self.folder / MANIFEST, self._head(tokenizer, {n: splits[n] for n in ("train", "val", *self.extra)}))
        made = open_prepared(self.folder)
        try:
            refuse_overlap(made.stream("train"), {name: made.stream(name) for name in self.extra})
        except DataError:
            shutil.rmtree(self.folder)
            raise
        (self.folder / PROGRESS).unlink()

    def _make_stream(self, tokenizer: Tokenizer, progress: dict[str, Any], background: bool) -> None:
        corpus: Any = self.corpus
        other = getattr(corpus, "validation", None)
        held_out = Section(other) if other is not None else Section(corpus, 0, corpus.held_out_characters, whole=True)
        train = Section(corpus, 0 if other is not None else corpus.held_out_characters, None, whole=True)
        if not (self.folder / MANIFEST).is_file():
            for name in self.extra:
                self._write_split(name, Section(_Files(self.extra[name])), tokenizer, progress, None)
            self._write_split("val", held_out, tokenizer, progress, None)
            if progress["splits"]["val"]["tokens"] < 2:
                raise DataError(f"data/corpus={corpus.name}: nothing was held out; is the data set empty, or its column without text?")
            splits = self._entries(progress)
            write_json(self.folder / MANIFEST, {**self._head(tokenizer, {n: splits[n] for n in ("val", *self.extra)}), "key": self.key})
        if background:
            return
        self._write_split("train", train, tokenizer, progress, self._filter({"val": held_out}), self.limit)
        made = open_prepared(self.folder, limit=self.limit)
        if len(made.stream("train")) == 0:
            raise DataError(f"data/corpus={corpus.name}: all of it was held out; use a smaller data.corpus.held_out")
        refuse_overlap(made.stream("train"), {name: made.stream(name) for name in self.extra})

    def _head(self, tokenizer: Tokenizer, splits: dict[str, Any]) -> dict[str, Any]:
        written = json.loads((self.folder / TOKENIZER).read_text(encoding="utf-8"))
        head = _manifest(self.corpus.name, tokenizer, written, _dtype(tokenizer), splits)
        return head | ({"filter": codec.encode(self.config.filter)} if "filter" in self.key else {})

    def _filter(self, held_out: dict[str, Section]) -> Filter | None:
        if "filter" not in self.key:
            return None
        return make_filter(self.config, held_out, self.extra)

    def _entries(self, progress: dict[str, Any]) -> dict[str, Any]:
        """The manifest's entries of the splits that are done."""
        found = {}
        for name, split in progress["splits"].items():
            found[name] = _state(split).entry(split["index"])
        return found

    def _write_split(
        self,
        name: str,
        section: Section,
        tokenizer: Tokenizer,
        progress: dict[str, Any],
        filter_: Filter | None,
        limit: int | None = None,
    ) -> None:
        """Write a split from where the record says it stands."""
        recorded = progress["splits"].get(name)
        state = _state(recorded) if recorded else SplitState()
        if state.ended or (limit is not None and state.tokens >= limit):
            return
        dtype = _dtype(tokenizer)
        writer = SplitWriter(self.folder, name, dtype, state)
        remembered = self.folder / f"{name}.filter"
        if filter_ is not None and recorded:
            filter_.restore(remembered, recorded["filter"])

        def commit() -> None:
            marks = {"filter": filter_.save(remembered)} if filter_ is not None else {}
            writer.flush()
            progress["splits"][name] = asdict(state) | {"index": writer.index()} | marks
            write_json(self.folder / PROGRESS, progress)

        def tell(characters: int) -> None:
            everything = [*(s for n, s in progress["splits"].items() if n != name), asdict(state)]
            rows, tokens, size, done = (sum(s[k] for s in everything) for k in ("documents", "tokens", "bytes", "characters"))
            unit, at, total = ("tokens", state.tokens, limit) if self.streamed else ("characters", done, progress["total"])
            self.tell(Progress(self.source, name, unit, at, total, rows, tokens, size))

        try:
            write_section(section, writer, Encoder(tokenizer, dtype, filter_), self.threads, commit=commit, tell=tell, limit=limit)
        finally:
            writer.close()


def make_filter(config: DataConfig, held_out: dict[str, Section], extra: dict[str, list[Path]]) -> Filter:
    """The filter of a config, with the texts that must stay out of the training text."""

    def texts(pieces: Iterator[Any]) -> Iterator[str]:
        parts: list[str] = []
        for piece in pieces:
            parts.append(piece.text)
            if piece.last:
                yield "".join(parts)
                parts = []

    sets: list[tuple[str, Iterator[str]]] = []
    for name, path in config.filter.benchmarks.items():
        sets.append((name, texts(p for f in text_files(path, f"data.filter.benchmarks.{name}") for p in read_file(f))))
    if config.filter.validation_overlap:
        sets += [(name, texts(piece for piece, _, _ in read_section(section))) for name, section in held_out.items()]
        sets += [(name, texts(iter(_Files(files).pieces()))) for name, files in extra.items()]
    return Filter(config.filter, sets)


class _Files:
    """The files of a validation set as a corpus."""

    name = "validation"

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def fingerprint(self) -> dict[str, Any]:
        return {"files": [file_key(f) for f in self.files]}

    def pieces(self) -> Iterator[Any]:
        for file in self.files:
            yield from read_file(file)


def _state(recorded: dict[str, Any]) -> SplitState:
    return SplitState(**{f.name: recorded[f.name] for f in fields(SplitState)})


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4")
