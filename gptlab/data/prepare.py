"""Preparation: from a config to prepared data, found in $GPTLAB_HOME or made now: text, a stream, a mix of these, a generated task.

A preparation that was stopped goes on where it stood. A stream (`data/corpus=hub`) holds out its beginning and can be trained on
while a process of its own goes on writing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping

import numpy as np

from gptlab.config.errors import ConfigError, IOFailure
from gptlab.config.registry import build
from gptlab.config.schema import DataConfig
from gptlab.data.chat_corpus import ChatCorpus
from gptlab.data.chat_prepare import find_chat, prepare_chat, prepare_chats
from gptlab.data.corpus import Corpus, home
from gptlab.data.held_out import Files, check_pins, pin, validation_files
from gptlab.data.learn import learned_tokenizer, tokenizer_file
from gptlab.data.mix import Mix
from gptlab.data.overlap import refuse_overlap
from gptlab.data.pipeline import Section
from gptlab.data.prepared import MANIFEST, PROGRESS, TOKENIZER, Prepared, open_prepared, preparing, read_progress
from gptlab.data.shard import write_json
from gptlab.data.synthetic import Task
from gptlab.data.tokenizer import Tokenizer, from_json, to_json
from gptlab.data.tokenizer_file import given
from gptlab.data.work import POLL_SECONDS, Progress, Report, Work, dtype_of, key_of, manifest_of

__all__ = ["Progress", "Report", "prepare"]


def prepare(
    config: DataConfig, *, report: Report | None = None, threads: int | None = None, background: bool = False, only: str = ""
) -> Prepared:
    """The prepared data of a config: found in $GPTLAB_HOME, or made now.

    `background`: of a stream make only what training needs to begin; the rest is made by another process while it is used.
    `only`: of a mix, this source alone.
    Raises ConfigError, DataError or IOFailure. What is finished of a large preparation is kept, and the next call goes on from there.
    """
    corpus: Corpus = build(config.corpus)
    _check(config, corpus)
    if isinstance(corpus, Task):
        return _prepare_task(config, corpus)
    tell = report or (lambda progress: None)
    workers = threads or os.cpu_count() or 1
    try:
        if isinstance(corpus, ChatCorpus):
            return prepare_chat(config, corpus, tell)
        if isinstance(corpus, Mix) and (chats := _chats(corpus)):
            return prepare_chats(config, chats, corpus.weights, tell, only)
        extra = validation_files(config)
        check_pins(config, extra)
        sources: Mapping[str, Corpus] = corpus.sources if isinstance(corpus, Mix) else {"": corpus}
        learned = learned_tokenizer(config, sources, extra, shared=isinstance(corpus, Mix), report=_reading(tell))
        whole = Work(config, config.corpus, corpus, learned, extra, tell, workers)
        if isinstance(corpus, Mix):
            watched = extra if config.filter.validation_overlap else {}
            parts = {
                name: Work(config, corpus.options[name], source, learned, {}, tell, workers, name, watched).run(background)
                for name, source in corpus.sources.items()
                if only in ("", name)
            }
            if only:
                return parts[only]
            found = _with_sets(whole, parts)
            found = Prepared(found.folder, found.manifest, found.tokenizer, parts=parts, weights=corpus.weights)
        else:
            found = whole.run(background)
        _refuse_overlaps(found)
        pin(config, extra)
    except OSError as error:
        raise IOFailure(f"{error.filename or home()} could not be read or written ({error.strerror or error})") from error
    return found


def find_prepared(config: DataConfig) -> Prepared | None:
    """The prepared data of a config as far as they are there; None where nothing is. Nothing is made, fetched or asked for.

    A stream's text need not be complete, and does not grow. Raises ConfigError and DataError as `prepare` does.
    """
    corpus: Corpus = build(config.corpus)
    _check(config, corpus)
    if isinstance(corpus, Task):
        return _prepare_task(config, corpus)
    if isinstance(corpus, ChatCorpus):
        return find_chat(config, corpus)
    if isinstance(corpus, Mix) and (chats := _chats(corpus)):
        there = all(find_chat(config, chat) for chat in chats.values())
        return prepare_chats(config, chats, corpus.weights, lambda _: None) if there else None
    sources: Mapping[str, Corpus] = corpus.sources if isinstance(corpus, Mix) else {"": corpus}
    if not all(getattr(source, "pinned", True) for source in sources.values()):
        return None
    extra = validation_files(config)
    tokenizer: Tokenizer = build(config.tokenizer)
    ready = given(config) is not None
    if learns := ready or getattr(tokenizer, "learns", False) or isinstance(corpus, Mix):
        file = tokenizer_file(config, sources, {} if getattr(tokenizer, "learns", False) else extra)
        if not ready and not file.is_file():
            return None
    learned = learned_tokenizer(config, sources, extra, shared=isinstance(corpus, Mix), report=lambda *_: None) if learns else None
    work = Work(config, config.corpus, corpus, learned, extra, lambda _: None, 1)
    if not isinstance(corpus, Mix):
        return open_prepared(work.folder, limit=work.limit) if _begun(work) else None
    watched = extra if config.filter.validation_overlap else {}
    parts = {n: Work(config, corpus.options[n], s, learned, {}, lambda _: None, 1, n, watched) for n, s in corpus.sources.items()}
    if not (work.folder / MANIFEST).is_file() or not all(_begun(part) for part in parts.values()):
        return None
    found = open_prepared(work.folder)
    opened = {name: open_prepared(part.folder, limit=part.limit) for name, part in parts.items()}
    return Prepared(found.folder, found.manifest, found.tokenizer, parts=opened, weights=corpus.weights)


def _chats(mix: Mix) -> dict[str, ChatCorpus]:
    """The sources of a mix of chats; none of a mix of texts. Raises ConfigError for both in one."""
    found = {name: source for name, source in mix.sources.items() if isinstance(source, ChatCorpus)}
    if found and len(found) < len(mix.sources):
        texts = ", ".join(name for name in mix.sources if name not in found)
        raise ConfigError(f"data.corpus.sources: {', '.join(found)} hold chats and {texts} texts; a mix is of the one or of the other")
    return found


def _begun(work: Work) -> bool:
    """Whether a folder is there that training could begin with."""
    return (work.folder / MANIFEST).is_file() and (not work.streamed or "train" in read_progress(work.folder)["splits"])


def _check(config: DataConfig, corpus: Corpus) -> None:
    if config.packing not in ("concatenate", "best_fit"):
        raise ConfigError(f"data.packing={config.packing} is not one of concatenate, best_fit")
    if not 0 < config.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={config.validation_fraction} must be above 0 and below 1")
    if isinstance(corpus, Task) and (config.validation or config.filter != type(config.filter)() or config.packing != "concatenate"):
        raise ConfigError(
            f"data/corpus={corpus.name} is generated: data.validation, data.filter and data.packing are for text, and would change nothing"
        )
    if isinstance(corpus, Mix) and not corpus.sources:
        raise ConfigError("data.corpus.sources is empty; add one with +data/corpus@data.corpus.sources.NAME=text")
    taken = corpus.sources if isinstance(corpus, Mix) else {}
    for name in config.validation:
        if name in taken:
            raise ConfigError(f"data.validation.{name}: a source of the mix has this name, and a held-out set of its own; choose another")


def _reading(tell: Report) -> Callable[[str, int, int | None], None]:
    return lambda source, done, total: tell(Progress(source, "reading", "characters", done, total))


def _prepare_task(config: DataConfig, task: Task) -> Prepared:
    """A generated task has no shards: a manifest, and a tokeniser whose ids are the places in the task's alphabet."""
    tokenizer: Tokenizer = build(config.tokenizer)
    tokenizer.fit([task.alphabet])
    if tokenizer.encode(task.alphabet).tolist() != list(range(len(task.alphabet))):
        raise ConfigError(f"data/corpus={task.name} is made of single characters: it needs data/tokenizer=char")
    written = to_json(tokenizer, config.tokenizer)
    manifest = manifest_of(task.name, tokenizer, written, np.dtype("<u2"), {"train": task.fingerprint(), "val": task.fingerprint()})
    folder = home() / "data" / f"{task.name}-{key_of(manifest)}"
    if not (folder / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TOKENIZER, written)
        write_json(folder / MANIFEST, manifest)
    opened = open_prepared(folder)
    return Prepared(folder, opened.manifest, opened.tokenizer, task=task)


