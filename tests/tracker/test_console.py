"""What a terminal shows: tables whose figures and names stay whole, however narrow it is."""

from __future__ import annotations

import io

import pytest
from rich import box
from rich.table import Table

from gptlab.tracker.console import _Console


def shown(width: int) -> list[str]:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold")
    table.add_column("val/loss", justify="right", no_wrap=True)
    table.add_column("difference, 95 %", justify="right", no_wrap=True)
    table.add_row("learning_rate=0.001 rotary", "3.6379", "-0.0033 ± 0.0780")
    out = io.StringIO()
    _Console(file=out, width=width, soft_wrap=True).print(table)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [10, 40, 50, 60, 120])
def test_no_figure_is_cut_and_no_word_broken(width: int) -> None:
    text = "\n".join(shown(width))
    for whole in ("arm", "learning_rate=0.001", "rotary", "val/loss", "3.6379", "difference, 95 %", "-0.0033 ± 0.0780"):
        assert whole in text


def test_a_table_is_no_wider_than_it_must_be() -> None:
    assert max(map(len, shown(60))) <= 60
    narrow = max(map(len, shown(10)))
    assert narrow == max(map(len, shown(30))) <= 52
    assert any("learning_rate=0.001 rotary" in line for line in shown(120))
