"""Chats made up by a program: every answer is right, the same options give the same chats, and they are problems to be solved."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gptlab import compose
from gptlab.config.errors import ConfigError
from gptlab.data.chat import Message
from gptlab.data.chat_prepare import ChatProblems
from gptlab.data.chat_records import Example
from gptlab.data.drills import DAYS, OPPOSITES, SKILLS, WORDS, Drills
from gptlab.data.prepare import prepare
from gptlab.data.problems import Problem, problems_of


def turns(skill: str, language: str = "en") -> list[tuple[str, str]]:
    """Question and answer, of chats of one skill alone."""
    found = []
    for one in Drills(skills=(skill,), chats=60, language=language).found():  # type: ignore[arg-type]
        assert isinstance(one, Example)
        said = [m.content for m in one.messages if m.role != "system"]
        found += list(zip(said[::2], said[1::2], strict=True))
    return found


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("language", ["en", "de"])
def test_every_answer_is_right(language: str) -> None:
    words = WORDS[language].split()

    def word_of(question: str) -> str:
        return [w for w in re.findall(r"\w+", question) if w in words][-1]  # "letter" stands in questions, too

    for asked, answer in turns("add", language):
        assert numbers(answer)[-1] == sum(numbers(asked))
    for asked, answer in turns("larger", language):
        assert numbers(answer) == [max(numbers(asked))]
        assert len(set(numbers(asked))) == 2
    for asked, answer in turns("spell", language):
        assert answer == " ".join(word_of(asked))
    for place, skill in ((0, "first"), (-1, "last")):
        for asked, answer in turns(skill, language):
            assert answer.rstrip(".").split()[-1] == word_of(asked)[place]
    for asked, answer in turns("upper", language):
        assert answer == word_of(asked).upper()
    for asked, answer in turns("repeat", language):
        assert answer.split() == [word_of(asked)] * numbers(asked)[0]
    for asked, answer in turns("letters", language):
        assert numbers(answer) == [len(word_of(asked))]
    days = DAYS[language].split()
    for asked, answer in turns("after", language):
        today = next(day for day in days if day in asked)
        assert answer.startswith(days[(days.index(today) + 1) % 7]) or answer.split()[0] in days
        assert (days.index(answer.split()[0]) - days.index(today)) % 7 == 1
    opposites = OPPOSITES[language].split()
    pairs = dict(zip(opposites[::2], opposites[1::2], strict=True))
    for asked, answer in turns("opposite", language):
        said = answer.rstrip(".").split()[-1]
        assert said in asked or any({a, b} == {said, w} for a, b in pairs.items() for w in re.findall(r"\w+", asked))


def test_a_name_that_is_told_is_kept_in_mind() -> None:
    for one in Drills(skills=("name", "add"), chats=80).found():
        assert isinstance(one, Example)
        last, answer = one.messages[-2:]
        if "name" in last.content.lower():
            name = answer.content.rstrip(".").split()[-1]
            assert any(m.role == "user" and name in m.content for m in one.messages[:-2])


def test_the_same_options_give_the_same_chats_and_another_seed_others() -> None:
    first, again, other = (list(Drills(chats=20, seed=seed).found()) for seed in (0, 0, 1))
    assert first == again != other
    assert set(SKILLS) == set(Drills().skills)


def test_a_rejected_answer_is_never_the_right_one() -> None:
    for one in Drills(chats=200, preferences=True).found():
        assert isinstance(one, Example)
        assert one.rejected
        assert one.rejected != one.messages[-1].content


@pytest.mark.parametrize("largest", [8, 20, 100])
def test_numbers_that_are_held_out_are_so_for_every_seed_language_and_skill(largest: int) -> None:
    def pairs(held_out: bool, **options: Any) -> set[tuple[int, ...]]:
        chats = Drills(skills=("add", "larger"), largest=largest, chats=4000, **options).found(validation=held_out)
        return {tuple(sorted(numbers(m.content))) for one in chats if isinstance(one, Example) for m in one.messages if m.role == "user"}

    held = pairs(True) | pairs(True, language="de", seed=1)
    learned = pairs(False) | pairs(False, seed=2) | pairs(False, language="de", turns=1)
    assert held
    assert not held & learned
    assert len(list(Drills(chats=4000).found(validation=True))) == 200


def test_chats_are_problems_whose_held_out_ones_are_never_learned_from() -> None:
    config = compose(["data=drills_sums", "data.corpus.chats=300"]).data
    data = prepare(config)
    source = problems_of(data, config, 512)
    assert isinstance(source, ChatProblems)
    learned = source.problems(range(600), 0)
    held = source.problems(range(20), 0, held_out=True)

    def asked(problems: list[Problem]) -> set[tuple[int, ...]]:
        """The pairs of numbers in all questions."""
        return {tuple(sorted(numbers(m.content))) for p in problems for m in p.prompt if isinstance(m, Message) and m.role == "user"}

    assert not asked(learned) & asked(held)
    assert source.problems([5, 3], 0) == [learned[5], learned[3]]
    assert source.problems(range(5), 1) != learned[:5]
    assert all(numbers(p.answer)[-1] == sum(numbers(p.prompt[-1].content)) for p in held)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"skills": ("sing",)}, r"data\.corpus\.skills: 'sing' is not one of add"),
        ({"chats": 0}, "chats=0"),
        ({"turns": 0}, "turns=0"),
        ({"largest": 7}, r"data\.corpus\.largest=7 must be at least 8"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Drills(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("most", "longest"), [(1, 1), (2, 2), (6, 6)])
def test_chats_have_as_many_turns_as_they_may(most: int, longest: int) -> None:
    chats = [one for one in Drills(chats=400, turns=most, skills=("upper", "spell")).found() if isinstance(one, Example)]
    counts = [sum(m.role == "user" for m in one.messages) for one in chats]
    assert set(counts) == set(range(1, longest + 1))
    assert most == 1 or 0.4 < counts.count(1) / len(counts) < 0.6
