"""Votes on blind pairs of answers: where they are kept, and what they say of two arms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from scipy import special

from gptlab.config.folders import runs_root, study_folder
from gptlab.runner.run import all_runs, members, studies
from gptlab.study import tables
from gptlab.study.statistics import CONFIDENCE
from gptlab.tracker.jsonl import read_metrics

VOTES = "votes.jsonl"
TITLE = "votes on blind pairs"
HEAD = ("arm", "votes", "won", "lost", "tie", "both bad", "won, 95 %")


@dataclass(frozen=True)
class Tally:
    """Blind votes on two arms. `rate`: of the votes for one of the two, the share for `arm`; `low`, `high`: its 95 % interval
    (Wilson, 1927); None where there is no such vote. Ties and votes that both are bad are told apart, and count for neither."""

    arm: str
    against: str
    won: int
    lost: int
    ties: int
    bad: int
    rate: float | None
    low: float | None
    high: float | None

    @property
    def votes(self) -> int:
        return self.won + self.lost + self.ties + self.bad

    @property
    def sentence(self) -> str:
        """In which direction the votes point, if the interval leaves one out."""
        if self.rate is None or self.low is None or self.high is None:
            return f"{self.arm} against {self.against}: no vote for either"
        shown = f"{self.rate:.0%} ({self.low:.0%} to {self.high:.0%}) of {self.won + self.lost} votes for one of them"
        word = "preferred to" if self.low > 0.5 else "less liked than" if self.high < 0.5 else "not told apart from"
        return f"{self.arm}: {word} {self.against} in blind pairs: {shown}"


def wilson(won: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share. `count` is at least 1."""
    z = float(special.ndtri(0.5 + confidence / 2))
    middle = (won + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(won * (count - won) / count + z * z / 4)
    # At the ends it is exact, and rounding would leave it a little beyond.
    return (0.0 if won == 0 else middle - half), (1.0 if won == count else middle + half)


def votes_file(one: str | None, other: str | None) -> Path:
    """Where votes on two runs go, by their identities: the folder of a study that compares both (of several, the one in which one of them
    lies), else the runs' root."""
    if one is not None and other is not None:
        home = {run.study for run in all_runs() if run.identity in (one, other)}
        for study in sorted(studies(), key=lambda name: name not in home):
            if {one, other} <= {member["identity"] for member in members(study)}:
                return study_folder(study) / VOTES
    return runs_root() / VOTES


def read_votes(file: Path) -> list[dict[str, Any]]:
    """The votes of a file; a line that was cut off, or that is no vote, is left out."""
    return [line for line in read_metrics(file) if _is_vote(line)]


def _is_vote(line: Any) -> bool:
    if not isinstance(line, dict) or line.get("vote") not in ("a", "b", "tie", "bad"):
        return False
    return all(isinstance(line.get(side), dict) and isinstance(line[side].get("run"), str) for side in ("a", "b"))


def tally(study: str, arms: Mapping[str, str]) -> list[Tally]:
    """The votes on the arms of a study, pair by pair. `arms`: the arm's label of each run, by identity, in the order of the table: each
    pair is told from the side of the arm that comes later, against the earlier."""
    order = {label: i for i, label in enumerate(dict.fromkeys(arms.values()))}
    counted: dict[tuple[str, str], Counter[str]] = {}
    for line in read_votes(study_folder(study) / VOTES):
        a, b = (arms.get(line[side]["run"]) for side in ("a", "b"))
        if a is None or b is None or a == b:
            continue
        earlier, later = sorted((a, b), key=order.__getitem__)
        vote = line["vote"] if line["vote"] in ("tie", "bad") else ("won" if {"a": a, "b": b}[line["vote"]] == later else "lost")
        counted.setdefault((later, earlier), Counter())[vote] += 1
    pairs = sorted(counted, key=lambda pair: (order[pair[1]], order[pair[0]]))
    return [_tally(arm, against, counted[arm, against]) for arm, against in pairs]


def _tally(arm: str, against: str, votes: Mapping[str, int]) -> Tally:
    won, lost = votes["won"], votes["lost"]
    low, high = wilson(won, won + lost) if won + lost else (None, None)
    return Tally(arm, against, won, lost, votes["tie"], votes["bad"], won / (won + lost) if won + lost else None, low, high)


def table(tallies: Sequence[Tally]) -> Table:
    """For a terminal."""
    return tables.table(TITLE, HEAD, _cells(tallies))


def markdown(tallies: Sequence[Tally]) -> str:
    """The same in markdown, with its title above it."""
    return tables.markdown(TITLE, HEAD, _cells(tallies))


def _cells(tallies: Sequence[Tally]) -> list[tuple[str, ...]]:
    return [
        (
            f"{t.arm} against {t.against}",
            *(str(n) for n in (t.votes, t.won, t.lost, t.ties, t.bad)),
            "" if t.rate is None or t.low is None or t.high is None else f"{t.rate:.0%} ({t.low:.0%} to {t.high:.0%})",
        )
        for t in tallies
    ]
