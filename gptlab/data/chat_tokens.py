"""Any tokeniser with the tokens of a chat behind its own: what a base model's lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, components, register
from gptlab.data.bpe import CHAT_TOKENS
from gptlab.data.tokenizer import Ids, Tokenizer, from_json, to_json
from gptlab.data.tokenizer_file import written_in

TEMPLATES: dict[str, tuple[str, ...]] = {
    "gptlab": CHAT_TOKENS,
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": (),
}
NEED_MORE = ("chat", "file", "huggingface", "char", "bpe")  # than their name to be built


class ChatTokenizer:
    """A base tokeniser, and the special tokens of a template that it has not: they get the ids behind its own, which stay as they are.

    No text encodes to a special token. Raises ConfigError for a plain template without a token between documents, which ends an answer,
    and for a base that has a token of the template's and takes it for text.
    """

    name = "chat"

    def __init__(self, base: dict[str, Any], template: str) -> None:
        """`base`: as `to_json` writes it."""
        self._take(base, template)

    def _take(self, written: dict[str, Any], template: str) -> None:
        base = from_json(written, "the base of a chat tokeniser")
        self.base, self.template, self._written = base, template, written
        if template == "plain" and base.end_of_text is None:
            raise ConfigError(
                f"data.tokenizer.template=plain ends an answer with the end-of-text token, and the tokeniser {base.name} has none; "
                "use template=gptlab, chatml or llama3, which add tokens of their own"
            )
        known: dict[str, int] = dict(getattr(base, "special", {}))
        for name in TEMPLATES[template]:
            if name not in known and (number := _token_of_text(base, name)) is not None:
                raise ConfigError(
                    f"data.tokenizer.template={template}: the tokeniser {base.name} takes {name} for text (token {number}), so that a "
                    "message could hold it; mark it as special in its file, or use another template"
                )
        self.added = {name: base.vocabulary + i for i, name in enumerate(n for n in TEMPLATES[template] if n not in known)}
        self.special = known | self.added
        self._names = {number: name for name, number in self.added.items()}
        self.vocabulary = base.vocabulary + len(self.added)
        self.end_of_text, self.separator = base.end_of_text, base.separator
        self.begin_of_text: int | None = getattr(base, "begin_of_text", None)
        if hasattr(base, "pad_vocab_to"):
            self.pad_vocab_to = base.pad_vocab_to

    def fit(self, texts: Iterable[str]) -> None:
        """Nothing to learn: the base has."""

    def encode(self, text: str) -> Ids:
        return self.base.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._names[part[0]] if part[0] in self._names else self.base.decode(part) for part in self._runs(ids))

    def _runs(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """The ids, cut around each added token."""
        held: list[int] = []
        for number in (int(i) for i in ids):
            if number in self._names:
                if held:
                    yield held
                yield [number]
                held = []
            else:
                held.append(number)
        if held:
            yield held

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.concatenate((self.base.byte_lengths(), np.zeros(len(self.added), np.int64)))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character; of a token of the chat nothing."""
        if token in self._names:
            return b""
        own = getattr(self.base, "token_bytes", None)
        return own(token) if own is not None else self.base.decode([token]).encode()

    def state(self) -> dict[str, Any]:
        return {"template": self.template, "base": self._written}

    def restore(self, state: dict[str, Any]) -> None:
        self._take(state["base"], str(state["template"]))


def _token_of_text(base: Tokenizer, name: str) -> int | None:
    """The single token that a text which is this name becomes; None where it becomes several, or cannot be told."""
    try:
        ids = base.encode(name)
    except ConfigError:  # it knows no such character
        return None
    return int(ids[0]) if len(ids) == 1 else None


@register("data/tokenizer", "chat")
def chat(*, base: str = "byte", template: Literal["gptlab", "chatml", "llama3", "plain"] = "gptlab") -> ChatTokenizer:
    """A tokeniser with the special tokens of a chat `template` added behind its own.

    `base`: the name of one that needs no training (byte, gpt2, cl100k, o200k), or the file of one that is there: a run's or your own
    tokenizer.json. With trainer.init_from it is that run's. The templates: gptlab's own tokens around each message, ChatML, Llama 3's,
    or plain words (`User: …`) without a token of their own.
    """
    return ChatTokenizer(_base(base), template)


def _base(base: str) -> dict[str, Any]:
    if "/" not in base and not Path(base).expanduser().exists():
        fixed = {c.name: c for c in components("data/tokenizer") if c.name not in NEED_MORE}
        if base not in fixed:
            raise ConfigError(
                f"data.tokenizer.base={base} is neither a tokeniser that needs no training ({', '.join(sorted(fixed))}) nor a file"
            )
        options = fixed[base].options()
        return to_json(build(options), options)
    return written_in(base)
