"""A table beside a study's own: for a terminal, and in markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For a terminal: the first column names the row, the others are figures."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in markdown, with its title above it."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join(["", f"{title}:", "", lines[0], "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|", *lines[1:], ""])
