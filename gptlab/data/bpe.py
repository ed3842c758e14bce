"""A byte-pair tokeniser of one's own: rustbpe or Hugging Face's tokenizers learn it, tiktoken encodes with it."""

from __future__ import annotations

import base64
import importlib
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import register
from gptlab.data.amount import amount
from gptlab.data.tokenizer import Ids

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = tuple(f"<|{role}_{end}|>" for role in ("system", "user", "assistant") for end in ("start", "end"))
BUFFER = 64  # texts that rustbpe holds at once; a corpus gives pieces of up to a megabyte

# How text is split before bytes are merged: as GPT-2, GPT-4 (cl100k) and GPT-4o (o200k) split it, in a spelling that the three
# regex engines (rustbpe's, tiktoken's, Hugging Face's) read alike. White space comes in pieces of a thousand at most: the
# published spelling fails on a run of a million, for want of a stack.
_SPACES = r"(?>\s{1,1000})(?!\S)|\s+(?!\S)|\s"
_LINES = r"\s{0,1000}[\r\n]+|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES,
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES,
    "gpt4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES,
}


@register("data/tokenizer", "bpe")
class BPETokenizer:
    """A byte-pair encoding learned from the text (Sennrich et al., 2016; over bytes, as in GPT-2).

    vocabulary     all tokens: 256 bytes, what is learned, and the special tokens, whose ids come last
    characters     how much text it learns from at most, as `100M`
    pattern        how text is split before bytes are merged; no token reaches over such a border
    special_tokens tokens that no text contains; `<|endoftext|>` is always one of them
    trainer        the package that learns; both compress alike, rustbpe learns several times faster
    """

    name = "bpe"
    separator = ""
    pad_vocab_to = 64  # the model pads its embedding to a multiple of this
    learns = True  # preparation gives `fit` a sample before anything is encoded

    def __init__(
        self,
        *,
        vocabulary: int = 32768,
        characters: str = "100M",
        pattern: Literal["gpt4", "gpt4o", "gpt2"] = "gpt4",
        special_tokens: tuple[str, ...] = (END_OF_TEXT, *CHAT_TOKENS),
        trainer: Literal["rustbpe", "tokenizers"] = "rustbpe",
    ) -> None:
        special = special_tokens if END_OF_TEXT in special_tokens else (END_OF_TEXT, *special_tokens)
        if "" in special or len(set(special)) < len(special):
            raise ConfigError(f"data.tokenizer.special_tokens={list(special_tokens)} must be different from one another and not empty")
        if vocabulary < 256 + len(special):
            raise ConfigError(
                f"data.tokenizer.vocabulary={vocabulary} is too small: "
                f"256 bytes and {len(special)} special tokens are {256 + len(special)} before anything is learned"
            )
        self.characters = amount("data.tokenizer.characters", characters)
        self.trainer = trainer
        self._pattern = PATTERNS[pattern]
        self._tokens: list[bytes] = []  # ordinary tokens by id
        self._encoding: tiktoken.Encoding | None = None
        self._place(special, vocabulary)

    def _place(self, special: tuple[str, ...], vocabulary: int) -> None:
        """Give the special tokens the last ids."""
        self.vocabulary = vocabulary
        self.special = {token: vocabulary - len(special) + i for i, token in enumerate(special)}  # ids that `encode` never gives
        self.end_of_text: int | None = self.special[END_OF_TEXT]

    def fit(self, texts: Iterable[str]) -> None:
        """Learn `vocabulary` tokens from the first `characters` of the texts; the same text gives the same tokens.

        Raises ConfigError when the trainer is not installed or the text holds too little for the vocabulary.
        """
        wanted = self.vocabulary - len(self.special)
        package = _package(self.trainer)
        reading = _Limited(texts, self.characters)
        if self.trainer == "rustbpe":
            tokens = _train_rustbpe(package, reading, wanted, self._pattern)
        else:
            tokens = _train_tokenizers(package, reading, wanted, self._pattern)
        if len(tokens) < wanted:
            most = len(tokens) + len(self.special)
            raise ConfigError(
                f"data.tokenizer.vocabulary={self.vocabulary}: the {reading.read:,} characters it learns from hold only {most:,} tokens; "
                f"set data.tokenizer.vocabulary={most} or less, or give it more text"
            )
        self._use(tokens, tuple(self.special), self._pattern)

    def encode(self, text: str) -> Ids:
        """Token ids of a text, without holding the GIL; special tokens are plain text, lone surrogates become U+FFFD."""
        ids: Ids = self._trained.encode_to_numpy(valid(text), disallowed_special=())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._trained.decode(list(ids), errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token."""
        return self._trained.decode_single_token_bytes(token)

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """(vocabulary,): the bytes of UTF-8 that each token stands for; 0 for special tokens."""
        return np.array([len(token) for token in self._tokens] + [0] * len(self.special), np.int64)

    def state(self) -> dict[str, Any]:
        """The pattern, the special tokens, and the ordinary tokens by id: base64 words in one string (0.4 MB for 32,768)."""
        words = " ".join(base64.b64encode(token).decode("ascii") for token in self._tokens)
        return {"pattern": self._pattern, "special_tokens": list(self.special), "tokens": words}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, whatever the options are. Raises DataError when it is damaged."""
        try:
            tokens = [base64.b64decode(word, validate=True) for word in state["tokens"].split(" ")]
            special = tuple(str(token) for token in state["special_tokens"])
            if len({*tokens}) < len(tokens) or len({*special}) < len(special) or not {bytes([i]) for i in range(256)} <= {*tokens}:
                raise ValueError("a token is missing or there twice")
            self._use(tokens, special, str(state["pattern"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"the state of a bpe tokeniser is damaged ({said}); make it anew") from error

    def _use(self, tokens: list[bytes], special: tuple[str, ...], pattern: str) -> None:
        import tiktoken

        self._tokens, self._pattern = tokens, pattern
        self._place(special, len(tokens) + len(special))
        ranks = {token: i for i, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding(
            self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special, explicit_n_vocab=self.vocabulary
        )

    @property
    def _trained(self) -> tiktoken.Encoding:
        if self._encoding is None:
            raise ConfigError("data/tokenizer=bpe has learned nothing yet; train it on a text before it encodes or decodes")
        return self._encoding


def _package(trainer: str) -> ModuleType:
    try:
        return importlib.import_module(trainer)
    except ImportError as error:
        other = "tokenizers" if trainer == "rustbpe" else "rustbpe"
        raise ConfigError(
            f"data.tokenizer.trainer={trainer} is not installed; "
            f"run `pip install 'gptlab[bpe]'`, or choose data.tokenizer.trainer={other} if you have that"
        ) from error


def valid(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD; pairs of them become their character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class _Limited:
    """Texts up to a number of characters in all; the last one is cut. `read` counts what was given."""

    def __init__(self, texts: Iterable[str], characters: int) -> None:
        self.texts, self.characters, self.read = texts, characters, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            part = text[: self.characters - self.read]
            self.read += len(part)
            yield valid(part)
            if self.read >= self.characters:
                return


def _train_rustbpe(rustbpe: ModuleType, texts: Iterable[str], size: int, pattern: str) -> list[bytes]:
    """Up to `size` tokens in the order of their ids: the 256 bytes, then what was merged."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), size, BUFFER, pattern)
    return [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]


def _train_tokenizers(tokenizers: ModuleType, texts: Iterable[str], size: int, pattern: str) -> list[bytes]:
    """The same by Hugging Face's tokenizers, with its ids, whose 256 bytes stand in the order of their letters."""
    split = importlib.import_module("tokenizers.pre_tokenizers")
    model = tokenizers.Tokenizer(importlib.import_module("tokenizers.models").BPE())
    by_pattern = split.Split(tokenizers.Regex(pattern), "isolated")
    model.pre_tokenizer = split.Sequence([by_pattern, split.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = importlib.import_module("tokenizers.trainers").BpeTrainer(
        vocab_size=size, initial_alphabet=split.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    model.train_from_iterator(iter(texts), trainer)
    byte_of = byte_letters()
    by_id = sorted(model.get_vocab().items(), key=lambda pair: pair[1])
    return [bytes(byte_of[letter] for letter in token) for token, _ in by_id]


def byte_letters() -> dict[str, int]:
    """The byte that each letter stands for in GPT-2's vocabulary: visible Latin-1 for itself, the 68 others from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
