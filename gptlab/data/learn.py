"""Tokenisers that learn from the corpus: which text they see, and where what they learned is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptlab.config import codec
from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import build, component_of
from gptlab.config.schema import DataConfig
from gptlab.data.corpus import Corpus, file_key, home
from gptlab.data.pipeline import Section, pieces_from, read_section
from gptlab.data.reader import read_file
from gptlab.data.shard import write_json_safely
from gptlab.data.tokenizer import Tokenizer, to_json
from gptlab.data.tokenizer_file import given

Report = Callable[[str, int, int | None], None]  # source, characters done, characters in all


def learned_tokenizer(
    config: DataConfig, sources: Mapping[str, Corpus], extra: Mapping[str, list[Path]], *, shared: bool, report: Report
) -> dict[str, Any] | None:
    """The fitted tokeniser of a config as JSON data: the one it names, or from $GPTLAB_HOME/tokenizers, or learned now.

    None where the tokeniser is fitted to one corpus while that is read anyway. A tokeniser with `learns` is trained on a sample of the
    training text, equally long from each source; any other (`shared`: among several sources) sees all of the text.
    """
    ready = given(config)
    if ready is not None:
        return ready
    tokenizer: Tokenizer = build(config.tokenizer)
    sampled = bool(getattr(tokenizer, "learns", False))
    if not sampled and tokenizer.vocabulary == 0 and any(hasattr(corpus, "held_out_characters") for corpus in sources.values()):
        raise ConfigError(
            f"data/tokenizer={tokenizer.name} must have seen all of a text before its first token, and a stream is never all there; "
            "use data/tokenizer=byte, data/tokenizer=gpt2 or data/tokenizer=bpe"
        )
    if not sampled and not shared:
        return None
    file = tokenizer_file(config, sources, {} if sampled else extra)
    if file.is_file():
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}); delete it and run again") from error
    if sampled:
        tokenizer.fit(sample(config, sources, int(tokenizer.characters), report))  # type: ignore[attr-defined]
    else:
        tokenizer.fit(_everything(tokenizer, sources, extra, report))
    written = to_json(tokenizer, config.tokenizer)
    write_json_safely(file, written)
    return written


def tokenizer_file(config: DataConfig, sources: Mapping[str, Corpus], extra: Mapping[str, list[Path]] | None = None) -> Path:
    """Where the learned tokeniser of a config is kept. `extra`: the held-out sets it has seen too."""
    options = codec.encode(config.tokenizer)
    key = {
        "tokenizer": options,
        "sources": {name: corpus.fingerprint() for name, corpus in sources.items()},
        "validation_fraction": config.validation_fraction,
        "outside": component_of(config.tokenizer).source_hash(),
    }
    if extra:
        key["validation"] = {name: [file_key(f) for f in files] for name, files in extra.items()}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return home() / "tokenizers" / f"{options['name']}-{digest}.json"


def _everything(tokenizer: Tokenizer, sources: Mapping[str, Corpus], extra: Mapping[str, list[Path]], report: Report) -> Iterator[str]:
    for name, corpus in sources.items():
        at = 0
        limit = getattr(corpus, "limit", None)
        enough = limit + corpus.held_out_characters if limit and hasattr(corpus, "held_out_characters") else None
        for piece, _ in pieces_from(corpus, None):
            at += len(piece.text)
            report(name, at, enough)
            yield piece.text
            if enough is not None and at > enough:
                break
    for files in extra.values():
        yield from (piece.text for file in files for piece in read_file(file))
    yield tokenizer.separator


def sample(config: DataConfig, sources: Mapping[str, Corpus], characters: int, report: Report) -> Iterator[str]:
    """Training text, at most `characters`, equally much from each source: one that is shorter than the longest is read again and again.

    Of a stream its beginning (behind what is held out), of other text a share that is spread over all of it.
    """
    lengths = {name: _training_characters(config, corpus, report, name) for name, corpus in sources.items()}
    share = characters // len(sources)
    known = [n for n in lengths.values() if n is not None]
    if len(known) == len(lengths):
        share = min(share, max(known))
    for name, corpus in sources.items():
        given = 0
        while given < share:
            before = given
            for text in _spread(config, corpus, lengths[name], share):
                text = text[: share - given]
                given += len(text)
                yield text
                report(name, given, share)
                if given >= share:
                    break
            if given == before:
                held_out = ", or all of it is held out (data.corpus.held_out)" if hasattr(corpus, "held_out_characters") else ""
                raise DataError(f"data/corpus={corpus.name}: there is no text to train a tokeniser on{held_out}")


def training_section(config: DataConfig, corpus: Any, length: int | None) -> Section:
    """The text that may be learned from: not what is held out."""
    if hasattr(corpus, "held_out_characters"):
        return Section(corpus, 0 if corpus.validation_split else corpus.held_out_characters, None, whole=True)
    return Section(corpus, 0, length)


def _training_characters(config: DataConfig, corpus: Corpus, report: Report, name: str) -> int | None:
    """Characters of the training text; None for a stream, whose end nobody knows."""
    if hasattr(corpus, "held_out_characters"):
        return None
    total = 0
    for piece, _ in pieces_from(corpus, None):
        total += len(piece.text)
        report(name, total, None)
    return int(total * (1 - config.validation_fraction))


def _spread(config: DataConfig, corpus: Corpus, length: int | None, share: int) -> Iterator[str]:
    """The pieces of the training text; where it is longer than `share`, every so many of them."""
    seen = given = 0
    for piece, _, _ in read_section(training_section(config, corpus, length)):
        if length is None or length <= share or given <= seen * share / length:
            given += len(piece.text)
            yield piece.text
        seen += len(piece.text)
