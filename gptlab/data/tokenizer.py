"""Tokenisers: from text to token ids and back. Characters and bytes are ours; BPE is tiktoken's."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gptlab.config import codec
from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import build, component_of, register
from gptlab.config.slots import Options
from gptlab.config.slots import Tokenizer as TokenizerSlot

Ids = npt.NDArray[np.uint32]


class Tokenizer(Protocol):
    """What data preparation and generation ask of a tokeniser."""

    name: str
    vocabulary: int
    end_of_text: int | None  # the id between documents; None: documents are joined by `separator`
    separator: str

    def fit(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary, where there is something to learn."""

    def encode(self, text: str) -> Ids:
        """Token ids of a text. Special tokens in the text are plain text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """(vocabulary,): the bytes of UTF-8 that each token stands for; 0 for a token between documents."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON data."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


@register("data/tokenizer", "char")
class CharTokenizer:
    """One token per distinct character of the corpus."""

    name = "char"
    end_of_text = None
    separator = "\n\n"

    def __init__(self) -> None:
        self.characters = ""
        self.vocabulary = 0
        self._table: npt.NDArray[np.int32] = np.full(0, -1, np.int32)

    def fit(self, texts: Iterable[str]) -> None:
        found: set[str] = set()
        for text in texts:
            found.update(text)
        self.restore({"characters": "".join(sorted(found))})

    def encode(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        known = points < len(self._table)
        ids = np.full(len(points), -1, np.int32)
        ids[known] = self._table[points[known]]
        if (ids < 0).any():
            at = int(np.argmax(ids < 0))
            shown = "".join(c for c in self.characters if c.isprintable())[:100]
            raise ConfigError(
                f"the character {text[at]!r} at place {at + 1} is not among the {self.vocabulary} characters the tokeniser knows: {shown}"
            )
        return ids.astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(c.encode("utf-8")) for c in self.characters], np.int64)

    def state(self) -> dict[str, Any]:
        return {"characters": self.characters}

    def restore(self, state: dict[str, Any]) -> None:
        self.characters = state["characters"]
        self.vocabulary = len(self.characters)
        points = np.array([ord(c) for c in self.characters], np.int64)
        self._table = np.full(int(points.max(initial=-1)) + 1, -1, np.int32)
        self._table[points] = np.arange(len(points))


@register("data/tokenizer", "byte")
class ByteTokenizer:
    """One token per byte of UTF-8, and one between documents: knows every text."""

    name = "byte"
    vocabulary = 257
    end_of_text: int | None = 256
    separator = ""

    def fit(self, texts: Iterable[str]) -> None:
        """Nothing to learn."""

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([1] * 256 + [0], np.int64)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        return bytes([token]) if token < 256 else b""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class TiktokenTokenizer:
    """A BPE of tiktoken's, by name."""

    separator = ""

    def __init__(self, name: str, encoding: str) -> None:
        import tiktoken

        self.name = name
        try:
            self._encoding = tiktoken.get_encoding(encoding)
        except Exception as error:  # requests' errors, and ValueError for a damaged file
            raise IOFailure(
                f"data/tokenizer={name}: its vocabulary could not be fetched ({type(error).__name__}); "
                "without a network, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use data/tokenizer=byte"
            ) from error
        self.vocabulary = self._encoding.n_vocab
        self.end_of_text: int | None = self._encoding.eot_token
        self.special = dict(self._encoding._special_tokens)  # ids that `encode` never gives

    def fit(self, texts: Iterable[str]) -> None:
        """Nothing to learn."""

    def encode(self, text: str) -> Ids:
        ids: Ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids), errors="replace")

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        found = np.zeros(self.vocabulary, np.int64)
        special = self.special.values()
        for token in range(self.vocabulary):
            if token not in special:
                with contextlib.suppress(KeyError):  # some ids of o200k stand for nothing
                    found[token] = len(self.token_bytes(token))
        return found

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        return self._encoding.decode_single_token_bytes(token)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


@register("data/tokenizer", "gpt2")
def gpt2() -> TiktokenTokenizer:
    """GPT-2's BPE: 50,257 tokens."""
    return TiktokenTokenizer("gpt2", "gpt2")


@register("data/tokenizer", "cl100k")
def cl100k() -> TiktokenTokenizer:
    """GPT-4's BPE: 100,277 tokens."""
    return TiktokenTokenizer("cl100k", "cl100k_base")


@register("data/tokenizer", "o200k")
def o200k() -> TiktokenTokenizer:
    """GPT-4o's BPE: 200,019 tokens."""
    return TiktokenTokenizer("o200k", "o200k_base")


def to_json(tokenizer: Tokenizer, options: Options | None = None) -> dict[str, Any]:
    """A tokeniser as JSON data: its registered name, the options it was built with (None: its defaults), what it has learned."""
    name = tokenizer.name if options is None else component_of(options).name
    written = {} if options is None else {k: v for k, v in codec.encode(options).items() if k != "name"}
    data = {"version": 1, "name": name, "vocabulary": tokenizer.vocabulary, "state": tokenizer.state()}
    return data | ({"options": written} if written else {})


def from_json(data: dict[str, Any], where: str) -> Tokenizer:
    """Read what `to_json` wrote. Raises DataError, ConfigError (not registered) or IOFailure (vocabulary not to be had)."""
    if data.get("version") != 1:
        raise DataError(f"{where}: tokeniser version {data.get('version')!r}; this gptlab reads version 1")
    options = codec.decode(TokenizerSlot, {"name": data["name"], **data.get("options", {})}, where)
    tokenizer: Tokenizer = build(options)
    tokenizer.restore(data["state"])
    if tokenizer.vocabulary != data["vocabulary"]:
        raise DataError(f"{where}: {data['vocabulary']} tokens written, {tokenizer.vocabulary} read back")
    return tokenizer


def digest(data: dict[str, Any]) -> str:
    """SHA-256 of what `to_json` gave: the tokeniser's identity in a manifest."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
