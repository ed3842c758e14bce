"""Problems: prompts whose right answer is known, by number. What reinforcement learns from, and what a model's answers are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, components
from gptlab.config.schema import DataConfig
from gptlab.data.chat import Message, chat_format, end_tokens, render
from gptlab.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptlab.data.prepared import Prepared


@dataclass(frozen=True)
class Problem:
    """A text to go on with, or a chat to answer, and the right `answer`.

    `tokens`: how many every answer has, where that is known and no token ends one (0: the end of a text, or of a turn, ends it).
    `entry`: what else a reward may want to know of it.
    """

    prompt: str | tuple[Message, ...]
    answer: str
    tokens: int = 0
    entry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt to be read by people."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(f"{m.role}: {m.content}" for m in self.prompt)


@runtime_checkable
class Problems(Protocol):
    """What a corpus that has problems offers beside its text."""

    name: str

    def problems(self, numbers: Sequence[int], seed: int, *, held_out: bool = False) -> list[Problem]:
        """The problems with these numbers (from 0, without an end): a pure function of the seed and each number.

        Those that are `held_out` never come among the others, whatever the seeds. Where there are few they come again.
        """


def problems_of(data: Prepared, config: DataConfig, context: int) -> Problems:
    """The problems of prepared data; of chats those whose questions leave room for an answer in a `context`.

    Raises ConfigError where its corpus has none, naming those that have.
    """
    corpus: Any = build(config.corpus) if data.task is None else data.task
    if data.chat and not data.parts:
        from gptlab.data.chat_prepare import ChatProblems  # which knows problems

        return ChatProblems(corpus, config.validation_fraction, data.tokenizer, context)
    if not isinstance(corpus, Problems):
        known = [c.name for c in components("data/corpus") if callable(getattr(c.factory, "problems", None))]
        raise ConfigError(f"data/corpus={corpus.name} has no problems with answers to be rewarded; {', '.join(known)} have them")
    return corpus


def encoded(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """The prompt as token ids, up to where the answer begins. Raises ConfigError for a chat where the tokeniser has no chat tokens."""
    if isinstance(problem.prompt, str):
        first: int | None = getattr(tokenizer, "begin_of_text", None)
        return [*([] if first is None else [first]), *(int(i) for i in tokenizer.encode(problem.prompt))]
    return render(problem.prompt, tokenizer).tokens


def ends_of(problem: Problem, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer."""
    if problem.tokens:
        return frozenset()
    found = None if isinstance(problem.prompt, str) else chat_format(tokenizer)
    return end_tokens(tokenizer) if found is None else found.ends
