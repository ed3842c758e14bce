"""Rewards: what a completion is worth, as plug-in functions. Your own is a registered function that returns one.

@register("objective/reward", "polite")
def polite(*, word: str = "please") -> Reward:
    \"\"\"1 where the completion says the word.\"\"\"
    return lambda sample: float(word in sample.completion)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import register

SHOWN = 160  # characters of a prompt or completion in a message
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a prompt. `completion` is without the token that ended it; `tokens` counts that too."""

    prompt: str
    completion: str
    reference: str  # the right answer
    ended: bool = True  # by itself, and not since there was no more room
    tokens: int = 0
    entry: Mapping[str, Any] = field(default_factory=dict)  # what the corpus tells of the problem besides


Reward = Callable[[Sample], float]


def scored(name: str, reward: Reward, samples: Sequence[Sample]) -> list[float]:
    """The reward of each sample. Raises DataError, naming the reward and the sample, where it raises or is no finite number."""
    found = []
    for sample in samples:
        try:
            value = float(reward(sample))
        except ConfigError:  # it cannot be used at all, and says why
            raise
        except Exception as error:  # the user's function may raise anything
            raise DataError(f"objective.rewards.{name} raised {type(error).__name__}: {error} for {_told(sample)}") from error
        if not math.isfinite(value):
            raise DataError(f"objective.rewards.{name} is {value} for {_told(sample)}; a reward is a finite number")
        found.append(value)
    return found


def _told(sample: Sample) -> str:
    return f"the completion {_short(sample.completion)} of the prompt {_short(sample.prompt)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}")


@register("objective/reward", "exact_answer")
def exact_answer(*, compare: Literal["text", "number"] = "text") -> Reward:
    """1 for the right answer: the whole completion, or (`compare=number`) the last number in it, is that of the reference.

    White space around a text does not count, nor do the commas of 1,234 or the zeros of 42.0.
    """
    return _same_number if compare == "number" else lambda s: float(s.completion.strip() == s.reference.strip())


def _same_number(sample: Sample) -> float:
    right, said = last_number(sample.reference), last_number(sample.completion)
    if right is None:
        raise ValueError(f"the reference {_short(sample.reference)} holds no number")
    return float(said == right)


@register("objective/reward", "characters")
def characters() -> Reward:
    """The share of characters that stand where the right answer has them: something to go by long before a whole answer is right."""
    return lambda s: sum(map(str.__eq__, s.completion, s.reference)) / max(len(s.completion), len(s.reference), 1)


def last_number(text: str) -> float | None:
    """The last number of a text, as 1,234 or -0.5; None where it has none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@register("objective/reward", "regex")
def regex(*, pattern: str = r"\S", whole: bool = False) -> Reward:
    """1 where the regular expression `pattern` is found in the completion, or (`whole`) is all of it."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward=regex: pattern={pattern!r} is no regular expression ({error})") from error
    return lambda s: float((compiled.fullmatch if whole else compiled.search)(s.completion) is not None)


@register("objective/reward", "length")
def length(*, least: int = 1, most: int = 100, slope: int = 0) -> Reward:
    """1 for `least` to `most` tokens; outside, 0, or over `slope` more or fewer tokens a fall from 1 to 0 (DAPO's soft punishment)."""
    if not 0 <= least <= most or slope < 0:
        raise ConfigError(f"reward=length: least={least} must be from 0 to most={most}, and slope={slope} at least 0")
    return lambda s: max(0.0, 1.0 - max(least - s.tokens, s.tokens - most, 0) / max(slope, 1e-9))


@register("objective/reward", "format")
def format(*, tags: tuple[str, ...] = ("think", "answer"), ended: bool = True) -> Reward:
    """1 where the completion is `<think>…</think><answer>…</answer>`: these `tags` in this order, each once, nothing beside them.

    White space beside them is allowed; `ended`: it must have ended by itself, too.
    """
    if not tags:
        raise ConfigError("reward=format: tags is empty; name at least one")
    inside = r"((?:(?!</?(?:" + "|".join(map(re.escape, tags)) + r")>).)*)"
    parts = (f"<{re.escape(tag)}>{inside}</{re.escape(tag)}>" for tag in tags)
    compiled = re.compile(r"\s*" + r"\s*".join(parts) + r"\s*", re.DOTALL)
    return lambda s: float((s.ended or not ended) and compiled.fullmatch(s.completion) is not None)


@register("objective/reward", "reasoning_gym")
def reasoning_gym(*, tag: str = "") -> Reward:
    """The score, 0 to 1, that reasoning-gym gives an answer to a task of its own (data/corpus=reasoning_gym). Library: reasoning-gym.

    The answer is the whole completion, or what stands last between `<tag>` and `</tag>`.
    """
    from gptlab.data.reasoning_gym import scorer

    inside = re.compile(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", re.DOTALL) if tag else None

    def reward(sample: Sample) -> float:
        if "gym" not in sample.entry:
            raise ConfigError("reward=reasoning_gym scores the tasks of data/corpus=reasoning_gym; this corpus has others")
        said = sample.completion
        if inside is not None:
            found = inside.findall(said)
            if not found:
                return 0.0
            said = found[-1]
        return float(scorer(sample.entry["gym"])(said.strip(), sample.entry["item"]))

    return reward
