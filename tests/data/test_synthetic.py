"""Generated tasks: what is scored is right and determined, by a solver that reads a row from left to right; nothing shorter solves it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gptlab.config import registry
from gptlab.config.errors import ConfigError
from gptlab.data.corpus import PyDocs
from gptlab.data.synthetic import BRACKETS, Addition, Copy, Dyck, Induction, Recall, Task

KINDS = (Copy, Recall, Induction, Addition, Dyck)
PARTNER = dict(zip(BRACKETS[1::2], BRACKETS[0::2], strict=True))  # closing -> opening
CLOSER = {opening: closing for closing, opening in PARTNER.items()}

# Solvers: the text so far -> the only right answer. Each is written from the task's description, not from its generator.


def solve_copy(seen: str) -> str:
    string, _, done = seen.split(";")[-1].partition("|")
    return string[len(done)]


def solve_recall(seen: str) -> str:
    told: dict[str, str] = {}
    for key, value in zip(seen[0::2], seen[1::2], strict=False):
        assert told.setdefault(key, value) == value, "a key has one value"
    return told[seen[-1]]


def solve_induction(seen: str) -> str:
    return seen[seen.index(seen[-1]) + 1]


def solve_addition(seen: str, reversed: bool) -> str:
    question, _, done = seen.split("$")[-1].partition("=")
    a, b = question.split("+")
    answer = str(int(a) + int(b)).zfill(len(a) + 1)
    return (answer[::-1] if reversed else answer)[len(done)]


def open_brackets(seen: str) -> list[str]:
    stack: list[str] = []
    for character in seen:
        if character in PARTNER:
            assert stack.pop() == PARTNER[character], "the last opened bracket closes first"
        else:
            stack.append(character)
    return stack


def solve_dyck(seen: str) -> str:
    return CLOSER[open_brackets(seen)[-1]]


def solver(task: Task) -> Callable[[str], str]:
    if isinstance(task, Addition):
        return lambda seen: solve_addition(seen, task.reversed)
    found: Callable[[str], str] = {"copy": solve_copy, "recall": solve_recall, "induction": solve_induction, "dyck": solve_dyck}[task.name]
    return found


TASKS: list[Task] = [
    *(kind() for kind in KINDS),
    Copy(shortest=4, longest=12),
    Copy(symbols=2, shortest=1, longest=1),
    Copy(symbols=200, shortest=7, longest=32),
    Recall(pairs=2, keys=2, values=2),
    Recall(pairs=3, keys=200, values=150),
    Induction(symbols=5, pattern=5, shortest=2, longest=2),
    Induction(symbols=90, pattern=40, shortest=20, longest=25),
    Addition(digits=1, reversed=False),
    Addition(digits=18, reversed=True),
    Addition(digits=3, reversed=False),
    Dyck(kinds=2, depth=2),
    Dyck(kinds=12, depth=30),
]
ids_of_tasks = [f"{t.name}-{i}" for i, t in enumerate(TASKS)]
every_task = pytest.mark.parametrize("task", TASKS, ids=ids_of_tasks)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])


def texts(task: Task, count: int, length: int, seed: int = 0) -> list[tuple[str, list[bool]]]:
    """Rows as text of length + 1 characters, each with what is scored."""
    ids, scored = task.rows(count, length, np.random.default_rng(seed))
    return [("".join(task.alphabet[i] for i in row), marks.tolist()) for row, marks in zip(ids, scored, strict=True)]


def scored_places(task: Task, count: int, length: int = 64, seed: int = 0) -> list[tuple[int, str, str]]:
    """(place, text so far, answer) of every scored token."""
    return [(t, row[: t + 1], row[t + 1]) for row, marks in texts(task, count, length, seed) for t, counts in enumerate(marks) if counts]


@every_task
def test_a_reader_from_left_to_right_is_certain_of_every_scored_token(task: Task) -> None:
    for length in (64, 65, 90):
        places = scored_places(task, 40, length, seed=length)
        assert len(places) > 40
        solve = solver(task)
        assert [solve(seen) for _, seen, _ in places] == [answer for _, _, answer in places]
        assert task.best_loss(length) == 0.0


@every_task
def test_rows_have_their_shapes_and_every_id_is_a_character(task: Task) -> None:
    assert isinstance(task, Task)
    assert list(task.alphabet) == sorted(set(task.alphabet))
    assert task.alphabet.isprintable()
    assert " " not in task.alphabet
    ids, scored = task.rows(3000, 70, np.random.default_rng(1))
    assert ids.shape == (3000, 71)
    assert scored.shape == (3000, 70)
    assert ids.dtype == np.int64
    assert scored.dtype == np.bool_
    assert set(np.unique(ids)) == set(range(len(task.alphabet))), "each character is used, and nothing else"
    assert ids.flags.writeable
    assert scored.flags.writeable


@every_task
def test_the_same_seed_gives_the_same_rows_and_another_gives_others(task: Task) -> None:
    one, two, other = (task.rows(50, 64, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    assert not np.array_equal(one[0], other[0])
    assert len({row.tobytes() for row in one[0]}) >= 45, "rows of a batch differ"
    draw = np.random.default_rng(5)
    first, second = task.rows(50, 64, draw), task.rows(50, 64, draw)
    assert not np.array_equal(first[0], second[0]), "the next batch is another"


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (Copy(), "fimnmoak|fimnmoak;mekdhabp|me"),
        (Recall(), "DfCdBgGfBgBgGfCdGfBgD"),
        (Induction(), "lduncvpbstrigaxwaxwcvpbstpbs"),
        (Addition(), "85+26=111$63+30=390$51+04="),
        (Dyck(), "{}{([][]())}{()}"),
    ],
    ids=[k.name for k in KINDS],
)
def test_what_a_seed_gives_changes_only_with_the_version(task: Any, row: str) -> None:
    assert (2 if task.name == "addition" else 1) == task.VERSION
    assert texts(task, 1, len(row) - 1)[0][0] == row


def test_copy_scores_all_of_the_second_string_and_only_that() -> None:
    lengths = Counter[int]()
    for row, marks in texts(Copy(symbols=3, shortest=2, longest=5), 300, 64):
        expected: list[bool] = []
        for example in row.split(";"):
            string, bar, again = example.partition("|")
            expected += [False] * len(string + bar) + [True] * len(again) + [False]
            if len(again) == len(string):
                lengths[len(string)] += 1
        assert marks == expected[1 : len(row)]
    assert set(lengths) == {2, 3, 4, 5}
    assert max(lengths.values()) < 1.5 * min(lengths.values()), "every length is as likely"


def test_recall_tells_each_pair_once_and_then_asks_for_any() -> None:
    asked, repeats = Counter[int](), 0
    for row, marks in texts(Recall(pairs=5, keys=9, values=3), 400, 39):
        told, queries = row[0:10:2], row[10::2]
        assert len(set(told)) == 5
        assert marks == [False] * 10 + [True, False] * 14 + [True]
        asked.update(told.index(key) for key in queries)
        repeats += sum(one == two for one, two in pairwise(queries))
    assert max(asked.values()) < 1.15 * min(asked.values()), "each pair is asked for as often"
    assert repeats == pytest.approx(400 * 14 / 5, rel=0.1), "whatever was asked before"


def test_induction_scores_all_of_a_stretch_but_its_first_token() -> None:
    task = Induction(symbols=12, pattern=10, shortest=3, longest=6)
    starts, lengths = Counter[int](), Counter[int]()
    for row, marks in texts(task, 500, 64):
        pattern = row[:10]
        assert len(set(pattern)) == 10
        assert not any(marks[:9])
        stretches: list[str] = []
        for character, counts in zip(row[10:], marks[9:], strict=True):
            if counts:
                stretches[-1] += character
            else:
                stretches.append(character)
        assert all(stretch in pattern for stretch in stretches)
        starts.update(pattern.index(stretch[0]) for stretch in stretches)
        lengths.update(len(stretch) for stretch in stretches[:-1])
    assert set(lengths) == {3, 4, 5, 6}
    assert set(starts) == set(range(8)), "a stretch may begin wherever three tokens fit"


@pytest.mark.parametrize("reversed", [True, False])
def test_addition_scores_the_digits_of_every_answer(reversed: bool) -> None:
    leading, units = Counter[str](), Counter[str]()
    for row, marks in texts(Addition(digits=2, reversed=reversed), 300, 64):
        assert row[:10].count("$") == 1
        answered = False
        for t, character in enumerate(row):
            answered = (answered or character == "=") and character != "$"
            if t:
                assert marks[t - 1] == (answered and character != "=")
        for example in row.split("$")[:-1]:
            answer = example.partition("=")[2]
            leading[answer[-1] if reversed else answer[0]] += 1
            units[answer[0] if reversed else answer[-1]] += 1
    assert set(leading) == {"0", "1"}
    assert set(units) == set("0123456789")


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_dyck_is_a_fair_coin_within_its_depth(depth: int) -> None:
    opened: defaultdict[int, list[bool]] = defaultdict(list)
    kinds = Counter[str]()
    for row, marks in texts(Dyck(kinds=3, depth=depth), 400, 60):
        level = 0
        for t, character in enumerate(row):
            opens = character in CLOSER
            opened[level].append(opens)
            level += 1 if opens else -1
            if opens:
                kinds[character] += 1
            if t:
                assert marks[t - 1] == (not opens and row[t - 1] in PARTNER)
    assert set(opened) == set(range(depth + 1))
    assert all(opened[0])
    assert not any(opened[depth])
    for level in range(1, depth):
        assert np.mean(opened[level]) == pytest.approx(0.5, abs=2.5 / math.sqrt(len(opened[level])))
    assert max(kinds.values()) < 1.1 * min(kinds.values())


@pytest.mark.parametrize(("kinds", "depth", "length"), [(2, 2, 20), (4, 6, 64), (3, 40, 100)])
def test_the_best_loss_of_dyck_is_what_the_ideal_predictor_gets(kinds: int, depth: int, length: int) -> None:
    task = Dyck(kinds=kinds, depth=depth, score="all")
    rows = texts(task, 600, length)
    losses = []
    for row, marks in rows:
        assert all(marks)
        level, loss = 1, 0.0
        for character in row[1:]:
            opens = character in CLOSER
            chance = 1.0 if level == 0 else 0.0 if level == depth else 0.5
            loss -= math.log(chance / kinds if opens else 1 - chance)
            level += 1 if opens else -1
        losses.append(loss / length)
    error = float(np.std(losses)) / math.sqrt(len(losses))
    assert error < 0.02
    assert task.best_loss(length) == pytest.approx(np.mean(losses), abs=3.5 * error + 1e-9)
    assert task.best_loss(1) == pytest.approx(math.log(2) + math.log(kinds) / 2), "after one bracket: a coin, then perhaps a kind"


# Of addition's three digits two are uniform; the carry is 0 or 1, and the digit before it says which in about three of four sums.
CHANCE = {"copy": 1 / 16, "recall": 1 / 8, "induction": 1 / 24, "addition": (0.1 + 0.1 + 0.75) / 3, "dyck": 1 / 3}


@pytest.mark.parametrize("length", [64, 47])
@every_kind
def test_neither_the_place_nor_the_last_token_nor_the_commonest_gives_the_answer(kind: type[Task], length: int) -> None:
    task = kind()
    keys: dict[str, Callable[[int, str], Hashable]] = {
        "place": lambda t, seen: t,
        "last token": lambda t, seen: seen[-1],
        "commonest": lambda t, seen: 0,
    }
    trained, held_out = scored_places(task, 1500, length, seed=1), scored_places(task, 500, length, seed=2)
    for name, key in keys.items():
        seen_with: defaultdict[Hashable, Counter[str]] = defaultdict(Counter)
        for t, seen, answer in trained:
            seen_with[key(t, seen)][answer] += 1
        guess = {k: counts.most_common(1)[0][0] for k, counts in seen_with.items()}
        accuracy = np.mean([guess.get(key(t, seen)) == answer for t, seen, answer in held_out])
        assert accuracy < CHANCE[task.name] + 0.03, f"{name}: {accuracy:.3f}"


@pytest.mark.parametrize(
    ("task", "bound"), [(Recall(), 0.45), (Induction(), 0.1), (Copy(shortest=4, longest=12), 0.5)], ids=["recall", "induction", "copy"]
)
def test_counting_a_rows_tokens_does_not_give_the_answer(task: Task, bound: float) -> None:
    """The best that one count can do: the token that stands so often in the row so far as answers mostly do.

    In copy, what is left of a string is told by counting, and what comes first is not.
    """
    trained, held_out = (
        [(Counter(c for c in seen if c.islower()), answer) for _, seen, answer in scored_places(task, 500, seed=seed)] for seed in (1, 2)
    )
    answers, tried = Counter[int](), Counter[int]()
    for counts, answer in trained:
        answers[counts[answer]] += 1
        tried.update(counts.values())
    rate = {n: answers[n] / tried[n] for n in tried}
    right = [max(counts, key=lambda c: rate.get(counts[c], 0.0)) == answer for counts, answer in held_out]
    assert np.mean(right) < bound, f"{np.mean(right):.3f}"


@every_kind
def test_a_row_too_short_for_an_example_names_the_least_context(kind: type[Any]) -> None:
    task = kind()
    least = {"copy": 16, "recall": 9, "induction": 23, "addition": 8, "dyck": 5}[task.name]
    with pytest.raises(ConfigError) as error:
        task.rows(2, least - 1, np.random.default_rng(0))
    assert f"model.context_length={least - 1} is too short for an example of data/corpus={task.name}" in str(error.value)
    assert str(error.value).endswith(f"at least {least}")
    assert error.value.code == 2
    _, scored = task.rows(500, least, np.random.default_rng(0))
    assert scored.any()
    if task.name != "dyck":  # chance may close no bracket after another
        assert scored.any(1).all(), "every row has an answer"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Copy, {"symbols": 1}, "data.corpus.symbols=1 must be between 2 and 200"),
        (Copy, {"symbols": 201}, "data.corpus.symbols=201 must be between 2 and 200"),
        (Copy, {"shortest": 0}, "data.corpus.shortest=0 must be at least 1"),
        (Copy, {"longest": 7}, "data.corpus.longest=7 must be at least 8 (data.corpus.shortest)"),
        (Recall, {"keys": 1}, "data.corpus.keys=1 must be between 2 and 200"),
        (Recall, {"values": 1}, "data.corpus.values=1 must be between 2 and 200"),
        (Recall, {"pairs": 1}, "data.corpus.pairs=1 must be between 2 and 8 (data.corpus.keys: those of a row are distinct)"),
        (Recall, {"pairs": 9}, "data.corpus.pairs=9 must be between 2 and 8 (data.corpus.keys: those of a row are distinct)"),
        (
            Induction,
            {"symbols": 15},
            "data.corpus.pattern=16 must be between 2 and 15 (data.corpus.symbols: those of a pattern are distinct)",
        ),
        (Induction, {"longest": 17}, "data.corpus.longest=17 must be between 2 and 16 (data.corpus.pattern: a stretch lies within it)"),
        (Induction, {"shortest": 9}, "data.corpus.shortest=9 must be between 2 and 8 (data.corpus.longest)"),
        (Induction, {"shortest": 1}, "data.corpus.shortest=1 must be between 2 and 8 (data.corpus.longest)"),
        (Addition, {"digits": 0}, "data.corpus.digits=0 must be between 1 and 18"),
        (Addition, {"digits": 19}, "data.corpus.digits=19 must be between 1 and 18"),
        (Dyck, {"kinds": 1}, "data.corpus.kinds=1 must be between 2 and 12"),
        (Dyck, {"kinds": 13}, "data.corpus.kinds=13 must be between 2 and 12"),
        (Dyck, {"depth": 1}, "data.corpus.depth=1 must be between 2 and 1000"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(kind: Callable[..., Task], options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        kind(**options)
    assert str(error.value) == message


OTHERS: dict[str, dict[str, Any]] = {
    "copy": {"symbols": 9, "shortest": 3, "longest": 11},
    "recall": {"pairs": 3, "keys": 9, "values": 9},
    "induction": {"symbols": 30, "pattern": 20, "shortest": 3, "longest": 9},
    "addition": {"digits": 5, "reversed": False, "held_out": 0.2},
    "dyck": {"kinds": 5, "depth": 9, "score": "all"},
}


@every_kind
def test_each_option_is_part_of_the_fingerprint(kind: type[Any]) -> None:
    component = registry.component("data/corpus", kind.name)
    options = component.options()
    task = registry.build(options)
    assert type(task) is kind
    before = task.fingerprint()
    assert before == {"version": task.VERSION, **{name: getattr(options, name) for name in component.options.__dataclass_fields__}}
    assert set(before) - {"version"} == set(OTHERS[kind.name]), "every option is tried"
    for name, value in OTHERS[kind.name].items():
        assert kind(**{name: value}).fingerprint() == before | {name: value} != before


@every_task
def test_pieces_are_a_few_rows_as_text(task: Task) -> None:
    pieces = list(task.pieces())
    assert pieces == list(task.pieces())
    assert len(pieces) == 16
    assert all(last and set(text) <= set(task.alphabet) and 65 <= len(text) < 200 for text, last in pieces)
    assert task.fingerprint()["version"] == (2 if task.name == "addition" else 1)


def test_a_corpus_of_text_is_no_task() -> None:
    assert not isinstance(PyDocs(), Task)
