"""The preparation of one corpus: its folder, its splits in order, its record, and going on with all of them after a stop."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import codec
from gptlab.config.errors import DataError, IOFailure
from gptlab.config.registry import build, component_of
from gptlab.config.schema import DataConfig
from gptlab.config.slots import Corpus as CorpusOptions
from gptlab.data.background import Background
from gptlab.data.corpus import Corpus, file_key, home
from gptlab.data.filter import Filter
from gptlab.data.held_out import Files, make_filter
from gptlab.data.overlap import refuse_overlap
from gptlab.data.pipeline import Encoder, Section, pieces_from, write_section
from gptlab.data.prepared import MANIFEST, PROGRESS, TOKENIZER, Prepared, open_prepared, preparer, preparing, read_progress
from gptlab.data.reader import text_files
from gptlab.data.shard import FORMAT, SplitState, SplitWriter, TokenStream, write_json
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


@dataclass
class Work:
    """The preparation of one corpus."""

    config: DataConfig
    options: CorpusOptions
    corpus: Corpus
    learned: dict[str, Any] | None  # a tokeniser that was fitted beforehand
    extra: dict[str, list[Path]]
    tell: Report
    threads: int
    source: str = ""  # its name in a mix
    watched: dict[str, list[Path]] = field(default_factory=dict)  # sets of the mix, which a filter keeps out of this part

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
            files = {n: text_files(p, f"data.filter.benchmarks.{n}") for n, p in self.config.filter.benchmarks.items()} | self.watched
            self.key["filter"] = codec.encode(self.config.filter)
            self.key["filtered_by"] = {name: [file_key(f) for f in found] for name, found in files.items()}
        self.folder = home() / "data" / f"{self.corpus.name}-{key_of(self.key)}"

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
                ensure = Background(self.config, self.folder, self.source)
                ensure()
                self._await_first(ensure)
                break
            with preparing(self.folder) as mine:
                if mine and not self.found():
                    self._make(background)
            if not mine:
                self.tell(Progress(self.source, "waiting", "tokens", 0, None, waiting=preparer(self.folder) or ""))
                time.sleep(POLL_SECONDS)
        return open_prepared(self.folder, limit=self.limit, ensure=ensure)

    def _await_first(self, ensure: Callable[[], None]) -> None:
        """Wait for the first record of the training text."""
        while "train" not in read_progress(self.folder)["splits"]:
            ensure()
            self.tell(Progress(self.source, "train", "tokens", 0, None, waiting="another process"))
            time.sleep(POLL_SECONDS)

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
            told = self._disk(error, written) if isinstance(error, OSError) else ""  # it reads what may go now
            if written < KEPT and not (self.streamed and (self.folder / PROGRESS).exists()):
                shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise IOFailure(told) from error
            raise

    def _written(self) -> int:
        """Tokens that the record speaks of."""
        try:
            return sum(s["tokens"] for s in read_progress(self.folder)["splits"].values())
        except DataError:
            return 0

    def _disk(self, error: OSError, written: int) -> str:
        said = f"{self.folder} could not be written ({error.strerror or error})"
        kept = f"; the {written:,} tokens written are kept, and the same command goes on from there"
        kept = kept if written >= KEPT or (self.streamed and written) else ""
        try:
            progress = read_progress(self.folder)
        except DataError:
            return said
        total, done = progress.get("total"), sum(s["characters"] for s in progress["splits"].values())
        size = dtype_of(from_json(json.loads((self.folder / TOKENIZER).read_text()), "tokenizer")).itemsize
        if self.limit:
            needed = f"about {max(self.limit - written, 0) * size:,}"
        elif total and done:
            needed = f"about {int(written * size * max(total / done - 1, 0)):,}"
        else:
            needed = f"at most {(total or 0) * size:,}"
        return said + (f"; it needs {needed} bytes more, which GPTLAB_HOME=FOLDER puts elsewhere" if needed != "at most 0" else "") + kept

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
            for piece in Files(files).pieces():
                sizes["sets"] += len(piece.text)
                yield piece.text
        yield separator

    def _make_local(self, tokenizer: Tokenizer, progress: dict[str, Any]) -> None:
        total = progress["corpus"]
        border = int(total * (1 - self.config.validation_fraction))
        held_out = Section(self.corpus, border)  # to the end: rows without text may stand there
        for name in self.extra:
            self.write_split(name, Section(Files(self.extra[name])), tokenizer, progress, None)
        self.write_split("val", held_out, tokenizer, progress, None)
        filter_ = self._filter({"val": held_out})
        self.write_split("train", Section(self.corpus, 0, border), tokenizer, progress, filter_)
        splits = self.entries(progress)
        streams = {n: TokenStream([(self.folder, splits[n])], dtype_of(tokenizer)) for n in ("train", *self.extra)}
        try:
            refuse_overlap(streams.pop("train"), streams)
        except DataError:
            shutil.rmtree(self.folder)
            raise
        write_json(self.folder / MANIFEST, self._head(tokenizer, {n: splits[n] for n in ("train", "val", *self.extra)}))
        (self.folder / "train.filter").unlink(missing_ok=True)
        (self.folder / PROGRESS).unlink()

    def _make_stream(self, tokenizer: Tokenizer, progress: dict[str, Any], background: bool) -> None:
        corpus: Any = self.corpus
        other = getattr(corpus, "validation", None)
        held_out = Section(other) if other is not None else Section(corpus, 0, corpus.held_out_characters, whole=True)
        train = Section(corpus, 0 if other is not None else corpus.held_out_characters, None, whole=True)
        if not (self.folder / MANIFEST).is_file():
            for name in self.extra:
                self.write_split(name, Section(Files(self.extra[name])), tokenizer, progress, None)
            self.write_split("val", held_out, tokenizer, progress, None)
            if progress["splits"]["val"]["tokens"] < 2:
                raise DataError(f"data/corpus={corpus.name}: nothing was held out; is the data set empty, or its column without text?")
            splits = self.entries(progress)
            # What the training text is made of stands for its content, which is not there yet; that of the sets is.
            key = {k: v for k, v in self.key.items() if k != "validation"}
            write_json(self.folder / MANIFEST, {**self._head(tokenizer, {n: splits[n] for n in ("val", *self.extra)}), "key": key})
        if background:
            return
        self.write_split("train", train, tokenizer, progress, self._filter({"val": held_out}), self.limit)
        made = open_prepared(self.folder, limit=self.limit)
        if len(made.stream("train")) == 0:
            held = progress["splits"]["val"]["characters"]
            raise DataError(
                f"data.corpus.held_out={corpus.held_out_characters:,} characters are held out for validation, and {corpus.name} "
                f"has only {held:,}; give a smaller one"
            )

    def _head(self, tokenizer: Tokenizer, splits: dict[str, Any]) -> dict[str, Any]:
        written = json.loads((self.folder / TOKENIZER).read_text(encoding="utf-8"))
        head = manifest_of(self.corpus.name, tokenizer, written, dtype_of(tokenizer), splits)
        return head | ({"filter": codec.encode(self.config.filter)} if "filter" in self.key else {})

    def _filter(self, held_out: dict[str, Section]) -> Filter | None:
        if "filter" not in self.key:
            return None
        return make_filter(self.config, held_out, self.extra | self.watched)

    def entries(self, progress: dict[str, Any]) -> dict[str, Any]:
        """The manifest's entries of the splits that are done."""
        found = {}
        for name, split in progress["splits"].items():
            found[name] = _state(split).entry(split["index"])
        return found

    def write_split(
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
        dtype = dtype_of(tokenizer)
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


def _state(recorded: dict[str, Any]) -> SplitState:
    return SplitState(**{f.name: recorded[f.name] for f in fields(SplitState)})


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4")


def key_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def manifest_of(corpus: str, tokenizer: Tokenizer, written: dict[str, Any], dtype: np.dtype[Any], splits: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "corpus": corpus,
        "tokenizer": {"name": written["name"], "vocabulary": tokenizer.vocabulary, "sha256": digest(written)},
        "dtype": dtype.str,
        "between_documents": "text" if tokenizer.end_of_text is None else "end_of_text",
        "splits": splits,
    }
