"""metrics.jsonl: one JSON object a line, the record every comparison reads."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from gptlab.tracker.protocol import Metrics


class MetricsFile:
    """Appends lines, each written whole. `keep_to` drops what a resume will replay."""

    def __init__(self, file: Path, keep_to: int) -> None:
        self._path = file
        self._open(keep_to)

    def _open(self, keep_to: int) -> None:
        if self._path.exists():
            kept = [line for line in read_metrics(self._path) if line.get("step", 0) <= keep_to]
            partial = self._path.with_suffix(".part")
            partial.write_text("".join(_line(m) for m in kept), encoding="utf-8")
            os.replace(partial, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Take back the lines of all steps after this one: they will be trained again."""
        self._file.close()
        self._open(step)

    def write(self, metrics: Metrics) -> None:
        self._file.write(_line(metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


NOT_FINITE = ("nan", "inf", "-inf")  # as metrics.jsonl has them


def finite(value: Any) -> Any:
    """For JSON that others read, which has no NaN: a number that is not finite is none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _line(metrics: dict[str, Any]) -> str:
    # JSON has no NaN: a value that is not finite is written as its name
    safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    return json.dumps(safe) + "\n"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a crash is left out."""
    if not file.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():  # damaged bytes make no JSON, and their line is left out
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    points = [(int(m["step"]), float(m[name])) for m in lines if name in m]
    return [s for s, _ in points], [v for _, v in points]
