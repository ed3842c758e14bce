"""A study's arms are paired by seed, against the first of each axis, on the same tokens or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.config.compose import settings
from gptlab.config.errors import ConfigError
from gptlab.runner.run import Run, write_ablation
from gptlab.study.compare import compare
from gptlab.study.report import draw_curves, markdown
from gptlab.study.statistics import mean_interval, p_at_most
from tests.tiny import tiny


def arm(corpus_file: Path, *overrides: str, study: str = "s", job: int = 0) -> Run:
    outcome = train(compose([*tiny(corpus_file, f"study={study}", steps=4), *overrides]), settings=settings(overrides), job=job)
    assert outcome.run is not None
    return outcome.run


def loss(run: Run) -> float:
    done = run.read("done.json")
    assert done is not None
    return float(done["summary"]["val/loss"])


def test_arms_are_compared_on_paired_seeds_against_the_first(corpus_file: Path) -> None:
    runs = {}
    for job, (norm, seed) in enumerate([(n, s) for n in ("layernorm", "rmsnorm") for s in (0, 1, 2)]):
        runs[norm, seed] = arm(corpus_file, f"model/norm={norm}", f"seed={seed}", job=job)
    found = compare("s")
    assert [(r.label, r.baseline, r.seeds) for r in found.rows] == [("layernorm", True, [0, 1, 2]), ("rmsnorm", False, [0, 1, 2])]
    differences = [loss(runs["rmsnorm", s]) - loss(runs["layernorm", s]) for s in (0, 1, 2)]
    assert found.rows[1].difference == mean_interval(differences)
    assert found.rows[1].parameters < found.rows[0].parameters
    assert not found.notes
    assert compare("s", baseline="rmsnorm").rows[0].label == "rmsnorm"
    assert json.loads(json.dumps(found.to_json()))["rows"][1]["difference"]["n"] == 3
    assert "| rmsnorm | 3 |" in markdown(found)
    losses = [loss(runs["layernorm", s]) for s in (0, 1, 2)]
    aimed = compare("s", target=max(losses) + 0.01)
    assert aimed.rows[0].p_target == p_at_most(losses, max(losses) + 0.01)
    assert f"layernorm: {mean_interval(losses).mean:.4f} over 3 seeds is at most {max(losses) + 0.01:g}; one-sided p" in markdown(aimed)
    assert f"over 3 seeds is above {min(losses) - 0.01:g}; one-sided p" in markdown(compare("s", target=min(losses) - 0.01))
    picture = draw_curves("s", Path(runs["rmsnorm", 0].directory) / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_baseline_of_another_study_is_found_and_not_trained_again(corpus_file: Path) -> None:
    first = arm(corpus_file, "seed=0", study="one")
    again = arm(corpus_file, "seed=0", study="two", job=0)
    assert again.directory == first.directory
    arm(corpus_file, "model/norm=rmsnorm", "seed=0", study="two", job=1)
    assert [r.label for r in compare("two").rows] == ["base", "rmsnorm"]


def test_runs_of_the_python_api_are_named_after_their_overrides(corpus_file: Path) -> None:
    for overrides in (["seed=0"], ["seed=1"], ["model/norm=rmsnorm", "seed=0"], ["model/norm=rmsnorm", "seed=1"]):
        train(compose([*tiny(corpus_file, "study=api", steps=2), *overrides]))
    rows = compare("api").rows
    assert [r.seeds for r in rows] == [[0, 1], [0, 1]]
    assert "norm=rmsnorm" in rows[1].label
    assert "seed" not in rows[1].label


def test_unfinished_runs_are_left_out_and_counted(corpus_file: Path) -> None:
    arm(corpus_file, "seed=0")
    (arm(corpus_file, "seed=1", job=1).directory / "done.json").unlink()
    found = compare("s")
    assert found.rows[0].seeds == [0]
    assert "1 run left out: stopped (base)" in found.notes


def test_a_run_without_a_finite_loss_is_left_out(corpus_file: Path) -> None:
    arm(corpus_file, "seed=0")
    for seed in (0, 1):  # as one was noted whose last update spoilt it
        lost = arm(corpus_file, "model/norm=rmsnorm", f"seed={seed}", job=1 + seed)
        done = lost.read("done.json")
        assert done is not None
        lost.write("done.json", done | {"summary": done["summary"] | {"val/loss": math.nan}})
    found = compare("s")
    assert [row.label for row in found.rows] == ["base"]
    assert "2 runs left out: diverged (norm=rmsnorm)" in found.notes or "2 runs left out: diverged (rmsnorm)" in found.notes


def test_a_config_that_cannot_be_read_is_named(corpus_file: Path) -> None:
    arm(corpus_file, "seed=0")
    (arm(corpus_file, "model/norm=rmsnorm", job=1).directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"norm=rmsnorm\S*/config\.json cannot be read"):
        compare("s")
    arm(corpus_file, "model/norm=rmsnorm", job=1)  # skipped, and the file is written again
    assert len(compare("s").rows) == 2


def test_looks_that_were_not_made_are_not_told_as_made(corpus_file: Path) -> None:
    for seed in range(4):
        arm(corpus_file, f"seed={seed}", job=seed)
    for looks, told in (
        ([4, 6], "looked at after 4 seeds, of the looks planned beforehand (after 4, 6)"),
        ([2, 4], "looked at after 2, 4 seeds, as was planned beforehand"),
        ([5], "looks are planned after 5 seeds"),
        ([2, 3], "looked at after 2, 3 seeds, as was planned beforehand; seeds beyond the last look are not used"),
    ):
        write_ablation("s", {"looks": looks})
        assert told in compare("s").notes


def test_losses_on_different_tokens_are_refused(corpus_file: Path, tmp_path: Path) -> None:
    arm(corpus_file, "seed=0")
    other = tmp_path / "other.txt"
    other.write_text(corpus_file.read_text(encoding="utf-8").swapcase(), encoding="utf-8")
    arm(corpus_file, f"data.corpus.path={other}", "seed=0", job=1)
    with pytest.raises(ConfigError, match="different validation tokens"):
        compare("s")


def test_other_tokenisers_are_compared_in_bits_per_byte_of_the_same_text(corpus_file: Path) -> None:
    runs = [
        arm(corpus_file, f"data/tokenizer={name}", f"seed={seed}", job=2 * i + seed)
        for i, name in enumerate(("char", "byte"))
        for seed in (0, 1)
    ]
    found = compare("s")
    assert found.metric == "val/bits_per_byte"
    assert [r.seeds for r in found.rows] == [[0, 1], [0, 1]]
    # a character is a byte of this text: there the two metrics are one in another unit
    assert found.rows[0].loss.mean == pytest.approx((loss(runs[0]) + loss(runs[1])) / 2 / math.log(2))
    assert found.rows[1].verdict is not None
    assert found.rows[1].text is None
    assert any("compared in bits per byte" in note for note in found.notes)
    assert "| arm | seeds | val/bits_per_byte |" in markdown(found)


def test_windows_of_other_tokenisers_are_of_other_text_and_refused(corpus_file: Path) -> None:
    for job, name in enumerate(("char", "byte")):
        arm(corpus_file, f"data/tokenizer={name}", "data.validation_tokens=64", job=job)
    with pytest.raises(ConfigError, match=r"windows of different text; data.validation_tokens=0 measures all of it"):
        compare("s")


def test_other_differences_are_told(corpus_file: Path) -> None:
    first = arm(corpus_file, "seed=0")
    arm(corpus_file, "model.context_length=8", "seed=0", job=1)
    environment = first.read("environment.json")
    assert environment is not None
    first.write("environment.json", {**environment, "source": "other"})
    notes = " ".join(compare("s").notes)
    assert "mixed gptlab sources" in notes
    assert "different context lengths" in notes
    assert "one seed only" in notes


def test_arms_in_different_number_formats_are_told(corpus_file: Path) -> None:
    arm(corpus_file, "hardware.precision=fp32")
    arm(corpus_file, "hardware.precision=bf16", job=1)
    assert any("different number formats" in note and ": bf16" in note and ": fp32" in note for note in compare("s").notes)


def test_of_stages_the_lineage_is_named(corpus_file: Path) -> None:
    first = arm(corpus_file)
    second = [f"trainer.init_from={first.identity}", "tracker=none", "trainer.budget=1steps", "trainer.batch_tokens=64", "study=s"]
    text = ["data=text", f"data.corpus.path={corpus_file}", "data.validation_tokens=64", "callbacks.samples.tokens=4"]
    train(compose([*second, *text]), job=1)
    with pytest.raises(ConfigError, match=r"validation_tokens: .*: all; .*: 64\).*gptlab runs lineage RUN"):
        compare("s")


def test_unknown_names_are_refused_with_the_nearest(corpus_file: Path) -> None:
    arm(corpus_file, "seed=0", study="position")
    with pytest.raises(ConfigError, match="did you mean position"):
        compare("positon")
    with pytest.raises(ConfigError, match="is not an arm"):
        compare("position", baseline="nothing")
