"""`gptlab compare STUDY --inspect`: what the arms hold within, over their seeds, on one tokeniser alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gptlab import compose, load, train
from gptlab.config.compose import settings
from gptlab.interpret import head_scores, repeated_tokens
from gptlab.runner.run import all_runs
from gptlab.study.inspected import MEASURES, ROWS, inspect_study
from gptlab.study.statistics import mean_interval, paired
from tests.cli.conftest import Command
from tests.cli.conftest import gptlab as gptlab
from tests.tiny import tiny


@pytest.fixture
def study(corpus_file: Path) -> str:
    for seed in (0, 1):
        for position in ("learned", "rotary"):
            own = [f"model/position={position}", f"seed={seed}"]
            train(compose(tiny(corpus_file, "study=within", *own, steps=4)), settings=settings(own))
    return "within"


def test_the_measures_are_those_of_each_run_with_intervals_over_the_seeds(study: str, gptlab: Command) -> None:
    shown = gptlab("compare", study, "--inspect", "--json")
    assert shown.code == 0, shown.err
    told = {(m["measure"], m["arm"]): m for m in json.loads(shown.out)["inspect"]}
    scores: dict[str, dict[int, float]] = {"learned": {}, "rotary": {}}
    for run in all_runs():
        loaded = load(str(run.directory))
        arm = "rotary" if "rotary" in run.directory.name else "learned"
        scores[arm][loaded.config.seed] = head_scores(loaded, repeated_tokens(loaded, rows=ROWS))["induction"].max()
    for arm, values in scores.items():
        mean = mean_interval([values[0], values[1]])
        assert told["induction", arm]["mean"]["mean"] == pytest.approx(mean.mean, abs=1e-6)
        assert told["induction", arm]["mean"]["half"] == pytest.approx(mean.half, abs=1e-6)
    difference = paired(scores["rotary"], scores["learned"])
    assert difference is not None
    assert told["induction", "rotary"]["difference"]["mean"] == pytest.approx(difference.difference, abs=1e-6)
    assert told["induction", "learned"]["difference"] is None
    assert {m for m, _ in told} == set(MEASURES)


def test_it_is_a_table_for_readers_too(study: str, gptlab: Command) -> None:
    table = gptlab("compare", study, "--inspect").out
    assert {"induction", "lens"} <= set(table.split())  # the rest of a name may stand in the line below
    assert "| induction score, best head | learned | 2 |" in gptlab("compare", study, "--inspect", "--markdown").out
    assert "induction score" not in gptlab("compare", study).out


def test_a_bigram_among_the_arms_has_what_it_has(corpus_file: Path) -> None:
    for depth in (0, 1):
        own = [f"model.depth={depth}"]
        train(compose(tiny(corpus_file, "study=mixed", *own, steps=2)), settings=settings(own))
    found, notes = inspect_study("mixed")
    assert [m.arm for m in found if m.measure == "induction"] == ["depth=1"]
    assert [m.arm for m in found if m.measure == "lens_depth"] == ["depth=0", "depth=1"]
    assert any("bigram" in note for note in notes)


def test_arms_of_two_contexts_are_scored_on_the_same_rows(corpus_file: Path) -> None:
    for parts in (["model.context_length=8"], ["model.context_length=32"], ["model.context_length=2"], ["model.depth=0"]):
        train(compose(tiny(corpus_file, "study=contexts", *parts, steps=1)), settings=settings(parts))
    found, notes = inspect_study("contexts")
    told = {m.arm: m.mean.mean for m in found if m.measure == "induction"}
    for run in all_runs():
        loaded = load(str(run.directory))
        if loaded.config.model.depth and loaded.config.model.context_length > 2:
            scores = head_scores(loaded, repeated_tokens(loaded, rows=ROWS, length=4))
            assert told.pop(f"context_length={loaded.config.model.context_length}") == pytest.approx(scores["induction"].max(), abs=1e-6)
    assert not told
    assert any("no tokens that repeat would" in note for note in notes)
    assert not any("different tokens" in note and "model.context_length=8" in note for note in notes)


def test_a_text_that_is_gone_or_another_is_told_and_the_heads_are_scored(corpus_file: Path, empty_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text(corpus_file.read_text(encoding="utf-8"), encoding="utf-8")
    train(compose(tiny(file, "study=gone", steps=2)))
    assert {m.measure for m in inspect_study("gone")[0]} == set(MEASURES)
    file.write_text(corpus_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    found, notes = inspect_study("gone")
    assert any("its text has changed since it was trained" in note for note in notes)
    assert {m.measure for m in found} == {"induction", "previous_token", "duplicate_token", "entropy", "weight_norm"}
    file.unlink()
    shutil.rmtree(empty_home / "data")
    assert any("its text is not here" in note for note in inspect_study("gone")[1])


def test_two_tokenisers_are_refused(corpus_file: Path, gptlab: Command) -> None:
    for tokenizer in ("char", "byte"):
        own = [f"data/tokenizer={tokenizer}", "data.validation_tokens=0"]
        train(compose(tiny(corpus_file, "study=two", *own, steps=2)), settings=settings(own))
    assert gptlab("compare", "two").code == 0, "in bits per byte"
    refused = gptlab("compare", "two", "--inspect")
    assert refused.code == 2
    assert "the arms 'char' and 'byte' do not share one tokeniser" in refused.err


def test_any_metric_can_be_drawn_and_one_that_nobody_measured_is_refused(study: str, gptlab: Command, tmp_path: Path) -> None:
    file = tmp_path / "two.png"
    assert gptlab("compare", study, "--png", str(file), "--metric", "val/loss", "--metric", "train/loss").code == 0
    assert file.stat().st_size > 5000
    refused = gptlab("compare", study, "--png", str(file), "--metric", "val/los")
    assert refused.code == 2
    assert "no run of within has measured it (did you mean val/loss?)" in refused.err
    alone = gptlab("compare", study, "--metric", "val/loss")
    assert alone.code == 2
    assert "--metric goes with --png FILE" in alone.err
