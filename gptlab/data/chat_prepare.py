"""Chats to tokens on disk: each a document, and beside the tokens a second stream that says which of them the assistant wrote."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import component_of
from gptlab.config.schema import DataConfig
from gptlab.data.chat import ANSWERS, ChatFormat, Message, chat_format, render
from gptlab.data.chat_corpus import ChatCorpus
from gptlab.data.chat_records import Example
from gptlab.data.corpus import home
from gptlab.data.learn import learned_tokenizer, tokenizer_file
from gptlab.data.order import key, permute
from gptlab.data.prepared import MANIFEST, TOKENIZER, Prepared, open_prepared, preparer, preparing
from gptlab.data.problems import Problem
from gptlab.data.shard import SplitState, SplitWriter, write_json
from gptlab.data.tokenizer import Tokenizer, digest, from_json
from gptlab.data.tokenizer_file import given
from gptlab.data.work import POLL_SECONDS, Progress, Report, dtype_of, key_of, manifest_of

CHAT_FORMAT = 1  # of what is written here
WRITTEN = np.dtype("<u1")
TELL_EVERY = 500  # chats
SPLITS = ("train", "val")


def check_chat(config: DataConfig, corpus: ChatCorpus) -> None:
    """Raise ConfigError for settings that are for text, and would change nothing here."""
    if config.validation or config.filter != type(config.filter)():
        raise ConfigError(f"data/corpus={corpus.name} holds chats: data.validation and data.filter are for text, and would change nothing")


def find_chat(config: DataConfig, corpus: ChatCorpus) -> Prepared | None:
    """The prepared chats of a config; None where they are not there. Nothing is made or asked for."""
    if not getattr(corpus, "pinned", True):
        return None
    if given(config) is None and not tokenizer_file(config, {"": corpus}).is_file():
        return None
    work = ChatWork(config, corpus, lambda _: None)
    return open_prepared(work.folder) if (work.folder / MANIFEST).is_file() else None


@dataclass
class ChatWork:
    """The preparation of one corpus of chats."""

    config: DataConfig
    corpus: ChatCorpus
    tell: Report
    source: str = ""  # its name in a mix
    learned: dict[str, Any] | None = None  # the tokeniser that the parts of a mix share
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        learned = self.learned or learned_tokenizer(
            self.config, {"": self.corpus}, {}, shared=True, report=lambda s, n, t: self.tell(Progress(s, "reading", "characters", n, t))
        )
        assert learned is not None  # it is shared: fitted beforehand
        self.learned, self.tokenizer = learned, from_json(learned, "tokenizer")
        self.format = format_of(self.tokenizer)
        key = {
            "chat": CHAT_FORMAT,
            "corpus": self.corpus.name,
            "fingerprint": self.corpus.fingerprint(),
            "tokenizer": digest(learned),
            "outside": component_of(self.config.corpus).source_hash(),
            "validation_fraction": None if self.corpus.validates else self.config.validation_fraction,
        }
        self.folder = home() / "data" / f"{self.corpus.name}-{key_of(key)}"

    def run(self) -> Prepared:
        """Make what is missing, or wait for the process that does."""
        while not (self.folder / MANIFEST).is_file():
            with preparing(self.folder) as mine:
                if mine and not (self.folder / MANIFEST).is_file():
                    self._make()
            if not mine:
                self.tell(Progress(self.source, "waiting", "tokens", 0, None, waiting=preparer(self.folder) or ""))
                time.sleep(POLL_SECONDS)
        return open_prepared(self.folder)

    def _make(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a preparation that was killed
        self.folder.mkdir(parents=True)
        try:
            splits = {name: _Split(self.folder, name, self.tokenizer, self.format, self.corpus.pairs) for name in SPLITS}
            seen = self._write(splits, validation=False)
            if self.corpus.validates:
                seen += self._write(splits, validation=True)
            for name, split in splits.items():
                if not split.tokens.state.documents:
                    what = "for training" if name == "train" else "is held out; give more, or a larger data.validation_fraction"
                    raise DataError(f"data/corpus={self.corpus.name}: of {seen:,} records no chat {what} ({_told(splits)})")
            for split in splits.values():
                split.close()
            write_json(self.folder / TOKENIZER, self.learned)
            entries = {name: split.tokens.state.entry(split.tokens.index()) for name, split in splits.items()}
            manifest = manifest_of(self.corpus.name, self.tokenizer, self.learned or {}, dtype_of(self.tokenizer), entries)
            own = {name: split.written.state.entry(split.written.index()) for name, split in splits.items()}
            write_json(self.folder / MANIFEST, manifest | {"written": own, "chat": self.format.name, "pairs": self.corpus.pairs})
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _write(self, splits: dict[str, _Split], *, validation: bool) -> int:
        seen = 0
        for seen, found in enumerate(self.corpus.found(validation=validation), 1):
            if isinstance(found, str):
                splits["train"].skip(found)
                continue
            name = "val" if validation or (not self.corpus.validates and _held_out(found, self.config.validation_fraction)) else "train"
            splits[name].add(found)
            if seen % TELL_EVERY == 0:
                tokens = sum(split.tokens.state.tokens for split in splits.values())
                self.tell(Progress(self.source, name, "tokens", tokens, None, rows=seen, tokens=tokens))
        return seen


class ChatProblems:
    """Chats as problems: all but the last message is the prompt, and that is the right answer. Held out as their corpus holds them out:
    by the first question, or by a set of its own; two chats on either side may end with the same one.

    One whose prompt and answer together are longer than the `context` is passed over.
    """

    def __init__(self, corpus: ChatCorpus, share: float, tokenizer: Tokenizer, context: int) -> None:
        self.name, self.corpus, self.share = corpus.name, corpus, share
        self.tokenizer, self.context, self.format = tokenizer, context, format_of(tokenizer)
        self._sides: dict[bool, list[Example]] = {}

    def _side(self, held_out: bool) -> list[Example]:
        if held_out not in self._sides:
            own = self.corpus.validates
            found = [one for one in self.corpus.found(validation=own and held_out) if isinstance(one, Example)]
            found = found if own else [one for one in found if _held_out(one, self.share) == held_out]
            self._sides[held_out] = [one for one in found if self._fits(one)]
            if not self._sides[held_out]:
                what = "is held out" if held_out else "is left to learn from"
                raise DataError(f"data/corpus={self.name}: no chat {what} that fits model.context_length={self.context}, of {len(found):,}")
        return self._sides[held_out]

    def _fits(self, one: Example) -> bool:
        return len(render(one.messages, self.tokenizer, answer=False, format=self.format).tokens) <= self.context

    def problems(self, numbers: Sequence[int], seed: int, *, held_out: bool = False) -> list[Problem]:
        """As `Problems` says: an epoch after the other, each in an order of its own; those that are held out in the corpus's order."""
        side = self._side(held_out)
        found = []
        for number in numbers:
            epoch, place = divmod(number, len(side))
            at = place if held_out else int(permute(np.array([place]), len(side), key(seed, epoch))[0])
            *asked, answer = side[at].messages
            found.append(Problem(tuple(asked), answer.content))
        return found


