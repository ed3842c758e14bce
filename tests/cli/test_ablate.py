"""`gptlab ablate`: the plan, the runs, the verdict, and that nothing is trained twice."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from gptlab import compose
from gptlab.config.registry import build, component
from gptlab.model.init import Spec
from gptlab.runner import forecast as forecasting
from gptlab.runner.held_out import read_rows
from gptlab.runner.run import all_runs, members, read_ablation
from gptlab.study.compare import compare
from gptlab.study.live import LiveTable
from tests.cli.conftest import Command
from tests.tiny import tiny

ablate = importlib.import_module("gptlab.cli.ablate")  # the package's own `ablate` is the command
scales = importlib.import_module("gptlab.cli.scales")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "FORECAST_SECONDS", 0.5)
    monkeypatch.setattr(forecasting, "MOST_STEPS", 3)


NORMS = ("--vary", "model/norm=layernorm,rmsnorm")


def test_an_ablation_is_planned_trained_judged_and_goes_on_with_more_seeds(gptlab: Command, corpus_file: Path) -> None:
    arguments = [*tiny(corpus_file, steps=4), *NORMS, "--arm", "modern=model/norm=rmsnorm model/position=rotary", "--effect", "0.5"]
    plan = gptlab("ablate", *arguments, "--seeds", "2", "--dry-run")
    assert plan.code == 0, plan.err
    assert "norm_x_modern: 3 arms, 2 seeds each, 6 runs to train, about " in plan.out
    assert "modern: model/norm layernorm → rmsnorm; model/position learned → rotary" in plan.out
    assert not all_runs()

    first = gptlab("ablate", *arguments, "--seeds", "2")
    assert first.code == 0, first.err
    assert "6 runs: 6 trained, 0 skipped, 0 failed" in first.out
    assert "1/6 layernorm, seed 0" in first.out
    assert "verdicts: block model over seeds, 5 % false; p corrected for 2 arms (Holm)" in first.out
    assert read_ablation("norm_x_modern")["effect"] == 0.5
    assert read_ablation("norm_x_modern")["planned"]["modern"]["same_weights"] > 0.5
    assert {m["label"] for m in members("norm_x_modern")} == {"layernorm", "rmsnorm", "modern"}
    assert {r.name for r in all_runs()} >= {"modern,seed=1", "layernorm,seed=0"}

    more = gptlab("ablate", *arguments, "--seeds", "3")
    assert "6 runs: " not in more.out
    assert "9 runs: 3 trained, 6 skipped, 0 failed" in more.out
    assert "seeds were added after a look at 2: 5 % false holds for one look" in more.out
    assert "seeds were added" not in first.out
    found = compare("norm_x_modern")
    assert [(r.label, r.seeds) for r in found.rows] == [("layernorm", [0, 1, 2]), ("rmsnorm", [0, 1, 2]), ("modern", [0, 1, 2])]
    assert found.rows[1].text is not None
    assert found.rows[1].text.low <= found.rows[1].verdict.interval.mean <= found.rows[1].text.high  # type: ignore[union-attr]
    made = json.loads(gptlab("compare", "norm_x_modern", "--json", "--effect", "0.2").out)
    assert made["rows"][2]["verdict"]["effect"] == 0.2
    assert made["rows"][2]["verdict_text"]


def test_the_baseline_of_another_study_is_not_trained_again(gptlab: Command, corpus_file: Path) -> None:
    run = tiny(corpus_file, steps=4)
    gptlab("ablate", *run, *NORMS, "--seeds", "2", "study=one")
    again = gptlab("ablate", *run, "--vary", "model/position=learned,rotary", "--seeds", "2", "study=two", "--baseline", "rotary")
    assert "4 runs: 2 trained, 2 skipped, 0 failed" in again.out
    assert compare("two").rows[0].label == "rotary"


def test_rows_of_the_held_out_set_add_up_to_its_loss(gptlab: Command, corpus_file: Path) -> None:
    gptlab("train", *tiny(corpus_file, steps=4))
    (run,) = all_runs()
    rows = read_rows(run)
    assert rows is not None
    done = run.read("done.json")
    assert done is not None
    assert rows["nats"].sum() / rows["tokens"].sum() == pytest.approx(done["summary"]["val/loss"], rel=1e-12)
    (run.directory / "held_out.safetensors").write_bytes(b"cut")
    assert read_rows(run) is None


@pytest.mark.slow
def test_seeds_are_added_until_every_arm_is_decided(gptlab: Command, corpus_file: Path) -> None:
    run = tiny(corpus_file, steps=6)
    clear = gptlab("ablate", *run, "--vary", "optimizer.learning_rate=1e-3,1e-1", "--until-decided", "8", "--seeds", "3")
    assert clear.code == 0, clear.err
    assert "looked at after 3, 4, 6, 8 seeds, and ended as soon as every arm is decided" in clear.out
    assert "sequential t over seeds" in clear.out
    (row,) = compare("learning_rate").rows[1:]
    assert row.verdict is not None
    assert row.verdict.kind in ("better", "worse")
    assert len(row.seeds) < 8
    made = ", ".join(str(n) for n in (3, 4, 6) if n <= len(row.seeds))
    assert f"looked at after {made} seeds, of the looks planned beforehand (after 3, 4, 6, 8)" in clear.out
    more = gptlab("ablate", *run, "--vary", "optimizer.learning_rate=1e-3,1e-1", "--seeds", "9")
    assert "as was planned beforehand; seeds beyond the last look are not used" in more.out
    open_ = gptlab("ablate", *run, "--vary", "model/init=gpt2,gpt2_nudged", "--until-decided", "4", "--seeds", "3", "--effect", "1e-12")
    assert "after 3 seeds undecided: gpt2_nudged; on to 4" in open_.out
    assert len(compare("init").rows[1].seeds) == 4


@pytest.mark.slow
def test_arms_are_trained_to_equal_budgets_each_in_whole_schedules(
    gptlab: Command, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*tiny(corpus_file, steps=6), "--vary", "model.width=16,32", "--seeds", "2", "study=w", "--budgets", "tokens,flops"]
    result = gptlab("ablate", *arguments)
    assert result.code == 0, result.err
    wide = compare("w-flops").rows[1]
    narrow = compare("w-flops").rows[0]
    assert narrow.steps == 6
    assert wide.flops / wide.steps > narrow.flops / narrow.steps
    assert wide.steps == round(narrow.flops / (wide.flops / wide.steps))
    assert wide.verdict is not None
    assert "equal flops: width=16 6 steps, width=32 " in result.out
    assert "4 runs: 2 trained, 2 skipped, 0 failed" in result.out, "the baseline is as long as it was: its runs are done"
    assert "equal tokens" in result.out
    assert all((r.read("config.json") or {})["config"]["trainer"]["budget"].endswith("steps") for r in all_runs())
    again = gptlab("ablate", *arguments)
    assert "trained, 4 skipped" in again.out


@pytest.mark.slow
def test_seconds_count_only_of_runs_that_had_the_machine_to_themselves(gptlab: Command, corpus_file: Path) -> None:
    arguments = [*tiny(corpus_file, steps=6), "--vary", "model.width=16,32", "--seeds", "2", "study=w"]
    gptlab("ablate", *arguments)

    def loaded(share: float) -> None:
        for run in all_runs():
            done = run.read("done.json")
            assert done is not None
            done["summary"] |= {"machine/other_load": share, "seconds": 0.25 if "32" in run.name else 0.125}
            run.write("done.json", done)

    loaded(0.6)
    refused = gptlab("ablate", *arguments, "--budgets", "seconds,flops")
    assert refused.code == 2
    assert "difference of val/loss at equal budgets" in refused.out, "the other unit is known"
    assert "no run of the arm 'width=16' had the machine to itself (other work took 60% of it at the least)" in refused.err
    loaded(0.01)
    made = gptlab("ablate", *arguments, "--budgets", "seconds")
    assert made.code == 0, made.err
    assert [row.steps for row in compare("w-seconds").rows] == [6, 3]


@pytest.mark.slow
def test_arms_are_matched_by_their_feed_forward(gptlab: Command, corpus_file: Path) -> None:
    arguments = [*tiny(corpus_file, steps=4), "--vary", "model/position=learned,rotary"]
    arguments += ["--arm", "gated=model/ffn=swiglu model.ffn.multiple_of=1", "--design", "single"]
    params = gptlab("ablate", *arguments, "--seeds", "1", "--match", "params", "study=p")
    assert params.code == 0, params.err
    assert "rotary: model.ffn.expansion 4 → " in params.out
    sizes = [row.parameters for row in compare("p").rows]
    assert max(sizes) / min(sizes) - 1 < 0.01
    work = gptlab("ablate", *arguments, "--seeds", "1", "--match", "flops", "study=f")
    assert work.code == 0, work.err
    flops = [row.flops for row in compare("f").rows]
    assert max(flops) / min(flops) - 1 < 0.01


@pytest.mark.slow
def test_each_arm_gets_its_own_best_rate_on_other_seeds(gptlab: Command, corpus_file: Path) -> None:
    arguments = [*tiny(corpus_file, steps=6), "--vary", "optimizer=adamw,sgd", "--tune", "optimizer.learning_rate=1e-4,3e-2,10"]
    result = gptlab("ablate", *arguments, "--seeds", "2", "study=o")
    assert result.code in (0, 1), result.err  # a rate of 10 may diverge
    assert "tuning optimizer.learning_rate on seeds 1000 to 1001" in result.out
    tuning = {m["seed"] for m in members("o-tune")}
    assert tuning == {1000, 1001}
    assert {m["seed"] for m in members("o")} == {0, 1}
    rates = {m["label"]: m["settings"]["optimizer.learning_rate"] for m in members("o")}
    assert rates["adamw"] == "0.03"
    losses = {row.label: row.loss.mean for row in compare("o-tune").rows}
    assert losses["adamw learning_rate=0.03"] == min(loss for label, loss in losses.items() if label.startswith("adamw"))


@pytest.mark.slow
def test_the_arms_are_repeated_at_smaller_sizes(gptlab: Command, corpus_file: Path) -> None:
    arguments = [*tiny(corpus_file, steps=6), "--vary", "optimizer.learning_rate=1e-3,1e-1", "--seeds", "3", "study=s", "--scales", "2"]
    result = gptlab("ablate", *arguments)
    assert result.code == 0, result.err
    small, whole = compare("s-w8"), compare("s")
    assert small.rows[0].parameters < whole.rows[0].parameters
    assert "learning_rate=0.1: better at every size, " in result.out
    assert "width 8" in result.out
    exponent, further = scales.scaling_line([10.0, 100.0], [1.0, 0.1**0.5])
    assert (exponent, further) == pytest.approx((0.5, 0.1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*NORMS, "--scales", "1"), "--scales 1: at least 2 sizes"),
        ((*NORMS, "--scales", "3"), "--scales 3 halves model.width=16 and model.heads=2 2 times, which does not divide: at most 2 here"),
        (("--vary", "model.width=16,32", "--scales", "2"), "--scales changes model.width and model.heads, and the arm 'width=16' sets"),
        ((*NORMS, "--budgets", "flop"), "--budgets flop: arms can be equal in steps, tokens, flops, seconds (did you mean flops?)"),
        ((*NORMS, "--match", "param"), "--match param: arms can be matched in params, flops, seconds (did you mean params?)"),
        (("--vary", "model/ffn=gelu,none", "--match", "params"), "the arm 'none' has model/ffn=none, nothing to resize"),
        ((*NORMS, "--tune", "optimizer.learning_rate"), "--tune optimizer.learning_rate has no values: give KEY=VALUE,VALUE"),
        ((*NORMS, "--tune", "optimizer.learning_rate=1e-3"), "--tune optimizer.learning_rate=1e-3 has one value: give at least two"),
        (("--vary", "model/norm=layernorm,rmsnrom"), "did you mean rmsnorm?"),
        (("--vary", "model/nrom=layernorm,rmsnorm"), "did you mean model/norm?"),
        (("--vary", "model.wdith=16,32"), "did you mean model.width?"),
        ((*NORMS, "--baseline", "rmsnrm"), "--baseline 'rmsnrm' is not an arm (did you mean rmsnorm?); there are: layernorm; rmsnorm"),
        ((*NORMS, "--seeds", "0"), "--seeds 0 must be at least 1"),
        ((*NORMS, "--effect", "-1"), "--effect -1 must be above 0"),
        ((*NORMS, "--design", "gird"), "--design gird is not one of grid, single, ladder (did you mean grid?)"),
        ((*NORMS, "--until-decided", "2"), "give the most seeds (at least 4), or the most time, as in 2h"),
        ((*NORMS, "--until-decided", "soon"), "--until-decided soon: give the most seeds, as in 24, or the most time, as in 2h or 30min"),
        ((*NORMS, "--arm", "twin=model/norm=rmsnorm"), "the arms 'rmsnorm' and 'twin' are the same config"),
        ((), "nothing is varied"),
    ],
)
def test_bad_input_is_one_sentence_and_trains_nothing(gptlab: Command, corpus_file: Path, arguments: tuple[str, ...], said: str) -> None:
    result = gptlab("ablate", *tiny(corpus_file, steps=4), *arguments)
    assert result.code == 2
    assert said in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not all_runs()


def test_an_arm_that_diverges_leaves_the_others_alone(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab("ablate", *tiny(corpus_file, steps=4), "--vary", "optimizer.learning_rate=1e-3,1e30", "--seeds", "2", "study=lost")
    assert result.code == 1
    assert "4 runs: 2 trained, 0 skipped, 2 failed" in result.out
    assert "2 runs left out: failed (learning_rate=1e+30)" in " ".join(result.out.split())
    assert result.err.count("the held-out loss is nan at step 1") == 2


def test_one_seed_shows_a_difference_and_gives_no_verdict(gptlab: Command, corpus_file: Path) -> None:
    result = gptlab("ablate", *tiny(corpus_file, steps=4), *NORMS, "--seeds", "1")
    assert "one seed shows a difference and gives no verdict: --seeds 5" in result.out
    assert "with one seed: no verdict" in result.out


def test_an_experiment_file_may_hold_the_arms(gptlab: Command, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(
        "defaults:\n  - override /hydra/sweeper: arms\nstudy: mine\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    design: ladder\n    seeds: 2\n"
        "    vary: {model/norm: 'layernorm,rmsnorm'}\n    arms: {rotary: model/position=rotary}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    result = gptlab("train", "experiment=mine", *tiny(corpus_file, steps=4))
    assert result.code == 0, result.err
    assert [r.label for r in compare("mine").rows] == ["base", "+ rmsnorm", "+ rotary"]
    assert read_ablation("mine")["baseline"] == "base"
    more = gptlab("ablate", "experiment=mine", *tiny(corpus_file, steps=4), "--seeds", "3")
    assert "9 runs: 3 trained, 6 skipped, 0 failed" in more.out


def test_the_live_table_tells_what_each_arm_does(gptlab: Command, corpus_file: Path) -> None:
    gptlab("ablate", *tiny(corpus_file, steps=4), *NORMS, "--seeds", "2", "study=s")
    done = next(r for r in all_runs() if r.name == "rmsnorm,seed=1")
    table = LiveTable("s", ["layernorm", "rmsnorm", "later"], [0, 1])
    (done.directory / "done.json").unlink()
    shown = table.render()
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["layernorm", "rmsnorm", "later"]
    assert cells[1] == ["2/2", "1/2", "0/2"]
    assert cells[2][1].startswith("seed 1: step 4/4, loss ")
    assert cells[2][2] == "waiting"
    assert "3 of 6 runs done, about " in str(shown.title)


def test_a_nudged_arm_begins_a_rounding_away() -> None:
    spec = Spec("blocks.0.ffn.up.weight", "matrix", (64, 64), False)
    one, two = (
        build(component("model/init", name).options(), width=64, depth=2)(spec, torch.Generator().manual_seed(1))
        for name in ("gpt2", "gpt2_nudged")
    )
    assert not torch.equal(one, two)
    assert float(((two - one) / one).abs().max()) < 1e-5
    assert compose(["model/init=gpt2_nudged"]).model.init.nudge == 1e-6  # type: ignore[attr-defined]
