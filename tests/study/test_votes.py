"""Votes: their interval is Wilson's, each pair of arms is told from one side, and a damaged file loses the damaged line alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from gptlab.config.folders import study_folder
from gptlab.study.votes import VOTES, tally, votes_file, wilson

ARMS = {"b0": "base", "b1": "base", "m0": "muon", "w0": "wide"}


def vote(a: str, b: str, which: str) -> dict[str, Any]:
    return {"vote": which, "a": {"run": a}, "b": {"run": b}}


def written(*lines: Any) -> Path:
    folder = study_folder("s")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VOTES).write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return folder / VOTES


@pytest.mark.parametrize(("won", "count"), [(0, 1), (1, 1), (0, 12), (12, 12), (7, 12), (530, 1000)])
def test_the_interval_is_wilson_s(won: int, count: int) -> None:
    expected = stats.binomtest(won, count).proportion_ci(method="wilson")
    assert wilson(won, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= wilson(won, count)[0] <= won / count <= wilson(won, count)[1] <= 1


def test_a_pair_is_told_from_the_later_arm_whatever_the_side_and_the_seed() -> None:
    written(
        vote("b0", "m0", "b"), vote("m0", "b1", "a"), vote("m0", "b0", "b"), vote("b0", "m0", "tie"), vote("b0", "m0", "bad"),
        vote("w0", "m0", "a"), vote("b0", "b1", "a"), vote("b0", "elsewhere", "a"),
    )  # fmt: skip
    first, second = tally("s", ARMS)
    assert (first.arm, first.against, first.won, first.lost, first.ties, first.bad, first.votes) == ("muon", "base", 2, 1, 1, 1, 5)
    assert (first.rate, (first.low, first.high)) == (2 / 3, wilson(2, 3))
    assert (second.arm, second.against, second.won) == ("wide", "muon", 1)


def test_ties_alone_give_no_rate() -> None:
    written(vote("b0", "m0", "tie"))
    (found,) = tally("s", ARMS)
    assert (found.rate, found.low, found.high) == (None, None, None)
    assert found.sentence == "muon against base: no vote for either"


def test_the_sentence_says_which_is_preferred_only_where_the_interval_does() -> None:
    written(*[vote("b0", "m0", "b")] * 9, vote("b0", "m0", "a"))
    assert tally("s", ARMS)[0].sentence == "muon: preferred to base in blind pairs: 90% (60% to 98%) of 10 votes for one of them"
    written(*[vote("b0", "m0", "a")] * 9)
    assert "less liked than base" in tally("s", ARMS)[0].sentence
    written(vote("b0", "m0", "a"))
    assert "not told apart from base" in tally("s", ARMS)[0].sentence


def test_a_damaged_line_is_left_out_and_the_others_count() -> None:
    whole = vote("b0", "m0", "b")
    written(
        whole,
        json.dumps(whole)[:30] + "\n",
        "[1]\n",
        '{"vote": "x"}\n',
        '{"vote": "a", "a": 1, "b": 2}\n',
        "\0\xff\n",
        whole,
        '{"vote": "a", "a"',
    )
    assert tally("s", ARMS)[0].won == 2
    assert tally("nothing", ARMS) == []


def test_votes_on_runs_of_no_common_study_go_to_the_runs_folder(tmp_path: Path) -> None:
    assert votes_file("b0", "m0") == tmp_path / "runs" / VOTES
    assert votes_file(None, "m0") == tmp_path / "runs" / VOTES
