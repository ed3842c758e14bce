"""The bodies of requests: what OpenAI's API calls each field, what it may hold, and what is said where it holds something else."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import suggest
from gptlab.data.chat import Message, check
from gptlab.generate.sampling import Sampling
from gptlab.generate.server.errors import Refused

MOST_ALTERNATIVES, MOST_STOPS, LONGEST_STOP = 20, 4, 200
DEFAULT_TOKENS = {"completions": 16, "chat": 512}
CEILINGS = {"temperature": 10.0, "repetition_penalty": 10.0, "top_k": 2**31 - 1, "seed": 2**63 - 1}

# What this server cannot do, with what may be given all the same, since it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "store": (False,), "service_tier": ("auto", "default"),
    "metadata": ({},), "prediction": (), "audio": (), "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
}  # fmt: skip
SHARED = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "stop", "stream",
    "stream_options", "logprobs", "user", "answer_tokens",
}  # fmt: skip
OWN = {"completions": {"prompt"}, "chat": {"messages", "max_completion_tokens", "top_logprobs"}}


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for."""

    body: int = 1 << 20  # bytes
    prompt: int = 32_768  # tokens
    tokens: int = 4_096  # to make, a text
    texts: int = 16  # prompts times n


@dataclass(frozen=True)
class Request:
    """A body that was read: either `prompts` (texts, or token ids) or `messages`. `top`: alternatives told with each token; None:
    no log-probability. `answer`: ids of the answer's beginning, which it goes on from."""

    model: str
    settings: Sampling
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Message, ...] = ()
    n: int = 1
    stream: bool = False
    usage: bool = False
    top: int | None = None
    answer: tuple[int, ...] = ()


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises Refused 400."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON") from error
    if not isinstance(found, dict):
        raise Refused(400, f"the body must be a JSON object, not {_kind(found)}")
    return found


def read(body: Mapping[str, Any], kind: str, limits: Limits) -> Request:
    """A request of `completions` or `chat`. Raises Refused: 400 for a field that is not known, not offered or missing, 422 for one
    that holds what it cannot."""
    given = {name: value for name, value in body.items() if value is not None}
    known = SHARED | OWN[kind]
    for name, value in given.items():
        if name not in known:
            _only_neutral(name, value, known)
    model = _text(given, "model") if "model" in given else ""
    n = _whole(given, "n", 1, least=1, most=limits.texts)
    stream = _truth(given, "stream")
    made = Request(
        model=model, settings=_sampling(given, kind, limits), n=n, stream=stream, usage=_usage(given, stream),
        top=_top(given, kind), answer=_ids(given.get("answer_tokens", []), "answer_tokens"),
        prompts=_prompts(given, limits, n) if kind == "completions" else (),
        messages=_messages(given) if kind == "chat" else (),
    )  # fmt: skip
    if made.answer and len(made.prompts) > 1:
        raise Refused(400, "answer_tokens goes with one prompt", param="answer_tokens")
    return made


def _only_neutral(name: str, value: Any, known: set[str]) -> None:
    if name in NEUTRAL:
        if any(type(value) in (type(one), int, float) and value == one for one in NEUTRAL[name]):
            return
        raise Refused(400, f"{name} is not supported by this server; leave it out", param=name)
    raise Refused(400, f"there is no field {name[:60]!r}{suggest(name, known)}", param=name[:60])


def _sampling(given: Mapping[str, Any], kind: str, limits: Limits) -> Sampling:
    if "max_tokens" in given and given.get("max_completion_tokens", given["max_tokens"]) != given["max_tokens"]:
        raise Refused(400, "max_tokens and max_completion_tokens are the same setting; give one of them", param="max_tokens")
    longest = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise Refused(422, "stop must be a text or a list of texts", param="stop")
    if len(stops) > MOST_STOPS or any(len(one) > LONGEST_STOP for one in stops):
        raise Refused(422, f"stop may hold {MOST_STOPS} texts of {LONGEST_STOP} characters", param="stop")
    made = Sampling(
        max_tokens=_whole(given, longest, min(DEFAULT_TOKENS[kind], limits.tokens), least=1, most=limits.tokens),
        temperature=_number(given, "temperature", 1.0),
        top_k=_whole(given, "top_k", 0),
        top_p=_number(given, "top_p", 1.0),
        min_p=_number(given, "min_p", 0.0),
        repetition_penalty=_number(given, "repetition_penalty", 1.0),
        seed=_whole(given, "seed", secrets.randbits(62), least=0),
        stop=tuple(stops),
    )
    try:
        return made.check("")
    except ConfigError as error:
        raise Refused(422, str(error), param=str(error).split()[0]) from error


