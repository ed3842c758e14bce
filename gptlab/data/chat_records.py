"""Chats in the forms that data sets have them: a record of Alpaca's, ShareGPT's, OpenAI's or of questions and answers, as messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.data.chat import ANSWERS, NAMES_OF_SIDES, Message

FORMS = (
    'OpenAI\'s {"messages": [{"role", "content"}]}, ShareGPT\'s {"conversations": [{"from", "value"}]}, '
    'Alpaca\'s {"instruction", "output"}, {"prompt", "completion"} or {"question", "answer"}, '
    'and {"prompt", "chosen", "rejected"} for preferences'
)
ANSWER_KEYS = ("output", "response", "completion", "answer", "chosen")


class BadRecord(ValueError):
    """A record that is no chat; says why."""


@dataclass(frozen=True)
class Example:
    """A chat, whose last message is the assistant's; `rejected`: another last message, that is worse."""

    messages: tuple[Message, ...]
    rejected: str | None = None

    @property
    def texts(self) -> Iterator[str]:
        """Everything that is said."""
        yield from (message.content for message in self.messages)
        if self.rejected is not None:
            yield self.rejected


def example(record: Any) -> Example:
    """A record of any known form. Raises BadRecord, in a sentence, where it is none or its roles are out of order."""
    if not isinstance(record, Mapping):
        raise BadRecord(f"a record is {type(record).__name__}, not an object with fields")
    messages = _messages(record)
    rejected = None
    if record.get("rejected") is not None:
        if record.get("chosen") is None:
            raise BadRecord("it has `rejected` and no `chosen`")
        *before, last = _answer(record["chosen"], messages, "chosen")
        *other, worse = _answer(record["rejected"], messages, "rejected")
        if other != before:
            raise BadRecord("`chosen` and `rejected` do not answer the same messages")
        if not worse.content.strip() or not encodable(worse.content):
            raise BadRecord("`rejected` is empty, or no text that UTF-8 can hold")
        if worse.content == last.content:
            raise BadRecord("`chosen` and `rejected` are the same answer")
        messages, rejected = [*before, last], worse.content
    elif record.get("chosen") is not None and "prompt" in record and not isinstance(record["chosen"], str):
        messages = _answer(record["chosen"], messages, "chosen")
    if record.get("label") in (False, 0) and "completion" in record:
        raise BadRecord("its `label` says that the completion is a bad answer, which only `rejected` beside a `chosen` one can be")
    _check_order(messages)
    return Example(tuple(messages), rejected)


def _messages(record: Mapping[str, Any]) -> list[Message]:
    """All messages of a record; of preferences those before the answers."""
    for key, role, text in (("messages", "role", "content"), ("conversations", "from", "value"), ("conversation", "role", "content")):
        if isinstance(record.get(key), Sequence) and not isinstance(record[key], str):
            return _with_system(record, _turns(record[key], key, role, text))
    if isinstance(record.get("prompt"), Sequence) and not isinstance(record["prompt"], str):
        before = _turns(record["prompt"], "prompt", "role", "content")
        return _with_system(record, before if record.get("completion") is None else _answer(record["completion"], before, "completion"))
    question = next((key for key in ("instruction", "prompt", "question") if isinstance(record.get(key), str)), None)
    if question is None:
        if isinstance(record.get("chosen"), Sequence) and not isinstance(record["chosen"], str):
            return []  # whole chats on both sides
        raise BadRecord(f"none of the known forms ({FORMS}); it has {', '.join(map(str, record)) or 'no field'}")
    asked = [str(record[question])] if record[question].strip() else []
    asked += [str(record[key]) for key in ("input", "context") if isinstance(record.get(key), str) and record[key].strip()]
    found = [Message("user", "\n\n".join(asked))]
    if record.get("rejected") is None:
        answer = next((key for key in ANSWER_KEYS if isinstance(record.get(key), str)), None)
        if answer is None and isinstance(record.get("completion"), Sequence):
            return _with_system(record, _answer(record["completion"], found, "completion"))
        if answer is None and not isinstance(record.get("chosen"), Sequence):
            raise BadRecord(f"{question!r} without an answer ({', '.join(ANSWER_KEYS)})")
        found += [] if answer is None else [Message(ANSWERS, str(record[answer]))]
    return _with_system(record, found)


def _turns(turns: Sequence[Any], key: str, role: str, text: str) -> list[Message]:
    found = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise BadRecord(f"{key}[{i}] is {type(turn).__name__}, not an object with `{role}` and `{text}`")
        who = turn.get(role, turn.get("role", turn.get("from")))
        if not isinstance(who, str) or who not in NAMES_OF_SIDES:
            raise BadRecord(f"{key}[{i}].{role} {who!r} is not one of {', '.join(NAMES_OF_SIDES)}")
        said = turn.get(text, turn.get("content", turn.get("value")))
        found.append(Message(NAMES_OF_SIDES[who], _said(said, turn.get("tool_calls"), f"{key}[{i}].{text}")))
    return found


