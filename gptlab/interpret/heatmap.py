"""A patching as a picture: a matrix of colours, a part a row, a position or receiver a column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")
CELL, MOST = 0.34, 60.0  # inches: of a cell, and of a picture's side
WRITTEN = 16  # columns, up to which each cell holds its number


def heat_map(values: Float[Tensor, "r c"], rows: Sequence[str], columns: Sequence[str], file: str | Path, *, title: str) -> Path:
    """Draw a matrix as .png, .svg or .pdf: 0 is white, above it goes to purple and below to orange. Raises ConfigError for another name."""
    from matplotlib.figure import Figure  # not pyplot: a notebook's own pictures stay as they are

    where = Path(file)
    if where.suffix.lower() not in FORMATS:
        raise ConfigError(f"{where}: a heat map is written as one of {', '.join(FORMATS)}")
    most = max(1.0, float(values.abs().max().nan_to_num(1.0)))
    numbers = len(columns) <= WRITTEN
    wide = CELL * (1.6 if numbers else 1.0)
    figure = Figure(figsize=(min(MOST, 3.2 + wide * len(columns)), min(MOST, 1.8 + CELL * len(rows))), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(values.cpu().numpy(), cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
    slanted = max(map(len, columns)) > 3
    axes.set_xticks(range(len(columns)), columns, rotation=60 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(len(rows)), rows)
    if numbers:
        for row, line in enumerate(values.tolist()):
            for column, value in enumerate(line):
                ink = "white" if abs(value) > 0.7 * most else "black"
                # + 0.0: no minus before a nought
                axes.text(column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_title(title, fontsize=9, wrap=True)
    figure.colorbar(drawn, ax=axes, shrink=0.8).set_label("0: the target run, 1: the source run")
    figure.savefig(where, dpi=120)
    return where
