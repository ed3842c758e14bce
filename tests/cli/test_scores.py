"""Benchmarks and probes of a study's runs stand in its comparison, with standard errors, beside what is published of GPT-2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptlab import compose, train
from gptlab.evaluate.results import Score, keep, kept
from gptlab.runner.run import Run
from gptlab.study import scores
from gptlab.study.published import KNOWN
from tests.tiny import tiny


def score(value: float, error: float | None = 0.03, task: str = "hellaswag", metric: str = "acc_norm") -> Score:
    return Score(task, metric, value, error, 100, 0)


def test_an_arms_error_is_of_its_examples_and_its_seeds(tmp_path: Path) -> None:
    runs = [Run(tmp_path / f"seed-{i}") for i in range(2)]
    for run, value in zip(runs, (0.3, 0.4), strict=True):
        run.directory.mkdir()
        keep(run, [score(value), score(value, None, "own", "f1")], precision="fp32")
    found = scores.of_runs(runs)
    both = found["hellaswag/acc_norm"]
    assert (both.value, both.runs) == (pytest.approx(0.35), 2)
    assert both.error == pytest.approx((0.03**2 + 0.05**2) ** 0.5)  # 0.05: deviation 0.0707 over the root of two
    assert found["own/f1"].error == pytest.approx(0.05)
    one = scores.of_runs(runs[:1])
    assert one["hellaswag/acc_norm"].error == pytest.approx(0.03)
    assert one["own/f1"].error is None
    keep(runs[0], [score(0.5)], precision="bf16")
    assert {name: s.value for name, s in kept(runs[0]).items()} == {"hellaswag/acc_norm": 0.5, "own/f1": 0.3}, "the last word about each"


def test_published_figures_stand_beside_the_scores_they_belong_to() -> None:
    arms = [("small", {"hellaswag/acc_norm": scores.Estimate(0.26, 0.01, 1), "english/acc": scores.Estimate(0.6, 0.02, 1)}), ("other", {})]
    head, rows, sources = scores.lines(arms)
    assert head == ["score", "small", "other", "gpt2 124M", "gpt2 1.5B"], "no column for a size of which nothing is published"
    assert rows == [["hellaswag/acc_norm", "0.2600 ± 0.0100", "", "0.3114", "0.5089"], ["english/acc", "0.6000 ± 0.0200", "", "", ""]]
    assert len(sources) == 1
    assert "build-nanogpt" in sources[0]
    assert scores.lines([("small", {"english/acc": scores.Estimate(0.6, None, 1)})])[0] == ["score", "small"]
    assert scores.table([("a", {})]) is None
    for one in KNOWN:
        told = [value for value in one.values if value is not None]
        ordered = sorted(told, reverse="perplexity" in one.name)
        assert told == ordered, f"{one.name}: a larger GPT-2 is better"


def test_a_comparison_shows_them(corpus_file: Path, gptlab: Callable[..., Any]) -> None:
    for norm in ("layernorm", "rmsnorm"):
        run = train(compose(tiny(corpus_file, f"model/norm={norm}", "study=judged"), name=norm), settings={"model/norm": norm}).run
        if norm == "rmsnorm":
            keep(run, [score(0.31), score(0.62, 0.02, "english", "acc")])
    shown = gptlab("compare", "judged")
    assert shown.code == 0, shown.err
    for words in ("evaluated, ± a standard error", "0.6200 ± 0.0200", "gpt2 124M", "hellaswag/acc_norm of GPT-2: the harness"):
        assert words in shown.out, words
    assert "| hellaswag/acc_norm |  | 0.3100 ± 0.0300 | 0.3114 | 0.5089 |" in gptlab("compare", "judged", "--markdown").out
    rows = json.loads(gptlab("compare", "judged", "--json").out)["rows"]
    assert rows[1]["scores"]["english/acc"] == {"value": 0.62, "error": 0.02, "runs": 1}
    header, first, second = gptlab("compare", "judged", "--csv").out.splitlines()
    assert header.endswith("eval/hellaswag/acc_norm,eval/hellaswag/acc_norm_stderr,eval/english/acc,eval/english/acc_stderr")
    assert first.endswith(",,,,")
    assert second.endswith("0.31,0.03,0.62,0.02")
