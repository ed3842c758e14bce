"""Tasks of reasoning-gym as a corpus: procedural questions with answers that the library itself can score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register, suggest
from gptlab.data.problems import Problem

SIZE = 10_000  # problems of one of the library's data sets; the next has the next seed
HELD_OUT, OFFERED = 1 << 30, 1 << 29  # the seeds of problems that are held out; how many there are for others


@register("data/corpus", "reasoning_gym")
class ReasoningGym:
    """A task of reasoning-gym: `documents` questions with answers as text, any number of them as problems. Library: reasoning-gym.

    `settings` are the task's own, as `{max_terms: 4}`. As problems: the question and a line break,
    answered by the answer.
    """

    name = "reasoning_gym"

    def __init__(
        self,
        *,
        task: str = "leg_counting",
        documents: int = 10_000,
        seed: int = 0,
        settings: dict[str, str] = {},  # noqa: B006
    ) -> None:
        if documents < 2:
            raise ConfigError(f"data.corpus.documents={documents} must be at least 2")
        if not 0 <= seed < OFFERED:
            raise ConfigError(f"data.corpus.seed={seed} must be from 0 to {OFFERED - 1}")
        self.task, self.documents, self.seed = task, documents, seed
        self.settings = tuple(sorted((name, value) for name, value in settings.items()))

    def fingerprint(self) -> dict[str, Any]:
        return {"task": self.task, "documents": self.documents, "seed": self.seed, "settings": dict(self.settings)}

    def pieces(self) -> Iterator[tuple[str, bool]]:
        for number in range(self.documents):
            item = self._item(number, self.seed)
            yield f"{item['question']}\n{item['answer']}", True

    def problems(self, numbers: Sequence[int], seed: int, *, held_out: bool = False) -> list[Problem]:
        made = []
        for number in numbers:
            item = self._item(number, HELD_OUT if held_out else seed % OFFERED)
            made.append(Problem(f"{item['question']}\n", item["answer"], entry={"gym": self.task, "item": item}))
        return made

    def _item(self, number: int, seed: int) -> dict[str, Any]:
        block, place = divmod(number, SIZE)
        item: dict[str, Any] = dataset(self.task, (seed + block) % (1 << 31), self.settings)[place]
        if not isinstance(item["answer"], str):
            raise ConfigError(f"data.corpus.task={self.task}: its problem {number} has no answer in words; choose another task")
        return item


@lru_cache(maxsize=4)
def dataset(task: str, seed: int, settings: tuple[tuple[str, str], ...] = ()) -> Any:
    """A data set of the library's. Raises ConfigError where the library is missing, or for a task or setting that it does not know."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError("data/corpus=reasoning_gym needs the library reasoning-gym: run `pip install 'gptlab[rl]'`") from error
    if task not in DATASETS:
        raise ConfigError(f"data.corpus.task={task} is no task of reasoning-gym's{suggest(task, DATASETS)}; it has {len(DATASETS)}")
    try:
        return create_dataset(task, seed=seed, size=SIZE, **{name: _value(text) for name, text in settings})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"data.corpus.settings: reasoning-gym's {task} does not take them ({error})") from error


def _value(text: str) -> Any:
    """A setting as the library wants it: a number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    """The library's own scorer of a task: (answer, item) -> 0 to 1."""
    found: Callable[[str, dict[str, Any]], float] = dataset(task, 0).score_answer
    return found
