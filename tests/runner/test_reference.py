"""Reference curves: a run is held against published losses of its setting, told once when it leaves their band, and drawn beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib import pyplot

from gptlab import compose, train
from gptlab.config import codec
from gptlab.config.errors import ConfigError
from gptlab.config.sources import config_dir
from gptlab.runner.reference import FILE, RECORDED, Reference, known, load
from gptlab.runner.run import Run
from gptlab.study.compare import collect
from gptlab.study.report import _draw_references, draw_curves
from tests.tiny import tiny

BATCH, STEPS = 64, 12
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, corpus_file: Path) -> Write:
    """`write(points=…, steps=…)`: the file of a curve for tiny runs on the small text."""

    def make(name: str = "own", **values: Any) -> Path:
        text = corpus_file.read_text(encoding="utf-8")
        plain = {"setting": "tiny", "source": "this test", "date": "2026-11", "corpus": "text", "tokenizer": "char"}
        sizes = {"vocabulary": len(set(text)), "context_length": 16, "batch_tokens": BATCH, "steps": STEPS, "above": 0.1, "below": 0.1}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(plain | sizes | values))
        return file

    return make


def held(file: Path, corpus_file: Path, *more: str, steps: int = STEPS) -> Run:
    """A tiny run that is held against a curve, measured every four steps."""
    chosen = ("+callback@callbacks.reference=reference", f"callbacks.reference.curve={file}", "callbacks.evaluation.every=4")
    outcome = train(compose(tiny(corpus_file, *chosen, *more, steps=steps)), rerun=True)
    return outcome.run


def own_losses(corpus_file: Path, steps: int = STEPS) -> list[list[float]]:
    run = train(compose(tiny(corpus_file, "callbacks.evaluation.every=4", steps=steps))).run
    return [[line["step"], line["val/loss"]] for line in run.metrics() if "val/loss" in line]


def log(run: Run) -> str:
    file = run.directory / "log.txt"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def test_every_curve_that_comes_along_has_its_source_its_setting_and_losses_that_fall() -> None:
    assert {"nanogpt_shakespeare_cpu", "nanogpt_shakespeare_char", "gpt2_124m_openwebtext", "gpt2_124m_fineweb"} <= set(known())
    for name in known():
        found = load(name)
        assert "github.com/" in found.source
        assert len(found.setting) > 20
        assert found.date[:2] == "20"
        losses: list[float | None] = [loss for _, loss in found.points] or [found.mark]
        assert None not in losses
        assert losses == sorted(losses, key=lambda loss: -(loss or 0.0))
        assert all(0 < (loss or 0.0) < math.log(found.vocabulary) for loss in losses)
        assert 0 < found.above < 0.2
        assert all(step <= found.steps for step, _ in found.points)


def test_every_preset_names_a_curve_and_leaves_it_out_of_another_setting() -> None:
    presets = list((config_dir() / "callback").glob("reference_*.yaml"))
    assert presets
    for file in presets:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert data["curve"] in known()
        assert data["mismatch"] == "leave"


def test_between_two_points_the_loss_is_linear_in_the_logarithm_of_the_tokens(write: Write) -> None:
    found = load(str(write(points=[[10, 4.0], [1000, 2.0]], steps=1000)))
    assert found.at(100 * BATCH) == pytest.approx(3.0)
    assert found.at(10 * BATCH) == pytest.approx(4.0)
    assert found.at(1000 * BATCH) == pytest.approx(2.0)
    assert found.at(9 * BATCH) is None
    assert found.at(1001 * BATCH) is None
    assert load(str(write(mark=1.5))).at(1) == 1.5
    assert load(str(write(points=[[10, 4.0]]))).at(10 * BATCH) == 4.0


def test_a_run_inside_the_band_records_the_reference_and_is_not_warned(
    corpus_file: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [[step, loss + 0.05] for step, loss in own_losses(corpus_file) if step >= 8]
    run = held(write(points=points), corpus_file)
    recorded = {line["step"]: line[RECORDED] for line in run.metrics() if RECORDED in line}
    assert recorded == {step: pytest.approx(loss) for step, loss in points}, "where there is a point, and not before the first"
    said = " ".join(capsys.readouterr().out.split())
    assert f"0.050 below own's {points[-1][1]:.5g}, inside its band of ± 0.1" in said
    assert "outside" not in said
    assert "ReferenceWarning" not in log(run)
    assert json.loads((run.directory / FILE).read_text())["points"] == points


@pytest.mark.parametrize(("shift", "where"), [(-0.5, "above"), (0.5, "below")])
def test_a_run_that_leaves_the_band_is_told_once_with_both_losses_and_the_source(
    corpus_file: Path, write: Write, capsys: pytest.CaptureFixture[str], shift: float, where: str
) -> None:
    points = [[step, loss + shift] for step, loss in own_losses(corpus_file)]
    run = held(write(points=points), corpus_file)
    sentence = (
        f"step 4: val/loss {points[0][1] - shift:.3f} is 0.500 {where} own's {points[0][1]:.5g}, outside its band of ± 0.1 (this test)"
    )
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(sentence) == 1
    assert said.count("is 0.500") == 1, "at the next evaluations it is known"
    assert f"0.500 {where} own's {points[-1][1]:.5g}, outside its band" in said, "and the end is told all the same"
    assert log(run).count(f"ReferenceWarning: {sentence}") == 1


def test_the_band_is_doubled_where_the_rate_falls_over_another_length(
    corpus_file: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [[step, loss - 0.15] for step, loss in own_losses(corpus_file)]
    assert "ReferenceWarning" in log(held(write("same", points=points), corpus_file))
    capsys.readouterr()
    assert "ReferenceWarning" not in log(held(write("longer", points=points, steps=2 * STEPS), corpus_file))
    said = " ".join(capsys.readouterr().out.split())
    assert "± 0.2, doubled for another length than its 24 steps of 64 tokens" in said
    far = [[step, loss - 0.1] for step, loss in points]
    assert "ReferenceWarning" in log(held(write("far", points=far, steps=2 * STEPS), corpus_file))


def test_a_mark_is_held_against_the_lowest_loss_of_a_whole_run(corpus_file: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    lowest = min(loss for _, loss in own_losses(corpus_file))
    run = held(write("near", mark=lowest + 0.05), corpus_file)
    said = " ".join(capsys.readouterr().out.split())
    assert f"lowest val {lowest:.4f}: 0.050 below near's {lowest + 0.05:.5g}, inside its band" in said
    assert "ReferenceWarning" not in log(run)
    assert all(line[RECORDED] == lowest + 0.05 for line in run.metrics() if "val/loss" in line)
    assert f"lowest val/loss {lowest:.3f} is 0.500 above far's" in log(held(write("far", mark=lowest - 0.5), corpus_file))
    shorter = held(write("whole", mark=lowest - 0.5, steps=100 * STEPS), corpus_file)
    assert "ReferenceWarning" not in log(shorter), "a short run has not had its chance"
    assert "not judged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"corpus": "shakespeare"}, "the text is shakespeare there and text here"),
        ({"tokenizer": "gpt2"}, "data/tokenizer is gpt2 there and char here"),
        ({"vocabulary": 9}, "its vocabulary is 9 there and "),
        ({"context_length": 64}, "model.context_length is 64 there and 16 here"),
    ],
    ids=["corpus", "tokenizer", "vocabulary", "context"],
)
def test_a_curve_of_another_setting_is_refused_left_out_or_compared_as_asked(
    corpus_file: Path, write: Write, capsys: pytest.CaptureFixture[str], other: dict[str, Any], said: str
) -> None:
    file = write(points=[[4, 1.0], [12, 0.5]], **other)
    with pytest.raises(ConfigError, match="own was measured in another setting") as error:
        held(file, corpus_file)
    assert said in str(error.value)
    assert error.value.code == 2
    left = held(file, corpus_file, "callbacks.reference.mismatch=leave")
    assert f"not comparable with own: {said}" in " ".join(capsys.readouterr().out.split())
    assert not any(RECORDED in line for line in left.metrics())
    assert not (left.directory / FILE).exists()
    assert "ReferenceWarning" not in log(left)
    compared = held(file, corpus_file, "callbacks.reference.mismatch=compare")
    assert "ReferenceWarning" in log(compared)


def test_a_curve_that_does_not_exist_is_refused_with_the_known_ones_before_anything_is_made(corpus_file: Path, tmp_path: Path) -> None:
    for curve in ("nanogpt_shakespear_cpu", '""', str(tmp_path / "missing.json")):
        with pytest.raises(ConfigError, match=r"no such curve.*there are .*gpt2_124m_fineweb, .*nanogpt_shakespeare_cpu") as error:
            train(compose(tiny(corpus_file, "+callback@callbacks.reference=reference", f"callbacks.reference.curve={curve}")))
        assert error.value.code == 2
    with pytest.raises(ConfigError, match=r"did you mean nanogpt_shakespeare_cpu\?"):
        load("nanogpt_shakespear_cpu")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "values",
    [{}, {"points": [[8, 2.0], [4, 3.0]]}, {"points": [[4, -1.0]]}, {"points": [[4, 2.0]], "mark": 1.0}, {"mark": 1.0, "sorce": "x"}],
    ids=["nothing", "falling steps", "negative", "both", "unknown key"],
)
def test_a_file_that_is_no_curve_is_refused(write: Write, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"own\.json cannot be read as a reference curve"):
        load(str(write(**values)))


def test_a_reference_does_not_change_the_run(corpus_file: Path, write: Write) -> None:
    plain = train(compose(tiny(corpus_file, "callbacks.evaluation.every=4"))).run
    run = held(write(points=[[4, 9.0], [12, 8.0]]), corpus_file)
    assert run.identity == plain.identity
    with_it = compose(["experiment=nanogpt_shakespeare_cpu"])
    without = compose(["experiment=nanogpt_shakespeare_cpu", "~callback@callbacks.reference"])
    assert "reference" in with_it.callbacks
    assert "reference" not in without.callbacks
    assert codec.canonical(with_it) == codec.canonical(without)


def test_the_picture_of_a_study_shows_the_published_losses_with_their_band(corpus_file: Path, write: Write) -> None:
    held(write(points=[[4, 3.0], [8, 2.5], [12, 2.25], [90, 2.0]]), corpus_file, "study=drawn")
    _, axes = pyplot.subplots()
    arms = collect("drawn")[0]
    assert _draw_references(axes, arms) == [("published  2.250", 2.25)]
    assert list(axes.lines[0].get_xdata()) == [4, 8, 12], "as far as the run went"
    low, high = (axes.collections[0].get_paths()[0].vertices[:, 1].min(), axes.collections[0].get_paths()[0].vertices[:, 1].max())
    assert (low, high) == (pytest.approx(2.15), pytest.approx(3.1))
    pyplot.close()
    run = next(iter(arms[0].runs.values()))
    with_it = draw_curves("drawn", run.directory / "with.png").read_bytes()
    (run.directory / FILE).unlink()
    assert draw_curves("drawn", run.directory / "without.png").read_bytes() != with_it


def test_a_band_is_told_in_one_word_where_it_is_the_same_on_both_sides() -> None:
    common = {"name": "x", "setting": "", "source": "", "date": "", "corpus": "", "tokenizer": "", "vocabulary": 1}
    made = Reference(**common, context_length=1, batch_tokens=1, steps=1, above=0.1, below=0.3, mark=1.0)  # type: ignore[arg-type]
    assert made.band() == "+0.1 and -0.3"
    assert made.band(2) == "+0.2 and -0.6"
