"""Arms without a difference, on real runs: how often the whole path calls them different, and what pairing by seed gains."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.study.compare import compare
from tests.tiny import tiny

# Forty studies take ten minutes: GPTLAB_NULL_STUDIES=40. With ten, four false verdicts would come by chance once in a thousand times.
STUDIES, SEEDS = int(os.environ.get("GPTLAB_NULL_STUDIES", "10")), 5


@pytest.mark.slow
def test_studies_of_nothing_seldom_have_a_verdict(corpus_file: Path) -> None:
    """Two arms whose weights begin a millionth apart beside the baseline, far enough trained for rounding to have grown to chaos."""
    more = ["model/init=gpt2_nudged", "model.init.nudge=2e-6"]
    arms: dict[str, list[str]] = {"plain": [], "nudged": ["model/init=gpt2_nudged"], "more": more}
    false, differences = 0, []
    for number in range(STUDIES):
        for seed in range(SEEDS * number, SEEDS * (number + 1)):
            for name, overrides in arms.items():
                run = tiny(corpus_file, "optimizer.learning_rate=0.02", "callbacks.checkpoint.background=false", *overrides, steps=60)
                train(compose([*run, f"study=null{number}", f"arm={name}", f"seed={seed}"]))
        found = compare(f"null{number}")
        assert [row.label for row in found.rows] == list(arms)
        verdicts = [row.verdict for row in found.rows if row.verdict is not None]
        false += any(v.kind in ("better", "worse") for v in verdicts)
        differences += [v.interval.mean for v in verdicts if v.interval is not None]
    print(f"{false} of {STUDIES} null studies had a false verdict; the largest difference of means was {max(map(abs, differences)):.2g}")
    assert max(map(abs, differences)) > 1e-6, "the arms are one and the same run"
    assert false <= max(3, STUDIES // 8)
