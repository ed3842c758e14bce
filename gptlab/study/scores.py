"""What the runs of an arm were judged to be able to do: benchmarks and probes, with standard errors, beside GPT-2's published figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from gptlab.evaluate.results import kept
from gptlab.runner.run import Run
from gptlab.study.published import SIZES, Published, published

TITLE = "evaluated, ± a standard error"


@dataclass(frozen=True)
class Estimate:
    """A score, mean of the runs that have it. `error` is of the examples and, with several runs, of the seeds too; None: not known."""

    value: float
    error: float | None
    runs: int


def of_runs(runs: Iterable[Run]) -> dict[str, Estimate]:
    """The scores of an arm's runs, by name.

    The examples are the same for every seed, so that their share of the error does not fall with the number of runs.
    """
    told = [kept(run) for run in runs]
    found = {}
    for name in dict.fromkeys(name for scores in told for name in scores):
        here = [scores[name] for scores in told if name in scores]
        n, mean = len(here), sum(score.value for score in here) / len(here)
        errors = [score.error for score in here if score.error is not None]
        seeds = math.sqrt(sum((score.value - mean) ** 2 for score in here) / (n - 1) / n) if n > 1 else 0.0
        of_examples = math.sqrt(sum(e**2 for e in errors) / n) if len(errors) == n else None
        error = math.hypot(of_examples, seeds) if of_examples is not None else seeds or None
        found[name] = Estimate(mean, error, n)
    return found


def cell(estimate: Estimate | None) -> str:
    """`0.6231 ± 0.0147`; nothing where there is none."""
    if estimate is None:
        return ""
    return f"{estimate.value:.4f}" + ("" if estimate.error is None else f" ± {estimate.error:.4f}")


def lines(arms: Sequence[tuple[str, dict[str, Estimate]]]) -> tuple[list[str], list[list[str]], list[str]]:
    """The table's head, its rows and the sources of its published figures; of sizes that have none of them there is no column."""
    names = list(dict.fromkeys(name for _, scores in arms for name in scores))
    known = {one.name: one for one in published(names)}
    sizes = [i for i in range(len(SIZES)) if any(one.values[i] is not None for one in known.values())]
    head = ["score", *(label for label, _ in arms), *(SIZES[i] for i in sizes)]
    rows = [[name, *(cell(scores.get(name)) for _, scores in arms), *(_published(known.get(name), i) for i in sizes)] for name in names]
    return head, rows, [f"{one.name} of GPT-2: {one.source}" for one in known.values()]


def _published(one: Published | None, size: int) -> str:
    value = one.values[size] if one is not None else None
    return "" if value is None else f"{value:.4f}" if value < 1 else f"{value:.2f}"


def table(arms: Sequence[tuple[str, dict[str, Estimate]]]) -> Table | None:
    """For a terminal; None where nothing was evaluated."""
    head, rows, _ = lines(arms)
    if not rows:
        return None
    shown = Table(title=TITLE, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(arms: Sequence[tuple[str, dict[str, Estimate]]]) -> str:
    """As a markdown table with its sources; empty where nothing was evaluated."""
    head, rows, sources = lines(arms)
    if not rows:
        return ""
    told = [f"| {' | '.join(head)} |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    told += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["", f"{TITLE[0].upper()}{TITLE[1:]}:", "", *told, *(["", *(f"- {s}" for s in sources)] if sources else [])]) + "\n"
