"""`gptlab compare STUDY --html FILE`: one page that needs no network, holds what was measured, and takes no text for a tag."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab import compose, train
from gptlab.config import codec
from gptlab.config.compose import settings
from gptlab.runner.run import Run, all_runs
from gptlab.study.compare import compare
from gptlab.study.page import MOST_POINTS, NONE, curves, packed
from gptlab.tracker.jsonl import curve
from tests.cli.conftest import Command
from tests.tiny import tiny


def unpacked(column: dict[str, Any]) -> np.ndarray:
    """What the page's script makes of a column."""
    if "n" in column:
        return np.linspace(column["first"], column["last"], column["n"])
    if "f4" in column:
        return np.frombuffer(base64.b64decode(column["f4"]), "<f4").astype(float)
    steps = np.frombuffer(base64.b64decode(column["u2"]), "<u2")
    values = column["low"] + steps * (column["high"] - column["low"]) / (NONE - 1)
    return np.where(steps == NONE, np.nan, values)


@pytest.fixture
def study(corpus_file: Path) -> str:
    """Two arms on two seeds, of which one says something that looks like HTML."""
    for seed in (0, 1):
        for norm in ("layernorm", "rmsnorm"):
            own = [f"model/norm={norm}", f"seed={seed}"]
            more = ["study=p", "callbacks.evaluation.every=2", "callbacks.samples.every=6"]
            train(compose([*tiny(corpus_file, *more, *own, steps=6)]), settings=settings(own))
    for run in all_runs():
        (run.directory / "samples").mkdir(exist_ok=True)
        (run.directory / "samples" / "step-9.txt").write_text("</script><img src=x onerror=alert(1)>{{data}}", encoding="utf-8")
    return "p"


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    read: dict[str, Any] = json.loads(found)
    return read


