"""What `gptlab evaluate --memorised` and `--contamination` print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.table import Table

from gptlab.evaluate.memory import Contamination, Copied
from gptlab.tracker.console import console, say

SHOWN = 60  # characters of a copied stretch

Told = tuple[str, Copied | tuple[str, Contamination]]


def show_by_heart(found: Sequence[Told], as_json: bool) -> None:
    """What was found of each run, by its name, as a table or as JSON."""
    if as_json:
        print(json.dumps([{"run": run, **_json(one)} for run, one in found], indent=1))
        return
    copied = [(run, one) for run, one in found if isinstance(one, Copied)]
    if copied:
        _copied(copied)
    contaminated = [(run, *one) for run, one in found if isinstance(one, tuple)]
    if contaminated:
        _contaminated(contaminated)


def _json(one: Copied | tuple[str, Contamination]) -> dict[str, object]:
    if isinstance(one, Copied):
        return one.to_json()
    name, told = one
    return {"text": name, **asdict(told), "share": told.share, "share_of_examples": told.share_of_examples}


def _copied(found: Sequence[tuple[str, Copied]]) -> None:
    table = Table(
        title="the longest stretch of the training text in what it writes", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, head in enumerate(("run", "of", "longest, tokens", "mean of samples", "the longest")):
        table.add_column(head, justify="right" if i in (2, 3) else "left", overflow="fold")
    for run, one in found:
        text = json.dumps(one.text if len(one.text) <= SHOWN else one.text[:SHOWN] + "…", ensure_ascii=False)
        table.add_row(run, one.source, f"{one.longest:,}", f"{one.mean:.1f}", text)
    console.print(table)
    one = found[0][1]
    say(
        (
            f"{one.samples} samples of {one.tokens // one.samples:,} tokens each; of the held-out text, what chance and style share",
            "dim",
        )
    )


def _contaminated(found: Sequence[tuple[str, str, Contamination]]) -> None:
    n = found[0][2].ngram
    table = Table(title=f"what stands in the training text, {n} words in a row", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(("run", "text", "examples", "of them seen", "n-grams", "of them seen", "too short")):
        table.add_column(head, justify="right" if i > 1 else "left", overflow="fold")
    for run, name, one in found:
        seen = f"{one.examples_seen:,} ({one.share_of_examples:.1%})", f"{one.ngrams:,}", f"{one.ngrams_seen:,} ({one.share:.1%})"
        table.add_row(run, name, f"{one.examples:,}", *seen, f"{one.too_short:,}")
    console.print(table)
    say((f"an example was seen when one stretch of {n} words of it was (Brown et al., 2020), whatever the case and punctuation", "dim"))
