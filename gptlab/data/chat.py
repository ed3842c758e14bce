"""Chats as tokens: whose turn it is stands in special tokens, which the text of a message can never hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptlab.config.errors import ConfigError
from gptlab.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
ANSWERS = "assistant"


@dataclass(frozen=True)
class Message:
    """What one side of a chat says."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendered:
    """A chat as token ids. `written`: of each, whether the assistant wrote it; the token that ends an answer is its own too."""

    tokens: list[int]
    written: list[bool]


@dataclass(frozen=True)
class ChatFormat:
    """What stands around a message, as token ids by role; `ends`: what ends an answer. `closing` goes between two messages."""

    name: str
    begin: tuple[int, ...]  # before the first message
    opening: Mapping[str, tuple[int, ...]]
    end: Mapping[str, int]
    closing: tuple[int, ...]
    ends: frozenset[int]
    trims: bool = False  # white space around a message is no part of it


def end_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """What ends a text that is no chat: the end-of-text token, if there is one."""
    return frozenset() if tokenizer.end_of_text is None else frozenset({tokenizer.end_of_text})


def chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """The format that a tokeniser's special tokens are made for; None where they are for none, as those of a base model.

    Known are gptlab's own (`<|user_start|>`), ChatML (`<|im_start|>user`), and that of Llama 3 (`<|start_header_id|>user`).
    """
    special: Mapping[str, int] = getattr(tokenizer, "special", {})
    end_of_text = end_tokens(tokenizer)
    first: int | None = getattr(tokenizer, "begin_of_text", None)  # what an imported model may expect before every text
    begin = () if first is None else (first,)
    opening: dict[str, tuple[int, ...]]

    def named(*names: str) -> frozenset[int]:
        return frozenset({special[name] for name in names if name in special} | end_of_text)

    def plain(text: str) -> tuple[int, ...]:
        return tuple(int(token) for token in tokenizer.encode(text))

    if all(f"<|{role}_{side}|>" in special for role in ROLES for side in ("start", "end")):
        opening = {role: (special[f"<|{role}_start|>"],) for role in ROLES}
        end = {role: special[f"<|{role}_end|>"] for role in ROLES}
        return ChatFormat("gptlab", begin, opening, end, (), named("<|assistant_end|>"))
    if {"<|im_start|>", "<|im_end|>"} <= special.keys():
        opening = {role: (special["<|im_start|>"], *plain(f"{role}\n")) for role in ROLES}
        end = dict.fromkeys(ROLES, special["<|im_end|>"])
        return ChatFormat("chatml", begin, opening, end, plain("\n"), named("<|im_end|>"))
    if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= special.keys():
        head, tail, two = special["<|start_header_id|>"], special["<|end_header_id|>"], plain("\n\n")
        opening = {role: (head, *plain(role), tail, *two) for role in ROLES}
        begin = begin or ((special["<|begin_of_text|>"],) if "<|begin_of_text|>" in special else ())
        end = dict.fromkeys(ROLES, special["<|eot_id|>"])
        return ChatFormat("llama3", begin, opening, end, (), named("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), trims=True)
    return None


def check(messages: Sequence[Message]) -> None:
    """Raises ConfigError, in a sentence, for no message, an unknown role, or a message without a word."""
    if not messages:
        raise ConfigError("messages: there are none; give at least one of the user")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise ConfigError(f"messages[{i}].role {message.role!r} is not one of {', '.join(ROLES)}")
        if not message.content:
            raise ConfigError(f"messages[{i}].content is empty; give at least one character")


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, answer: bool = True) -> Rendered:
    """The tokens of a chat. With `answer` they end where the assistant is to write: after its opening, or, where the last message is
    its own, within that message, which it then goes on with. Without, as for training, every message is closed.

    The messages' text is encoded as plain text: a user who writes `<|assistant_start|>` has written just those letters.
    Raises ConfigError where the tokeniser has no chat format, or for messages that `check` refuses.
    """
    found = chat_format(tokenizer)
    if found is None:
        raise ConfigError(f"the tokeniser {tokenizer.name} has no chat tokens: a base model, which continues a text and knows no messages")
    check(messages)
    tokens, written = list(found.begin), [False] * len(found.begin)

    def add(ids: Sequence[int], own: bool) -> None:
        tokens.extend(ids)
        written.extend([own] * len(ids))

    for i, message in enumerate(messages):
        own, last = message.role == ANSWERS, i == len(messages) - 1
        goes_on = answer and own and last
        content = message.content
        if found.trims:
            content = content.lstrip() if goes_on else content.strip()
        add(found.opening[message.role], False)
        add([int(token) for token in tokenizer.encode(content)], own)
        if not goes_on:
            add([found.end[message.role]], own)
            add(found.closing, False)
    if answer and messages[-1].role != ANSWERS:
        add(found.opening[ANSWERS], False)
    return Rendered(tokens, written)
