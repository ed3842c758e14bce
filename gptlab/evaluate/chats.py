"""What a chatbot answers, where a right answer is known: how often it is right, and ends, and which of two runs is right more often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptlab.config.errors import ConfigError, DataError
from gptlab.data.chat_corpus import ChatFiles
from gptlab.data.chat_prepare import format_of
from gptlab.data.chat_records import Example
from gptlab.data.problems import Problem, encoded
from gptlab.objective.reward import Sample, exact_answer, last_number
from gptlab.objective.rollout import roll_out
from gptlab.runner.load import Loaded

AT_ONCE = 64


@dataclass(frozen=True)
class Answers:
    """The answers to each question that fits the context; `passed_over`: those that do not."""

    samples: list[Sample]
    passed_over: int

    def shares(self) -> dict[str, tuple[float, float]]:
        """Of all answers the share, and its standard error, of those that are `exact` (the right text, but for white space), that have the
        right `number` (the last one in both; of questions whose answer has one), and that `ended` by themselves."""
        text, number = exact_answer(), exact_answer(compare="number")
        numbered = [s for s in self.samples if last_number(s.reference) is not None]
        found = {"exact": [text(s) for s in self.samples], "ended": [float(s.ended) for s in self.samples]}
        if numbered:
            found["number"] = [number(s) for s in numbered]
        return {name: _share(values) for name, values in found.items()}

    def to_json(self) -> dict[str, Any]:
        shares = {name: {"share": share, "standard_error": error} for name, (share, error) in self.shares().items()}
        mean = sum(s.tokens for s in self.samples) / len(self.samples)
        return {"answers": len(self.samples), "passed_over": self.passed_over, "tokens": mean, **shares}


def _share(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(mean * (1 - mean) / len(values))


def questions_of(path: str, limit: int) -> list[Problem]:
    """The chats of a file as questions, each all but its last message. Raises ConfigError or DataError."""
    found = [one for one in ChatFiles(path=path).found() if isinstance(one, Example)]
    if not found:
        raise DataError(f"--chats {path}: it holds no chat")
    return [Problem(one.messages[:-1], one.messages[-1].content) for one in found[: limit or None]]


def answers(loaded: Loaded, questions: Sequence[Problem], max_tokens: int) -> Answers:
    """What a run answers, the likeliest token each time. Raises ConfigError for a base model, or where no question fits its context."""
    format_of(loaded.tokenizer)
    context = loaded.config.model.context_length
    fitting = [q for q in questions if len(encoded(q, loaded.tokenizer)) < context]
    if not fitting:
        raise ConfigError(f"of {len(questions):,} questions none fits the context of {context} tokens with an answer")
    made = roll_out(loaded.model, fitting, loaded.tokenizer, [[0]] * len(fitting), temperature=0.0, max_tokens=max_tokens, at_once=AT_ONCE)
    return Answers([rollout.sample for rollout in made], len(questions) - len(fitting))


@dataclass(frozen=True)
class Duel:
    """Of the questions that both answered: how often the one run is right where the other is not."""

    wins: int
    losses: int
    ties: int

    @property
    def rate(self) -> float:
        """Wins, and half of the ties, as a share."""
        return (self.wins + self.ties / 2) / max(1, self.wins + self.losses + self.ties)

    @property
    def p(self) -> float:
        """How likely so uneven a count is where neither is better: the sign test, two-sided."""
        n, k = self.wins + self.losses, min(self.wins, self.losses)
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def duel(one: Answers, other: Answers) -> Duel:
    """Two runs on the questions that both could read. Right is the right text, or, where the right answer has a number, that number as the
    last one."""
    text, number = exact_answer(), exact_answer(compare="number")

    def right(sample: Sample) -> bool:
        return bool(text(sample)) or (last_number(sample.reference) is not None and bool(number(sample)))

    theirs = {(s.prompt, s.reference): right(s) for s in other.samples}
    pairs = [(right(s), theirs[s.prompt, s.reference]) for s in one.samples if (s.prompt, s.reference) in theirs]
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return Duel(wins, losses, len(pairs) - wins - losses)
