"""metrics.jsonl survives what happens to files."""

from __future__ import annotations

import math
from pathlib import Path

from gptlab.tracker.jsonl import MetricsFile, curve, read_metrics


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "val/loss": 2.5}\n{"step": 2, "val/l')
    assert read_metrics(file) == [{"step": 1, "val/loss": 2.5}]
    assert curve(read_metrics(file), "val/loss") == ([1], [2.5])


def test_reopening_drops_what_a_resume_will_replay(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = MetricsFile(file, 0)
    for step in (1, 2, 3):
        first.write({"step": step})
    first.close()
    second = MetricsFile(file, 2)
    second.write({"step": 3, "again": 1})
    second.close()
    assert read_metrics(file) == [{"step": 1}, {"step": 2}, {"step": 3, "again": 1}]


def test_a_value_that_is_not_finite_stays_json(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file, 0)
    metrics.write({"step": 1, "train/loss": math.nan, "x": math.inf})
    metrics.close()
    assert read_metrics(file) == [{"step": 1, "train/loss": "nan", "x": "inf"}]
