"""A tokeniser that came with a pretrained model: the data of its tokenizer.json, which Hugging Face's library reads."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import register
from gptlab.data.bpe import byte_letters, valid
from gptlab.data.tokenizer import Ids

SPACE = "\u2581"  # what SentencePiece writes for a space


@register("data/tokenizer", "huggingface")
class HuggingFaceTokenizer:
    """The tokeniser of an imported model, which `gptlab import` makes; `data/tokenizer=file` trains a model of your own with it."""

    name = "huggingface"
    separator = ""
    comes_fitted = True  # nothing can be asked of it before `restore`

    def __init__(self) -> None:
        self.vocabulary = 0
        self.end_of_text: int | None = None
        self.begin_of_text: int | None = None  # what its models expect before every text
        self.special: dict[str, int] = {}
        self._state: dict[str, Any] = {}
        self._bytes: list[bytes] = []

    def fit(self, texts: Iterable[str]) -> None:
        """Refused: it comes with a model. Raises ConfigError."""
        if not self._state:
            raise ConfigError(
                "data/tokenizer=huggingface comes with a model and learns nothing: name it by data/tokenizer=file "
                "data.tokenizer.path=PATH, a run's folder or a tokenizer.json; data/tokenizer=bpe learns one of your own"
            )

    def encode(self, text: str) -> Ids:
        """Token ids of a text; special tokens in it are plain text, and none is added."""
        return np.array(self._own.encode(valid(text), add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._own.decode(list(ids), skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for within a text, which may be a part of a character."""
        return self._bytes[token]

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """(vocabulary,): the bytes of UTF-8 that each token stands for; 0 for special tokens."""
        special = set(self.special.values())
        return np.array([0 if i in special else len(b) for i, b in enumerate(self._bytes)], np.int64)

    def state(self) -> dict[str, Any]:
        """The tokenizer.json as text, and which tokens end and begin a text."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave. Raises ConfigError without the library, DataError for what it cannot read."""
        try:
            content = json.loads(state["tokenizer"])
            self._own = _library().Tokenizer.from_str(state["tokenizer"])
            self._own.encode_special_tokens = True
            known = self._own.get_vocab(with_added_tokens=True)
            self.special = {t["content"]: int(t["id"]) for t in content.get("added_tokens", []) if t.get("special")}
            self._bytes = _token_bytes(content, known, self.special)
            self.vocabulary = len(self._bytes)
            self.end_of_text, self.begin_of_text = (_id(state.get(k), self.vocabulary) for k in ("end_of_text", "begin_of_text"))
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"the tokenizer.json of a model cannot be read ({' '.join(str(error).split())[:200]})") from error
        self._state = dict(state)


def _id(value: Any, vocabulary: int) -> int | None:
    if value is not None and not 0 <= int(value) < vocabulary:
        raise ValueError(f"token {value} is not among its {vocabulary}")
    return None if value is None else int(value)


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ConfigError("data/tokenizer=huggingface needs the tokenizers library: pip install 'gptlab[interop]'") from error


def _token_bytes(content: Mapping[str, Any], known: Mapping[str, int], special: Mapping[str, int]) -> list[bytes]:
    """The bytes of each token by id: spelt in GPT-2's letters, with SentencePiece's marks, or as they are; none for an id of no token."""
    parts = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    letters = byte_letters() if '"ByteLevel"' in parts else {}
    marks = SPACE in parts or '"Metaspace"' in parts
    if '"WordPiece"' in parts:
        raise ValueError("a WordPiece tokeniser loses white space, and no GPT has one")
    found = [b""] * (max(known.values()) + 1)
    for token, number in known.items():
        if token in special or not (letters or marks):
            found[number] = token.encode()
        elif letters:
            found[number] = bytes(letters[c] for c in token) if all(c in letters for c in token) else token.encode()
        elif len(token) == 6 and token.startswith("<0x"):
            found[number] = bytes([int(token[3:5], 16)])
        else:
            found[number] = token.replace(SPACE, " ").encode()
    return found
