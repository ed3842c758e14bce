"""held_out.safetensors: what a run's last evaluation found of each row of its held-out set, for comparisons text by text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

if TYPE_CHECKING:
    from gptlab.runner.run import Run
    from gptlab.runner.validation import Rows

HELD_OUT = "held_out.safetensors"


def write_rows(run: Run, rows: Rows) -> None:
    """Write the rows of the set `val`, whole or not at all."""
    partial = run.directory / f".{HELD_OUT}.part"
    columns = {"nats": rows.nats, "tokens": rows.tokens, "document": rows.document}
    partial.write_bytes(save({name: np.ascontiguousarray(column) for name, column in columns.items()}))  # it writes memory as it lies
    os.replace(partial, run.directory / HELD_OUT)


def read_rows(run: Run) -> dict[str, npt.NDArray[np.float64]] | None:
    """`nats`, `tokens` and `document` of each row; None of a run from before they were kept, or where they cannot be read."""
    try:
        found: dict[str, npt.NDArray[np.float64]] = load_file(run.directory / HELD_OUT)
    except (OSError, SafetensorError):
        return None
    return found
