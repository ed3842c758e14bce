"""What `gptlab evaluate RUN… --chats FILE` prints: how chatbots answer questions whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations

from rich import box
from rich.table import Table

from gptlab.config.errors import ConfigError
from gptlab.evaluate.chats import Answers, answers, duel, questions_of
from gptlab.runner.load import Loaded
from gptlab.tracker.console import console, say

SHOWN, LETTERS = 3, 300  # answers of each run that are shown, and how much of each


def show_chats(named: Mapping[str, Loaded], path: str, *, limit: int, max_tokens: int, as_json: bool) -> None:
    """Answer the questions of a file with each run, and print the shares. Raises ConfigError or DataError."""
    if max_tokens < 1:
        raise ConfigError(f"--answer-tokens {max_tokens} must be at least 1")
    questions = questions_of(path, limit)
    found: dict[str, Answers] = {}
    for name, loaded in named.items():
        with console.status(f"{name} answers {len(questions):,} questions"):
            found[name] = answers(loaded, questions, max_tokens)
    duels = {(a, b): duel(found[a], found[b]) for a, b in combinations(found, 2)}
    if as_json:
        told = [{"run": name, **one.to_json()} for name, one in found.items()]
        against = [
            {"run": a, "against": b, "wins": d.wins, "losses": d.losses, "ties": d.ties, "win_rate": d.rate, "p": d.p}
            for (a, b), d in duels.items()
        ]
        print(json.dumps({"runs": told, "duels": against}, indent=1))
        return
    shares = {name: one.shares() for name, one in found.items()}
    columns = [name for name in ("exact", "number", "ended") if any(name in own for own in shares.values())]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "answers", *columns, "tokens"):
        shown.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for name, one in found.items():
        cells = [f"{own[0]:.1%} ± {own[1]:.1%}" if (own := shares[name].get(column)) else "" for column in columns]
        shown.add_row(name, f"{len(one.samples):,}", *cells, f"{sum(s.tokens for s in one.samples) / len(one.samples):.0f}")
    console.print(shown)
    say(("exact: the right text; number: the last number is the right one; ended: by itself; ± one standard error", "dim"))
    for name, one in found.items():
        if one.passed_over:
            say((f"{name}: {one.passed_over:,} questions do not fit its context", "yellow"))
    for (a, b), d in duels.items():
        say(f"{a} against {b}: right where the other is not {d.wins:,} times to {d.losses:,}, win rate {d.rate:.1%} (p {d.p:.2g})")
    for i in range(min(SHOWN, *(len(one.samples) for one in found.values()))):
        sample = next(iter(found.values())).samples[i]
        say(("\n" + sample.prompt[-LETTERS:], "bold"))
        say(("the right answer  ", "dim"), _begin(sample.reference))
        for name, one in found.items():
            mine = next((s for s in one.samples if s.prompt == sample.prompt), None)
            if mine is not None:
                say((f"{name}  ", "cyan"), _begin(mine.completion))


def _begin(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