def _said(said: Any, calls: Any, where: str) -> str:
    """A message's text, with the calls of tools that it makes."""
    if isinstance(said, Sequence) and not isinstance(said, str):  # OpenAI's parts
        said = "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in said)
    if said is not None and not isinstance(said, str):
        raise BadRecord(f"{where} is {type(said).__name__}, not a text")
    parts = [said] if said else []
    if calls is not None and (isinstance(calls, str) or not isinstance(calls, Sequence)):
        raise BadRecord(f"the tool_calls beside {where} are {type(calls).__name__}, not a list")
    for call in calls or ():
        function = call.get("function", call) if isinstance(call, Mapping) else call
        parts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
    return "\n".join(parts)


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """With what a record says of the assistant beside the messages: its instructions, and the tools that it may call."""
    told = [record["system"]] if isinstance(record.get("system"), str) and record["system"].strip() else []
    tools = record.get("tools")
    if tools:
        told.append("You can call these tools:\n" + (tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)))
    if not told:
        return messages
    if messages and messages[0].role == "system":
        return [Message("system", "\n\n".join([messages[0].content, *told])), *messages[1:]]
    return [Message("system", "\n\n".join(told)), *messages]


def _answer(given: Any, before: list[Message], key: str) -> list[Message]:
    """The chat with one side's answer: a text, one message, or the whole chat."""
    if isinstance(given, str):
        return [*before, Message(ANSWERS, given)]
    if not isinstance(given, (Mapping, Sequence)):
        raise BadRecord(f"`{key}` is {type(given).__name__}, not a text, a message or a chat")
    turns = _turns([given] if isinstance(given, Mapping) else list(given), key, "role", "content")
    if not turns or turns[-1].role != ANSWERS:
        raise BadRecord(f"`{key}` does not end with a message of the assistant")
    return turns if len(turns) > 1 else [*before, *turns]


def encodable(text: str) -> bool:
    """Whether a text can be UTF-8: JSON may hold one half of a pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_order(messages: Sequence[Message]) -> None:
    """Raise BadRecord unless the user asks, the assistant answers, and so on, a tool's word between two of the assistant."""
    if not messages:
        raise BadRecord("there is no message")
    for i, message in enumerate(messages):
        if not message.content.strip():
            raise BadRecord(f"message {i + 1}, of the {message.role}, is empty")
        if not encodable(message.content):
            raise BadRecord(f"message {i + 1}, of the {message.role}, holds half of a surrogate pair, which is no character")
        last = messages[i - 1].role if i else ""
        allowed = {
            "system": not i, "user": last in ("", "system", ANSWERS),
            ANSWERS: last in ("user", "tool"), "tool": last in (ANSWERS, "tool"),
        }  # fmt: skip
        if not allowed[message.role]:
            after = f"follows one of the {last}" if last else "comes first"
            raise BadRecord(f"message {i + 1}, of the {message.role}, {after}: roles are out of order")
    if messages[-1].role != ANSWERS:
        raise BadRecord(f"the last message is of the {messages[-1].role}, and no answer follows")


def read_records(file: Path) -> Iterator[tuple[int, Any]]:
    """The records of a .json (a list) or .jsonl file, each with the line that it begins in. Raises DataError or IOFailure."""
    try:
        if file.suffix.lower() == ".json":
            yield from _from_list(file, file.read_text(encoding="utf-8-sig"))
            return
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise DataError(f"{file}, line {number}: it is no JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise IOFailure(f"{file} could not be read: {error.strerror}") from error


def _from_list(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder, at, line = json.JSONDecoder(), 0, 1

    def skip(characters: str) -> None:
        nonlocal at, line
        while at < len(text) and text[at] in characters:
            line += text[at] == "\n"
            at += 1

    skip(" \t\r\n")
    if text[at : at + 1] != "[":
        raise DataError(f"{file} is no list of records; one record a line belongs into a .jsonl file")
    at += 1
    while True:
        skip(" \t\r\n,")
        if text[at : at + 1] == "]":
            return
        try:
            record, end = decoder.raw_decode(text, at)
        except ValueError as error:
            raise DataError(f"{file}, line {line}: it is no JSON ({error})") from error
        yield line, record
        line += text.count("\n", at, end)
        at = end


def files_of(spec: str, key: str, find: Callable[[str, str], list[Path]]) -> list[Path]:
    """The .json and .jsonl files of a path. Raises ConfigError where there are none."""
    path = Path(spec).expanduser()
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in (".json", ".jsonl") and f.is_file())
    else:
        found = find(spec, key)
    if not found:
        raise ConfigError(f"{key}={spec}: there is no .json or .jsonl file")
    return found