def _prompts(given: Mapping[str, Any], limits: Limits, n: int) -> tuple[str | tuple[int, ...], ...]:
    prompt = given.get("prompt")
    if prompt is None:
        raise Refused(400, "prompt is missing; give a text", param="prompt")
    if isinstance(prompt, str):
        found: list[str | tuple[int, ...]] = [prompt]
    elif isinstance(prompt, list) and prompt and not any(isinstance(one, (str, list)) for one in prompt):
        found = [_ids(prompt, "prompt")]
    elif isinstance(prompt, list):
        found = [one if isinstance(one, str) else _ids(one, "prompt") for one in prompt]
    else:
        raise Refused(422, "prompt must be a text, a list of texts, or token ids", param="prompt")
    if not found or not all(found):
        raise Refused(400, "prompt is empty; give at least one character", param="prompt")
    if len(found) * n > limits.texts:
        raise Refused(422, f"prompt and n: {len(found) * n} texts are more than the {limits.texts} that one request may ask for", param="n")
    return tuple(_valid(one, "prompt") if isinstance(one, str) else one for one in found)


def _messages(given: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = given.get("messages")
    if not isinstance(messages, list):
        raise Refused(400 if messages is None else 422, "messages must be a list of messages with role and content", param="messages")
    found = []
    for i, one in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(one, dict):
            raise Refused(422, f"{where} must be an object with role and content", param=where)
        extra = [key for key, value in one.items() if key not in ("role", "content", "name") and value not in (None, [])]
        if extra:
            raise Refused(400, f"{where}.{extra[0][:60]} is not supported by this server; leave it out", param=f"{where}.{extra[0][:60]}")
        role, content = one.get("role"), one.get("content")
        if isinstance(content, list):  # parts, as those clients send that know pictures too
            if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
                raise Refused(422, f"{where}.content may have parts of text only", param=f"{where}.content")
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise Refused(422, f"{where} must have a role and a content that are texts", param=where)
        found.append(Message(role, _valid(content, f"{where}.content")))
    try:
        check(found)
    except ConfigError as error:
        raise Refused(400, str(error), param=str(error).split()[0].rstrip(":")) from error
    return tuple(found)


def _top(given: Mapping[str, Any], kind: str) -> int | None:
    if kind == "completions":
        return _whole(given, "logprobs", 0, least=0, most=MOST_ALTERNATIVES) if "logprobs" in given else None
    wanted = _truth(given, "logprobs")
    if "top_logprobs" in given and not wanted:
        raise Refused(400, "top_logprobs goes with logprobs=true", param="top_logprobs")
    return _whole(given, "top_logprobs", 0, least=0, most=MOST_ALTERNATIVES) if wanted else None


def _usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused(422, "stream_options must be an object", param="stream_options")
    if options and not stream:
        raise Refused(400, "stream_options goes with stream=true", param="stream_options")
    unknown = [key for key in options if key not in ("include_usage", "include_obfuscation")]
    if unknown or options.get("include_obfuscation"):
        name = f"stream_options.{unknown[0][:60] if unknown else 'include_obfuscation'}"
        raise Refused(400, f"{name} is not supported by this server; leave it out", param=name)
    return _truth(options, "include_usage")


def _ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**31 for one in value):
        raise Refused(422, f"{name} must be token ids: whole numbers from 0 on", param=name)
    return tuple(value)


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(422, f"{name} must be a number, not {_kind(value)}", param=name)
    if name in CEILINGS and value > CEILINGS[name]:
        raise Refused(422, f"{name} must be at most {CEILINGS[name]:g}", param=name)
    try:
        return float(value)
    except OverflowError as error:
        raise Refused(422, f"{name} is too large", param=name) from error


def _whole(given: Mapping[str, Any], name: str, default: int, *, least: int | None = None, most: int | None = None) -> int:
    value = given.get(name, default)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if type(value) is not int:
        raise Refused(422, f"{name} must be a whole number, not {_kind(value)}", param=name)
    most = most if most is not None else int(CEILINGS.get(name, 2**63 - 1))
    if value > most or (least is not None and value < least):
        between = f"at least {least}" if least is not None and value < least else f"at most {most}"
        raise Refused(422, f"{name} {str(value)[:40]} must be {between}", param=name)
    return value


def _truth(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refused(422, f"{name} must be true or false, not {_kind(value)}", param=name)
    return value


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given[name]
    if not isinstance(value, str):
        raise Refused(422, f"{name} must be a text, not {_kind(value)}", param=name)
    return value


def _valid(text: str, name: str) -> str:
    """Itself. Raises Refused 422 for half a character, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(422, f"{name} holds a lone surrogate, which is no character", param=name) from error
    return text


def _kind(value: Any) -> str:
    if isinstance(value, float):
        return "a fraction" if math.isfinite(value) else "a number that is not finite"
    names = {bool: "true or false", int: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