def test_the_page_holds_what_was_measured(study: str, gptlab: Command, tmp_path: Path) -> None:
    done = gptlab("compare", study, "--html", str(tmp_path / "new" / "page.html"))
    assert done.code == 0, done.err
    assert f"page: {tmp_path / 'new' / 'page.html'}" in done.out.replace("\n", "")
    data = data_of((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert data["comparison"] == json.loads(json.dumps(compare(study).to_json()))
    runs = {r.identity: r for r in all_runs()}
    for arm in data["arms"]:
        assert [r["seed"] for r in arm["runs"]] == [0, 1]
        for told in arm["runs"]:
            steps, losses = curve(runs[told["identity"]].metrics(), "val/loss")
            assert unpacked(told["curves"]["val/loss"]["y"]) == pytest.approx(losses)
            assert unpacked(told["curves"]["val/loss"]["step"]) == pytest.approx(steps)
    assert [d["key"] for d in data["differences"]] == ["model/norm", "model.norm.eps"]
    assert data["differences"][0]["values"] == ["layernorm", "rmsnorm"]
    assert data["arms"][0]["command"] is None, "the Python API made it"


def test_an_arms_command_is_the_one_that_made_it(
    gptlab: Command, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what only an added key or a file of one's own says; an experiment's arm is trained alone. Its runs are found, and skipped."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(
        "defaults:\n  - override /hydra/sweeper: arms\n"
        "hydra: {mode: MULTIRUN, sweeper: {seeds: 2, vary: {model/norm: 'layernorm,rmsnorm'}}}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    own = tiny(corpus_file, "+optimizer.rates.embedding=0.3", steps=2)
    asked = {"plain": ["-m", *own, "model/norm=layernorm,rmsnorm", "seed=0,1"], "mine": ["experiment=mine", *own]}
    for name, arguments in asked.items():
        made = gptlab("train", *arguments, f"study={name}")
        assert made.code == 0, made.err
        assert gptlab("compare", name, "--html", "page.html").code == 0
        arms = data_of(Path("page.html").read_text(encoding="utf-8"))["arms"]
        for arm in arms:
            told = [gptlab(*shlex.split(line)[1:]) for line in arm["command"].splitlines()]
            assert [result.code for result in told] == [0] * len(told), told
            assert sum(result.out.count(", skipped") for result in told) == 2, arm["command"]
            assert not any("✗" in result.out or "tokens/s)" in result.out for result in told)
    assert len(all_runs()) == 4


def test_nothing_is_asked_of_a_network_and_no_text_becomes_a_tag(study: str, gptlab: Command, tmp_path: Path) -> None:
    gptlab("compare", study, "--html", str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    addresses = re.findall(r"https?://[^\s\"'<>)]+", text)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"
    assert not re.findall(r"<(?:link|img|iframe)\b|\bsrc=\"|@import|url\(", text.replace("src=x", ""))
    assert "default-src 'none'" in text
    assert text.count("</script>") == 2, "what a model wrote cannot end the script"
    assert data_of(text)["arms"][0]["sample"] == "</script><img src=x onerror=alert(1)>{{data}}"
    script = text.rpartition("<script>")[2]
    assert "innerHTML" not in script
    assert "insertAdjacentHTML" not in script


def test_columns_come_back_as_they_were() -> None:
    generator = np.random.default_rng(0)
    assert packed(np.arange(10.0, 5000.0, 10.0)).keys() == {"n", "first", "last"}
    for values in (np.arange(10.0, 5000.0, 10.0), generator.normal(3, 1, 50), np.array([1.5]), np.array([2.0, 2.0])):
        assert unpacked(packed(values)) == pytest.approx(values, rel=1e-6)
    long = generator.normal(3, 1, 1000)
    long[7] = np.nan
    assert np.nanmax(np.abs(unpacked(packed(long)) - long)) <= (np.nanmax(long) - np.nanmin(long)) / (NONE - 1)
    assert np.isnan(unpacked(packed(long))[7])
    resumed = np.array([*range(0, 4000, 10), *range(4005, 9000, 10)], float)
    assert (unpacked(packed(resumed, exact=True)) == resumed).all()
    assert np.isnan(unpacked(packed(np.array([1.0, np.nan, 3.0])))[1])


def test_a_hundred_long_runs_stay_under_three_megabytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = [
        {"step": i, "tokens": 768 * i, "flops": 4e6 * i, "seconds": i / 30 + generator.normal(0, 0.01), "wall": i / 30}
        | {"train/loss": 2 + generator.normal(), "train/gradient_norm": generator.normal(), "memory/peak_bytes": 1e9}
        | ({"val/loss": 2.0} if i % 100 == 0 else {})
        for i in range(1, 3 * MOST_POINTS // 2 + 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    made = curves(Run(tmp_path))
    assert made.keys() == {"train/loss", "train/gradient_norm", "val/loss"}
    assert len(unpacked(made["train/loss"]["y"])) == 1500 < MOST_POINTS
    assert unpacked(made["train/loss"]["step"])[-1] == 3000
    assert len(json.dumps(made)) * 100 * MOST_POINTS / 1500 < 3e6, "and were all points taken"


def test_the_table_as_comma_separated_values(study: str, gptlab: Command) -> None:
    read = list(csv.DictReader(io.StringIO(gptlab("compare", study, "--csv").out)))
    rows = compare(study).rows
    assert [line["arm"] for line in read] == [row.label for row in rows]
    assert float(read[0]["val/loss"]) == rows[0].loss.mean
    assert float(read[1]["difference"]) == rows[1].difference.mean  # type: ignore[union-attr]
    assert read[0]["verdict"] == "baseline"
    assert read[1]["seeds"] == "0 1"


def test_two_forms_at_once_and_a_file_that_cannot_be_written_are_refused(study: str, gptlab: Command, tmp_path: Path) -> None:
    both = gptlab("compare", study, "--csv", "--json")
    assert both.code == 2
    assert "--json and --csv: one form at a time goes to standard output" in both.err
    (tmp_path / "file").write_text("")
    blocked = gptlab("compare", study, "--html", str(tmp_path / "file" / "page.html"))
    assert blocked.code == 74
    assert "page.html could not be written" in blocked.err.replace("\n", " ")


def test_a_config_is_flattened_as_it_is_written_on_the_command_line() -> None:
    config = {"model": {"width": 8, "norm": {"name": "rmsnorm", "eps": 1e-6}}, "seed": 1}
    assert codec.flatten_written(config) == {"model.width": 8, "model/norm": "rmsnorm", "model.norm.eps": 1e-6, "seed": 1}
