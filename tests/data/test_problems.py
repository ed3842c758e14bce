"""Problems with known answers: told by number, the held-out ones never among the others, and where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptlab import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, register
from gptlab.data.chat import Message, render
from gptlab.data.loader import held_out_batches
from gptlab.data.prepare import prepare
from gptlab.data.problems import Problem, Problems, encoded, ends_of, problems_of
from gptlab.data.synthetic import Addition
from gptlab.data.tokenizer import ByteTokenizer


class Chatty(ByteTokenizer):
    """Bytes with the chat tokens of ChatML."""

    name, vocabulary = "chatty", 259
    special = {"<|im_start|>": 257, "<|im_end|>": 258}  # noqa: RUF012


def sums(problems: Sequence[Problem]) -> set[tuple[int, ...]]:
    """The numbers of each sum, whichever comes first."""
    return {tuple(sorted(int(n) for n in p.text.rstrip("=").split("+"))) for p in problems}


@pytest.mark.parametrize(("digits", "reversed"), [(1, True), (2, False), (2, True), (18, True)])
def test_sums_are_right_and_depend_on_their_number_alone(digits: int, reversed: bool) -> None:
    task = Addition(digits=digits, reversed=reversed)
    found = task.problems(range(50), 3)
    for problem in found:
        a, b = problem.text.removesuffix("=").split("+")
        answer = problem.answer[::-1] if reversed else problem.answer
        assert len(a) == len(b) == digits
        assert int(answer) == int(a) + int(b)
        assert len(answer) == problem.tokens == digits + 1
    assert task.problems([7, 49, 7], 3) == [found[7], found[49], found[7]]
    assert task.problems(range(50), 4) != found != task.problems(range(50), 3, held_out=True)
    assert isinstance(task, Problems)


def test_held_out_sums_never_come_in_training_whatever_the_seed() -> None:
    task = Addition()
    kept = sums(task.problems(range(3000), 0, held_out=True))
    trained = set().union(*(sums(task.problems(range(3000), seed)) for seed in (0, 1)))
    assert not kept & trained
    rows = {name: make(400, 40, np.random.default_rng(0))[0] for name, make in (("train", task.rows), ("val", task.held_out_rows))}
    text = {
        name: "".join("".join(task.alphabet[i] for i in row[: len(row) // task.size * task.size]) for row in r) for name, r in rows.items()
    }
    in_rows = {name: sums([Problem(part.partition("=")[0], "") for part in t.split("$")[:-1]]) for name, t in text.items()}
    assert len(in_rows["train"]) > 1000
    assert not in_rows["train"] & (kept | in_rows["val"])
    assert in_rows["val"] <= {tuple(sorted(divmod(n, 100))) for n in range(10_000)} - trained
    share = task._kept_back(*np.divmod(np.arange(10_000), 100)).mean()
    assert share == pytest.approx(0.1, abs=0.01)


def test_the_held_out_set_of_a_run_is_made_of_held_out_sums() -> None:
    config = compose(["data=addition", "model.context_length=9"])
    batch = next(held_out_batches(prepare(config.data), "val", 9, 9 * 200, 200))
    task = Addition()
    shown = ["".join(task.alphabet[i] for i in row[:6]) for row in batch.inputs.tolist()]
    assert sums([Problem(text, "") for text in shown]) <= sums(task.problems(range(8000), 0, held_out=True))


def test_a_share_that_holds_nothing_back_is_refused() -> None:
    for share in (0.0, 0.9):
        with pytest.raises(ConfigError, match=rf"data\.corpus\.held_out={share} must be between 0\.01 and 0\.5, a share of all sums"):
            Addition(held_out=share)
    least = Addition(digits=1, held_out=0.01)
    assert sums(least.problems(range(50), 0, held_out=True)), "the smallest share of the fewest sums holds one back at least"


def test_a_text_is_gone_on_with_and_a_chat_is_answered() -> None:
    chat = (Message("system", "Be brief."), Message("user", "6 * 7?"))
    asked, tokenizer = Problem(chat, "#### 42"), Chatty()
    assert asked.text == "system: Be brief.\nuser: 6 * 7?"
    assert encoded(asked, tokenizer) == render(chat, tokenizer).tokens
    assert 258 in ends_of(asked, tokenizer)
    plain = Problem("6 * 7 = ", "42")
    assert encoded(plain, tokenizer) == list(b"6 * 7 = ")
    assert ends_of(plain, tokenizer) == {256}, "a text ends with the end of a text"
    assert ends_of(replace(plain, tokens=2), tokenizer) == frozenset(), "no token ends what always has two"
    with pytest.raises(ConfigError, match="has no chat tokens"):
        encoded(asked, ByteTokenizer())


@register("data/corpus", "quizzes")
class Quizzes:
    """Two questions, as text and as problems."""

    name = "quizzes"

    def __init__(self, *, questions: int = 2) -> None:
        self.questions = questions

    def fingerprint(self) -> dict[str, Any]:
        return {"questions": self.questions}

    def pieces(self) -> Any:
        yield "one? 1\n" * 300, True

    def problems(self, numbers: Sequence[int], seed: int, *, held_out: bool = False) -> list[Problem]:
        return [Problem((Message("user", f"{n % self.questions}?"),), str(n)) for n in numbers]


def test_a_corpus_of_text_offers_problems_by_a_method() -> None:
    config = compose(["data=pydocs", "data/tokenizer=byte"])
    own = replace(config.data, corpus=component("data/corpus", "quizzes").options(questions=3))  # type: ignore[arg-type, call-arg]
    source = problems_of(prepare(own), own, 512)
    assert source.problems([4], 0)[0].text == "user: 1?"
    with pytest.raises(ConfigError, match=r"data/corpus=pydocs has no problems with answers to be rewarded; .*addition.* have them"):
        problems_of(prepare(own), replace(config.data, corpus=build_options("pydocs")), 512)


def build_options(name: str) -> Any:
    options = component("data/corpus", name).options()
    build(options)
    return options
