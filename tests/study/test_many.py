"""A comparison of many runs is quick: it reads what each left at its end, and no curve."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from gptlab import compose, train
from gptlab.runner.held_out import write_rows
from gptlab.runner.run import Run, all_runs
from gptlab.runner.validation import Rows
from gptlab.study.compare import compare
from tests.tiny import tiny

ARMS, SEEDS, STEPS, ROWS = 100, 5, 2000, 3000


@pytest.fixture
def many(corpus_file: Path) -> None:
    """Five hundred finished runs, copies of a real one but for what they measured."""
    train(compose([*tiny(corpus_file, steps=2), "study=many"]))
    (real,) = all_runs()
    generator, files = np.random.default_rng(0), ("config.json", "data.json", "environment.json")
    done = real.read("done.json")
    assert done is not None
    told = [json.loads(line) for line in real.metrics_file.read_text(encoding="utf-8").splitlines()][-1]
    curve = "".join(json.dumps(told | {"step": i}) + "\n" for i in range(STEPS))
    study, lines = real.directory.parent, []
    (study / "members.jsonl").unlink()
    for arm in range(ARMS):
        for seed in range(SEEDS):
            run = Run(study / f"arm{arm},seed={seed}-{arm:05x}{seed:05x}")
            run.directory.mkdir()
            for name in files:
                (run.directory / name).write_bytes((real.directory / name).read_bytes())
            run.metrics_file.write_text(curve, encoding="utf-8")
            nats = generator.normal(50, 1, ROWS) + generator.normal(0, 0.1)
            write_rows(run, Rows(nats, np.full(ROWS, 16.0), np.arange(ROWS)))
            run.write("done.json", done | {"summary": done["summary"] | {"val/loss": float(nats.sum() / ROWS / 16)}})
            lines.append(
                {"identity": run.identity, "name": run.name, "arm": str(arm), "settings": {"arm": str(arm)}, "seed": seed, "job": arm}
            )
            lines[-1] |= {"label": f"arm {arm}", "time": float(seed)}
    (study / "members.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_five_hundred_runs_are_compared_in_under_five_seconds(many: None) -> None:
    started = time.process_time()
    found = compare("many")
    taken = time.process_time() - started
    assert len(found.rows) == ARMS
    assert all(row.text is not None and row.verdict is not None for row in found.rows[1:])
    assert taken < 5, f"{taken:.1f} s"
