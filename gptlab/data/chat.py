"""Chats as tokens: whose turn it is stands in special tokens, which the text of a message can never hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptlab.config.errors import ConfigError
from gptlab.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")  # tool: what a tool gave back
ANSWERS = "assistant"
# What data sets call the sides of a chat. A call of a tool is the assistant's message.
NAMES_OF_SIDES = {
    **{role: role for role in ROLES},
    "human": "user", "prompter": "user", "gpt": ANSWERS, "model": ANSWERS, "chatbot": ANSWERS, "function_call": ANSWERS,
    "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "tool", "developer": "system",
}  # fmt: skip
PLAIN = {"system": "", "user": "User:\n", "tool": "Tool:\n", ANSWERS: "Assistant:\n"}  # no space behind: a word brings its own


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
    """What stands around a message, as token ids by role; `ends`: what ends an answer. `closing` goes behind the end of a message.

    Where a format has no tokens for what a tool gives back, that stands as a message of the user's.
    """

    name: str
    begin: tuple[int, ...]  # before the first message
    opening: Mapping[str, tuple[int, ...]]
    end: Mapping[str, tuple[int, ...]]
    closing: tuple[int, ...]
    ends: frozenset[int]
    trims: bool = False  # white space around a message is no part of it


def end_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """What ends a text that is no chat: the end-of-text token, if there is one."""
    return frozenset() if tokenizer.end_of_text is None else frozenset({tokenizer.end_of_text})


def chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """The format that a tokeniser's special tokens are made for; None where they are for none, as those of a base model.

    Known are gptlab's own (`<|user_start|>`), ChatML (`<|im_start|>user`), that of Llama 3 (`<|start_header_id|>user`), and plain words
    (`User: `), where data/tokenizer=chat says so.
    """
    template = getattr(tokenizer, "template", None)
    special: Mapping[str, int] = getattr(tokenizer, "special", {})
    end_of_text = end_tokens(tokenizer)
    first: int | None = getattr(tokenizer, "begin_of_text", None)  # what an imported model may expect before every text
    begin = () if first is None else (first,)

    def named(*names: str) -> frozenset[int]:
        return frozenset({special[name] for name in names if name in special} | end_of_text)

    def plain(text: str) -> tuple[int, ...]:
        return tuple(int(token) for token in tokenizer.encode(text))

    def own() -> ChatFormat:
        talkers = [role for role in ROLES if f"<|{role}_start|>" in special]
        opening = {role: (special[f"<|{role}_start|>"],) for role in talkers}
        end = {role: (special[f"<|{role}_end|>"],) for role in talkers}
        if "tool" not in talkers:
            opening["tool"], end["tool"] = opening["user"], end["user"]
        return ChatFormat("gptlab", begin, opening, end, (), named("<|assistant_end|>"))

    def chatml() -> ChatFormat:
        opening = {role: (special["<|im_start|>"], *plain(f"{role}\n")) for role in ROLES}
        return ChatFormat("chatml", begin, opening, dict.fromkeys(ROLES, (special["<|im_end|>"],)), plain("\n"), named("<|im_end|>"))

    def llama3() -> ChatFormat:
        head, tail, two = special["<|start_header_id|>"], special["<|end_header_id|>"], plain("\n\n")
        opening = {role: (head, *plain("ipython" if role == "tool" else role), tail, *two) for role in ROLES}
        first = begin or ((special["<|begin_of_text|>"],) if "<|begin_of_text|>" in special else ())
        ends = named("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
        return ChatFormat("llama3", first, opening, dict.fromkeys(ROLES, (special["<|eot_id|>"],)), (), ends, trims=True)

    def words() -> ChatFormat:
        opening = {role: plain(word) for role, word in PLAIN.items()}
        end = {role: tuple(end_of_text) if role == ANSWERS else plain("\n") for role in ROLES}
        return ChatFormat("plain", begin, opening, end, (), end_of_text, trims=True)

    known = {
        "gptlab": (own, all(f"<|{role}_{side}|>" in special for role in ROLES[:3] for side in ("start", "end"))),
        "chatml": (chatml, {"<|im_start|>", "<|im_end|>"} <= special.keys()),
        "llama3": (llama3, {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= special.keys()),
        "plain": (words, template == "plain"),
    }
    wanted = [template] if template in known else list(known)
    return next((make() for make, there in (known[name] for name in wanted) if there), None)


def check(messages: Sequence[Message]) -> None:
    """Raises ConfigError, in a sentence, for no message, an unknown role, or a message without a word."""
    if not messages:
        raise ConfigError("messages: there are none; give at least one of the user")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise ConfigError(f"messages[{i}].role {message.role!r} is not one of {', '.join(ROLES)}")
        if not message.content:
            raise ConfigError(f"messages[{i}].content is empty; give at least one character")


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, answer: bool = True, format: ChatFormat | None = None) -> Rendered:
    """The tokens of a chat. With `answer` they end where the assistant is to write: after its opening, or, where the last message is
    its own, within that message, which it then goes on with. Without, as for training, every message is closed.

    The messages' text is encoded as plain text: a user who writes `<|assistant_start|>` has written just those letters. `format`: the
    tokeniser's, where it is at hand. Raises ConfigError where the tokeniser has no chat format, or for messages that `check` refuses.
    """
    found = format or chat_format(tokenizer)
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
            add(found.end[message.role], own)
            add(found.closing, False)
    if answer and messages[-1].role != ANSWERS:
        add(found.opening[ANSWERS], False)
    return Rendered(tokens, written)