def _held_out(example: Example, share: float) -> bool:
    """Drawn by what the user asks first: the same question is never on both sides, and more records move no other."""
    first = next((message.content for message in example.messages if message.role == "user"), "")
    return int.from_bytes(hashlib.sha256(first.strip().encode("utf-8", "surrogatepass")).digest()[:8], "big") < share * 2**64


def format_of(tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a tokeniser. Raises ConfigError where it has none."""
    found = chat_format(tokenizer)
    if found is None:
        raise ConfigError(
            f"the tokeniser {tokenizer.name} has no tokens of a chat; data/tokenizer=chat adds them "
            "(data.tokenizer.base=gpt2, or the file of one), and trainer.init_from=RUN adds them to that run's"
        )
    return found


def _told(splits: dict[str, _Split]) -> str:
    skipped = splits["train"].tokens.state.skipped
    counts = {name: split.tokens.state.documents for name, split in splits.items()} | skipped
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


class _Split:
    """The two streams of a split in the making."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, format: ChatFormat, pairs: bool) -> None:
        self.tokenizer, self.format, self.pairs = tokenizer, format, pairs
        self.dtype = dtype_of(tokenizer)
        self.tokens = SplitWriter(folder, name, self.dtype, SplitState())
        self.written = SplitWriter(folder, f"{name}.written", WRITTEN, SplitState())

    def skip(self, reason: str) -> None:
        skipped = self.tokens.state.skipped
        skipped[reason] = skipped.get(reason, 0) + 1

    def add(self, example: Example) -> None:
        """A chat; of a pair both, the chosen answer's first."""
        self._put(example.messages, whole=not self.pairs)
        if self.pairs:
            assert example.rejected is not None
            self._put((*example.messages[:-1], Message(ANSWERS, example.rejected)), whole=False)
        state = self.tokens.state
        for text in example.texts:
            state.bytes += len(text.encode("utf-8", "surrogatepass"))
            state.characters += len(text)

    def _put(self, messages: tuple[Message, ...], *, whole: bool) -> None:
        """`whole`: what the assistant wrote is all of its messages; else its last alone, by which two answers are compared."""
        made = render(messages, self.tokenizer, answer=False, format=self.format)
        own = np.array(made.written, np.uint8)
        if not whole:
            own[: len(render(messages[:-1], self.tokenizer, format=self.format).tokens)] = 0
        start = np.zeros(1, np.int64)
        self.tokens.write(np.array(made.tokens, self.dtype), start)
        self.written.write(own, start)

    def close(self) -> None:
        for writer in (self.tokens, self.written):
            writer.flush()
            writer.close()


def prepare_chat(config: DataConfig, corpus: ChatCorpus, tell: Report) -> Prepared:
    """The prepared chats of a config, found or made now. Raises ConfigError, DataError or IOFailure."""
    check_chat(config, corpus)
    return ChatWork(config, corpus, tell).run()


def prepare_chats(config: DataConfig, corpora: dict[str, ChatCorpus], weights: dict[str, float], tell: Report, only: str = "") -> Prepared:
    """A mix of chats: each prepared by itself, with one tokeniser; `val` is all their held-out chats together."""
    for corpus in corpora.values():
        check_chat(config, corpus)
        if corpus.pairs:
            raise ConfigError(f"data.corpus.sources: {corpus.name} holds pairs of answers, and these are no part of a mix")
    learned = learned_tokenizer(config, corpora, {}, shared=True, report=lambda s, n, t: tell(Progress(s, "reading", "characters", n, t)))
    parts = {name: ChatWork(config, c, tell, name, learned).run() for name, c in corpora.items() if only in ("", name)}
    if only:
        return parts[only]
    first = next(iter(parts.values()))
    assert learned is not None
    folder = home() / "data" / f"mix-{key_of({name: part.folder.name for name, part in parts.items()})}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).is_file():
        total = sum(part.manifest["splits"]["val"]["tokens"] for part in parts.values())
        head = manifest_of("mix", first.tokenizer, learned, first.dtype, {"val": {"shards": [], "tokens": total}})
        write_json(folder / TOKENIZER, learned)
        write_json(folder / MANIFEST, head | {"chat": first.manifest["chat"], "pairs": first.manifest["pairs"]})
    opened = open_prepared(folder)
    return Prepared(folder, opened.manifest, opened.tokenizer, parts=parts, weights=weights)