def _with_sets(work: Work, parts: dict[str, Prepared]) -> Prepared:
    """A mix's own folder: its tokeniser, and the sets of data.validation, which belong to no source."""
    folder, learned = work.folder, work.learned
    assert learned is not None
    while not (folder / MANIFEST).is_file():
        with preparing(folder) as mine:
            if not mine:
                time.sleep(POLL_SECONDS)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer = from_json(learned, str(folder))
            write_json(folder / TOKENIZER, learned)
            progress: dict[str, object] = {"total": None, "splits": {}}
            for name, files in work.extra.items():
                work.write_split(name, Section(Files(files)), tokenizer, progress, None)
            val = {"shards": [], "tokens": sum(p.manifest["splits"]["val"]["tokens"] for p in parts.values())}
            splits = {"val": val, **work.entries(progress)}
            write_json(folder / MANIFEST, manifest_of("mix", tokenizer, learned, dtype_of(tokenizer), splits))
            (folder / PROGRESS).unlink(missing_ok=True)
    return open_prepared(folder)


def _refuse_overlaps(data: Prepared) -> None:
    """Raise DataError when a set of data.validation is trained on. What has been looked through is noted, and not read again."""
    sets = {name: data.stream(name) for name in data.extra_sets}
    if not sets:
        return
    file = data.folder / "checked.json"
    checked: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for part in data.parts.values() or [data]:
        if data.parts or part.streams_on:  # a text of its own was looked through when it was written
            tokens = len(part.stream("train"))
            if checked.get(part.folder.name, -1) < tokens:
                refuse_overlap(part.stream("train"), sets)
                checked[part.folder.name] = tokens
                if os.access(data.folder, os.W_OK):
                    write_json(file, checked)
