"""Corpora of chats: your own files, and data sets of the hub. Prepared they are tokens, and which of these the assistant wrote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import register
from gptlab.data.chat import ANSWERS, NAMES_OF_SIDES, Message
from gptlab.data.chat_records import BadRecord, Example, example, files_of, read_records
from gptlab.data.corpus import file_key
from gptlab.data.hub import Hub
from gptlab.data.reader import Piece, text_files

Found = Example | str  # a chat, or why a record is passed over


class ChatCorpus(ABC):
    """A source of chats. `pairs`: each has a second, worse answer, and both are kept."""

    name: str
    pairs = False
    validates = False  # whether it has a validation set of its own

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells these chats from others without reading them all."""

    @abstractmethod
    def found(self, *, validation: bool = False) -> Iterator[Found]:
        """Every record in order; those of its own validation set. Raises ConfigError, DataError or IOFailure."""

    def pieces(self) -> Iterator[Piece]:
        """What is said, message by message: for what reads a corpus as text, as a tokeniser that learns."""
        for one in self.found():
            if isinstance(one, Example):
                for text in one.texts:
                    yield Piece(text, True)


class _Files(ChatCorpus):
    def __init__(self, path: str, bad: str, records: int) -> None:
        self.files = files_of(path, "data.corpus.path", text_files)
        if records < 0:
            raise ConfigError(f"data.corpus.records={records} must be at least 1 (0: all)")
        self.bad, self.records = bad, records

    def fingerprint(self) -> dict[str, Any]:
        return {"files": [file_key(f) for f in self.files], "bad": self.bad, "records": self.records, "pairs": self.pairs}

    def found(self, *, validation: bool = False) -> Iterator[Found]:
        count = 0
        for file in self.files:
            for line, record in read_records(file):
                count += 1
                if self.records and count > self.records:
                    return
                try:
                    yield _checked(record, self.pairs)
                except BadRecord as error:
                    if self.bad == "refuse":
                        raise DataError(
                            f"{file}, line {line}: {error}; mend it, or data.corpus.bad=skip passes over such records"
                        ) from error
                    yield "bad"


def _checked(record: Any, pairs: bool) -> Example:
    made = example(record)
    if pairs and made.rejected is None:
        raise BadRecord("there is no `rejected` answer beside the `chosen` one")
    return made if pairs else Example(made.messages)


@register("data/corpus", "chat")
class ChatFiles(_Files):
    """Your own chats: .json or .jsonl in the forms of Alpaca, ShareGPT or OpenAI, which are told apart by themselves.

    path     a file, a folder or a glob
    bad      a record that is no chat, or whose roles are out of order: `refuse` names its file and line, `skip` counts it
    records  only so many from the beginning; 0: all
    """

    name = "chat"

    def __init__(self, *, path: str, bad: Literal["refuse", "skip"] = "refuse", records: int = 0) -> None:
        super().__init__(path, bad, records)


@register("data/corpus", "preferences")
class Preferences(_Files):
    """Your own preferences: chats with a `chosen` and a `rejected` answer, .json or .jsonl, for objective=dpo. Options as of chat."""

    name = "preferences"
    pairs = True

    def __init__(self, *, path: str, bad: Literal["refuse", "skip"] = "refuse", records: int = 0) -> None:
        super().__init__(path, bad, records)


@register("data/corpus", "chat_hub")
class ChatHub(ChatCorpus):
    """Chats of a data set of the Hugging Face hub, whose commit is pinned at first use; its records' form is told by itself.

    validation_split  its own held-out split; empty: a share of the chats (data.validation_fraction)
    preferences       keep a rejected answer beside each chosen one, for objective=dpo
    records           only so many from the beginning; 0: all
    """

    def __init__(
        self,
        *,
        dataset: str,
        config: str = "",
        split: str = "train",
        revision: str = "",
        validation_split: str = "",
        preferences: bool = False,
        records: int = 0,
    ) -> None:
        self.hub = Hub(dataset=dataset, config=config, split=split, revision=revision, validation_split=validation_split)
        if records < 0:
            raise ConfigError(f"data.corpus.records={records} must be at least 1 (0: all)")
        self.name, self.pairs, self.records, self.validates = self.hub.name, preferences, records, bool(validation_split)

    def fingerprint(self) -> dict[str, Any]:
        asked = self.hub.fingerprint()
        kept = {name: asked[name] for name in ("dataset", "config", "split", "revision", "validation_split")}
        return kept | {"pairs": self.pairs, "records": self.records}

    @property
    def pinned(self) -> bool:
        """Whether its commit is known without asking the hub."""
        return self.hub.pinned

    def found(self, *, validation: bool = False) -> Iterator[Found]:
        for count, record in enumerate(self.hub.records(validation=validation), 1):
            if self.records and count > self.records:
                return
            try:
                yield _checked(record, self.pairs)
            except BadRecord:
                yield "bad"


@register("data/corpus", "oasst")
class OpenAssistant(ChatCorpus):
    """OpenAssistant's conversations (Köpf et al., 2023), from the hub: of each tree of messages its best answers, in one `language`."""

    name = "oasst"

    def __init__(self, *, dataset: str = "OpenAssistant/oasst2", language: str = "en", revision: str = "") -> None:
        self.hub = Hub(dataset=dataset, split="train", revision=revision, validation_split="validation")
        self.language = language
        self.validates = True

    def fingerprint(self) -> dict[str, Any]:
        return {"dataset": self.hub.dataset, "language": self.language, "revision": self.hub.commit()}

    @property
    def pinned(self) -> bool:
        """Whether its commit is known without asking the hub."""
        return self.hub.pinned

    def found(self, *, validation: bool = False) -> Iterator[Found]:
        children: dict[str | None, list[Mapping[str, Any]]] = {}
        for record in self.hub.records(validation=validation):
            if record.get("lang") == self.language and not record.get("deleted"):
                children.setdefault(record.get("parent_id"), []).append(record)
        for root in children.get(None, []):
            turns: list[Message] = []
            at: Mapping[str, Any] | None = root
            while at is not None:
                turns.append(Message(NAMES_OF_SIDES.get(str(at["role"]), "user"), str(at["text"])))
                below = children.get(at["message_id"], [])
                at = min(below, key=_rank) if below else None
            if turns[-1].role != ANSWERS:
                turns.pop()
            yield Example(tuple(turns)) if turns and all(turn.content.strip() for turn in turns) else "no answer"


def _rank(record: Mapping[str, Any]) -> tuple[float, str]:
    """The best answer first; of unranked ones the first by its name."""
    rank = record.get("rank")
    return (float("inf") if rank is None else float(rank)), str(record["message_id"])
