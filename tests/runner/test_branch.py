"""A run that begins at another's checkpoint is the run that would have been trained from the start."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from gptlab import compose, train
from gptlab.config.compose import settings
from gptlab.config.errors import CheckpointError, ConfigError, DataError, Stopped
from gptlab.config.registry import build, component, register
from gptlab.config.resolve import Budget, parse_budget
from gptlab.data.loader import Batch
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.length import Length
from gptlab.runner.passed import PASSED, note_passed, passed_batches
from gptlab.runner.run import Run, members
from gptlab.runner.state import State
from gptlab.runner.train import Outcome
from gptlab.runner.trainer import Trainer
from gptlab.study.compare import compare
from tests.ranks import Job, trained
from tests.tiny import tiny

STEPS = 20
PARENT = ("model.dropout=0.2", "schedule=constant", "schedule.warmup=3", "callbacks.checkpoint.keep_every=5")
EVERY = ("callbacks.evaluation.every=5", "study=curve")


@register("callback", "pass_over_batch_6")
class PassOver(Callback):
    """As if the seventh batch had not been finite."""

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == 4:
            trainer.passed.add(6)
            note_passed(trainer.run, 6, 7, "a test")


@register("callback", "interrupt_at")
class InterruptAt(Callback):
    """Sends this process a signal after a step, once."""

    armed = False

    def __init__(self, *, step: int = 13) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step and InterruptAt.armed:
            InterruptAt.armed = False
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def trunk(home_folder: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one of twenty steps at a constant rate, and the checkpoints of steps 5, 10, 15 and 20."""
    folder = tmp_path_factory.mktemp("trunk") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_HOME", str(home_folder))
        patch.setenv("GPTLAB_RUNS", str(folder))
        train(compose(tiny(corpus_file, *PARENT, *EVERY, "callbacks.checkpoint.best=false", steps=STEPS)))
    return folder


@pytest.fixture
def parent(trunk: Path, tmp_path: Path) -> Run:
    """A copy of it among this test's own runs."""
    shutil.copytree(trunk, tmp_path / "runs")
    return Run(next((tmp_path / "runs" / "curve").glob("*/config.json")).parent)


def branch(file: Path, start: str, budget: str, *more: str, own: Sequence[str] = EVERY) -> list[str]:
    parts = [o for o in tiny(file) if not o.startswith("trainer.budget")]
    given = [f"trainer.start={start}", f"trainer.budget={budget}"]
    return [*parts, "model.dropout=0.2", "schedule=cooldown", *given, *own, *more]


def run(overrides: Sequence[str], *, rerun: bool = False) -> Outcome:
    return train(compose(overrides), rerun=rerun, settings=settings(overrides))


def weights(of: Run) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: the model's, its optimizer's, an average's."""
    model, others = checkpoint.load_tensors(checkpoint.require_good(of.checkpoints))
    return {k: v.clone() for k, v in {**model, **others}.items()}


def same_weights(one: Run, two: Run) -> None:
    theirs = weights(two)
    assert weights(one).keys() == theirs.keys()
    for name, value in weights(one).items():
        assert torch.equal(value, theirs[name]), name


def numbers(of: Run, first: int) -> list[tuple[object, ...]]:
    """What a run's metrics say from a step on, less what the clock says."""
    names = ("step", "tokens", "flops", "train/loss", "train/learning_rate", "train/gradient_norm", "val/loss")
    return [tuple(m.get(n) for n in names) for m in of.metrics() if m["step"] >= first]


def only(folder: Path) -> Run:
    (found,) = folder.glob("*/config.json")
    return Run(found.parent)


@pytest.mark.parametrize("chosen", [(), ("optimizer=muon", "+callback@callbacks.ema=ema")], ids=["adamw", "muon, ema"])
def test_constant_and_cooldown_are_wsd_bit_for_bit(parent: Run, corpus_file: Path, chosen: tuple[str, ...]) -> None:
    if chosen:
        parent = run(tiny(corpus_file, *PARENT, *EVERY, *chosen, steps=STEPS)).run
    cooled = run(branch(corpus_file, f"{parent.identity}@15", "20steps", *chosen)).run
    whole = run(
        tiny(corpus_file, "model.dropout=0.2", "schedule=wsd", "schedule.warmup=3", "schedule.decay=0.25", *EVERY, *chosen, steps=20)
    ).run
    same_weights(cooled, whole)
    assert numbers(cooled, 15) == numbers(whole, 15), "the parent's figures of step 15 begin its curve"
    assert cooled.metrics()[0]["step"] == 15
    summary, before = ((r.read("done.json") or {})["summary"] for r in (cooled, parent))
    assert summary["tokens"] == before["tokens"] == 20 * 64
    assert summary["seconds"] > next(m["seconds"] for m in parent.metrics() if m["step"] == 15), "of the whole road"


def test_a_branch_sees_the_rows_that_an_uninterrupted_run_would(
    parent: Run, corpus_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[int, torch.Tensor] = {}
    step = Trainer.train_step

    def noting(trainer: Trainer, batch: Batch) -> object:
        seen[trainer.state.step + 1] = batch.inputs.clone()
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", noting)
    run(branch(corpus_file, f"{parent.identity}@10", "14steps"))
    mine, seen = seen, {}
    assert sorted(mine) == [11, 12, 13, 14]
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "other"))
    run(tiny(corpus_file, *PARENT, steps=STEPS))
    for number, inputs in mine.items():
        assert torch.equal(inputs, seen[number]), number
        assert not torch.equal(inputs, seen[number - 10])


def test_batches_the_parent_passed_over_stay_passed_over(corpus_file: Path) -> None:
    fault = "+callback@callbacks.fault=pass_over_batch_6"
    parent = run(tiny(corpus_file, *PARENT, fault, steps=STEPS)).run
    cooled = run(branch(corpus_file, f"{parent.identity}@15", "20steps", own=())).run
    wsd = ("model.dropout=0.2", "schedule=wsd", "schedule.warmup=3", "schedule.decay=0.25")
    whole = run(tiny(corpus_file, *wsd, fault, steps=20)).run
    same_weights(cooled, whole)
    assert passed_batches(cooled) == [6], "so that `data show` finds the rows of each step"
    early = run(branch(corpus_file, f"{parent.identity}@5", "8steps", own=())).run
    assert not (early.directory / PASSED).exists(), "batch 6 comes after step 5"


def test_the_same_branch_is_found_however_it_is_asked_for(parent: Run, corpus_file: Path, tmp_path: Path) -> None:
    first = run(branch(corpus_file, f"{parent.identity}@10", "12steps"))
    assert first.state == "done"
    assert (first.run.read("config.json") or {})["config"]["trainer"]["start"] == f"{parent.identity}@10"
    for start in (f"{parent.identity[:5]}@10", "latest@10"):
        for budget in ("12steps", "+2steps", "+20%", "+128tokens"):
            again = run(branch(corpus_file, start, budget))
            assert (again.state, again.run) == ("skipped", first.run), (start, budget)
    elsewhere = tmp_path / "elsewhere" / "kept" / f"renamed-{parent.identity}"
    shutil.copytree(parent.directory, elsewhere)
    assert run(branch(corpus_file, f"{elsewhere}@10", "12steps")).state == "skipped"
    other = run(branch(corpus_file, f"{parent.identity}@15", "17steps"))
    assert other.state == "done"
    assert len({first.run.identity, other.run.identity, parent.identity}) == 3
    assert run(branch(corpus_file, f"{parent.identity}@latest", "+2steps")).run.read("start.json")["step"] == 20  # type: ignore[index]


def test_without_a_step_the_newest_checkpoint_is_meant(parent: Run, corpus_file: Path) -> None:
    made = run(branch(corpus_file, parent.identity, "+2steps")).run
    assert (made.read("done.json") or {})["summary"]["step"] == STEPS + 2


def test_a_parent_outside_the_runs_folder_will_do(parent: Run, corpus_file: Path, tmp_path: Path) -> None:
    kept = shutil.move(parent.directory, tmp_path / "kept" / parent.directory.name)
    made = run(branch(corpus_file, f"'{kept}@10'", "12steps")).run
    assert (made.read("start.json") or {})["run"] == parent.identity


def test_a_branch_that_is_done_or_has_a_checkpoint_does_without_its_parent(parent: Run, corpus_file: Path) -> None:
    done = branch(corpus_file, f"{parent.identity}@10", "12steps")
    cut = branch(corpus_file, f"{parent.identity}@10", "16steps", "+callback@callbacks.cut=interrupt_at")
    run(done)
    InterruptAt.armed = True
    with pytest.raises(Stopped):
        run(cut)
    uncut = branch(corpus_file, f"{parent.identity}@10", "16steps", "study=whole")
    shutil.rmtree(parent.directory)
    assert run(done).state == "skipped"
    assert run([o.replace(parent.identity, parent.identity[:6]) for o in done]).state == "skipped"
    resumed = run(uncut)
    assert resumed.state == "done"
    assert [m["step"] for m in resumed.run.metrics() if "train/loss" in m][-7:] == list(range(10, 17))
    for anew in (branch(corpus_file, f"{parent.identity}@10", "18steps"), done):
        with pytest.raises(ConfigError, match="is no longer here") as error:
            run(anew, rerun=anew is done)
        assert error.value.code == 2
    assert resumed.run.directory.is_dir()
    assert run(done).state == "skipped", "a --rerun that cannot be has deleted nothing"


def test_an_interrupted_branch_resumes_bit_exactly(parent: Run, corpus_file: Path) -> None:
    overrides = branch(corpus_file, f"{parent.identity}@10", "16steps")
    whole = run(overrides).run
    expected, lines = weights(whole), numbers(whole, 0)
    shutil.rmtree(whole.directory)
    cut = [*overrides, "+callback@callbacks.cut=interrupt_at"]
    InterruptAt.armed = True
    with pytest.raises(Stopped, match="step 13"):
        run(cut)
    second = run(cut).run
    assert second.identity == whole.identity
    for name, value in weights(second).items():
        assert torch.equal(value, expected[name]), name
    assert numbers(second, 0) == lines


def test_a_branch_that_failed_before_its_first_checkpoint_begins_at_the_parents_again(parent: Run, corpus_file: Path) -> None:
    overrides = branch(corpus_file, f"{parent.identity}@10", "16steps", "callbacks.checkpoint.best=false")
    whole = run(overrides).run
    expected, lines = weights(whole), numbers(whole, 0)
    (whole.directory / "done.json").unlink()
    checkpoint.remove_all(whole.checkpoints)
    again = run(overrides).run
    for name, value in weights(again).items():
        assert torch.equal(value, expected[name]), name
    assert numbers(again, 0) == lines, "the lines of the first try are replaced"


def test_a_branch_of_a_branch_at_a_constant_rate_goes_on_as_one_run(parent: Run, corpus_file: Path) -> None:
    longer = [*branch(corpus_file, f"{parent.identity}@20", "30steps"), "schedule=constant", "schedule.warmup=3"]
    extended = run([*longer, "callbacks.checkpoint.keep_every=5"]).run
    cooled = run(branch(corpus_file, f"{extended.identity}@25", "+20%")).run
    whole = run(tiny(corpus_file, "model.dropout=0.2", "schedule=constant", "schedule.warmup=3", *EVERY, steps=30)).run
    same_weights(extended, whole)
    assert (cooled.read("done.json") or {})["summary"]["step"] == 30


def test_rolling_back_in_a_branch_has_its_beginning_to_go_back_to(parent: Run, corpus_file: Path) -> None:
    keeps = ("trainer.on_nonfinite=rollback", "callbacks.checkpoint.keep=9", "callbacks.checkpoint.best=false")
    made = run(branch(corpus_file, f"{parent.identity}@10", "12steps", *keeps)).run
    assert [checkpoint.step_of(c) for c in checkpoint.checkpoints(made.checkpoints)] == [12, 10]


def test_a_budget_by_the_clock_counts_from_the_start_or_from_zero(parent: Run, corpus_file: Path) -> None:
    made = run(branch(corpus_file, f"{parent.identity}@10", "+0.005min")).run
    at = next(m["seconds"] for m in parent.metrics() if m["step"] == 10)
    summary = (made.read("done.json") or {})["summary"]
    assert 0.3 <= summary["seconds"] - at < 1.5
    rates = [m["train/learning_rate"] for m in made.metrics() if m["step"] > 10 and "train/learning_rate" in m]
    assert rates[0] == max(rates)
    assert rates[-1] < 0.15 * rates[0], "it has cooled by the end"
    whole = run(branch(corpus_file, f"{parent.identity}@10", "0.01min")).run
    assert 0.6 <= (whole.read("done.json") or {})["summary"]["seconds"] < 1.8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["optimizer.learning_rate=0.01"], "optimizer.learning_rate=0.01 differs from 0.001 in run"),
        (["optimizer=lion"], "optimizer=lion differs from adamw"),
        (["model/norm=rmsnorm"], "model/norm=rmsnorm differs from layernorm"),
        (["model.width=32"], "model.width=32 differs from 16"),
        (["+callback@callbacks.ema=ema"], "callbacks/ema=ema differs from nothing"),
        (["trainer.batch_tokens=128"], "trainer.batch_tokens=128 differs from 64"),
        (["seed=1"], "seeds.init=1 differs from 0"),
        (["seeds.data=1"], "seeds.data=1 differs from 0"),
        (["data/tokenizer=byte"], "data/tokenizer=byte makes another text"),
        (["data.validation_fraction=0.2"], "data.validation_fraction=0.2 makes another text"),
        (["trainer.start=ID@7"], "keeps no checkpoint of step 7; there is 5, 10, 15, 20: callbacks.checkpoint.keep_every"),
        (["trainer.start=ID@some"], "some is no checkpoint of run"),
        (["trainer.start=nothing@10"], "no run matches 'nothing'"),
        (["trainer.budget=10steps"], "trainer.budget=10steps is spent where the run begins (step 10)"),
        (["trainer.budget=0.000001min"], "trainer.budget=0.000001min is spent where the run begins"),
        (["schedule=cosine"], "schedule=cosine would be at 0."),
        (["schedule.final=2.0"], "schedule.final=2.0 must be in [0, 1]"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_what_is_not_the_parents_road_is_refused_before_anything_is_made(
    parent: Run, corpus_file: Path, changes: list[str], said: str
) -> None:
    overrides = branch(corpus_file, f"{parent.identity}@10", "12steps")
    for change in changes:
        key = change.partition("=")[0]
        overrides = [o for o in overrides if not (key.startswith("trainer.") and o.startswith(f"{key}="))]
        overrides.append(change.replace("ID", parent.identity))
    with pytest.raises(ConfigError) as error:
        run(overrides)
    assert said in str(error.value)
    assert error.value.code == 2
    assert only(parent.directory.parent) == parent


@pytest.mark.parametrize(
    ("schedule", "step", "said"),
    [
        (["schedule=constant", "schedule.warmup=8"], 5, "is still warming up at step 5 (schedule=constant)"),
        (["schedule=constant", "schedule.warmup=8"], 10, None),
        (["schedule=wsd", "schedule.warmup=3", "schedule.decay=0.5"], 5, None),
        (["schedule=wsd", "schedule.warmup=3", "schedule.decay=0.5"], 10, None),
        (["schedule=wsd", "schedule.warmup=3", "schedule.decay=0.5"], 15, "has begun to cool at step 15 (schedule=wsd is at 0.5"),
        (["schedule=wsd", "schedule.warmup=3", "schedule.decay=0.5"], 20, "has begun to cool at step 20"),
        (["schedule=cosine", "schedule.warmup=4"], 5, "has begun to cool at step 5 (schedule=cosine"),
        (["schedule=linear", "schedule.warmup=3"], 10, "has begun to cool at step 10 (schedule=linear"),
        (["schedule=inverse_sqrt", "schedule.warmup=3"], 10, "has begun to cool at step 10 (schedule=inverse_sqrt"),
    ],
)  # fmt: skip
def test_only_a_full_rate_can_be_gone_on_from(corpus_file: Path, schedule: list[str], step: int, said: str | None) -> None:
    keeps = ("callbacks.checkpoint.keep_every=5", "callbacks.checkpoint.best=false")
    parent = run(tiny(corpus_file, "model.dropout=0.2", *keeps, *schedule, steps=20)).run
    overrides = branch(corpus_file, f"{parent.identity}@{step}", "+2steps")
    if said is None:
        assert run(overrides).state == "done"
        return
    with pytest.raises(ConfigError) as error:
        run(overrides)
    assert said in str(error.value)


def test_a_run_that_has_cooled_is_not_cooled_again(parent: Run, corpus_file: Path) -> None:
    cooled = run(branch(corpus_file, f"{parent.identity}@10", "12steps")).run
    with pytest.raises(ConfigError, match="has begun to cool at step 12"):
        run(branch(corpus_file, f"{cooled.identity}@12", "14steps"))


def test_a_parent_that_the_clock_ends_is_judged_by_where_it_stood(corpus_file: Path) -> None:
    keeps = ("callbacks.checkpoint.keep_every=5", "callbacks.checkpoint.best=false", "trainer.log_every=1000")
    timed = tiny(corpus_file, "model.dropout=0.2", "schedule=wsd", "schedule.warmup=3", "schedule.decay=0.5", *keeps)
    parent = run([*timed, "trainer.budget=0.02min"]).run
    last = checkpoint.step_of(checkpoint.checkpoints(parent.checkpoints)[0])
    assert run(branch(corpus_file, f"{parent.identity}@5", "+2steps")).state == "done"
    with pytest.raises(ConfigError, match="has begun to cool"):
        run(branch(corpus_file, f"{parent.identity}@{last // 5 * 5}", "+2steps"))


def test_a_checkpoint_of_the_parent_that_is_damaged_is_refused(parent: Run, corpus_file: Path) -> None:
    file = parent.checkpoints / checkpoint.checkpoint_name(10) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match="sha256"):
        run(branch(corpus_file, f"{parent.identity}@10", "12steps"))


def test_a_text_that_has_changed_since_is_refused(corpus_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(corpus_file.read_text())
    parent = run(tiny(file, *PARENT, steps=10)).run
    file.write_text(corpus_file.read_text() + "The end.\n")
    with pytest.raises(DataError, match="a text that has changed since"):
        run(branch(file, f"{parent.identity}@10", "12steps"))


def test_a_cooldown_from_nowhere_and_a_budget_beyond_nothing_are_refused(corpus_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"schedule=cooldown goes on from a checkpoint: name it with trainer\.start=RUN@STEP"):
        run(tiny(corpus_file, "schedule=cooldown"))
    for budget in ("+20%", "+5steps", "+1min"):
        with pytest.raises(ConfigError, match=r"counts from a checkpoint"):
            run([*tiny(corpus_file), f"trainer.budget={budget}"])


def test_seeds_of_a_branch_are_one_arm_and_the_table_tells_unequal_lengths(corpus_file: Path) -> None:
    for seed in (0, 1):
        parent = run(tiny(corpus_file, *PARENT, "study=curve", f"seed={seed}", steps=10)).run
        for start, budget in ((5, "+2steps"), (10, "+4steps")):
            run(branch(corpus_file, f"{parent.identity}@{start}", budget, "study=curve", f"seed={seed}"))
    assert len({m["arm"] for m in members("curve")}) == 3
    found = compare("curve")
    assert [(row.steps, row.seeds) for row in found.rows] == [(10, [0, 1]), (7, [0, 1]), (14, [0, 1])]
    assert any("ended at different steps" in note for note in found.notes)
    from gptlab.study.report import markdown

    assert markdown(found).startswith("| arm | seeds | steps |")


def test_where_the_clock_ends_a_branch_its_length_is_told_by_its_own_speed() -> None:
    """The parent's 100 steps took 600 s elsewhere; this machine made 10 steps in 30 s."""
    state = State(step=110, seconds=630.0, begun=600.0)
    for budget, total in ((Budget(1, "min", beyond=True), 120), (Budget(11, "min"), 120), (Budget(5, "min", beyond=True), 200)):
        length = Length(budget, 100, None)
        assert length.total(state) == pytest.approx(total)
        assert not length.finished(state)
        assert length.finished(State(step=111, seconds=600 + 0.6 * (total - 100) * 5, begun=600.0))
        assert length.total(State(step=100, seconds=600.0, begun=600.0)) > 1e9, "nothing is known before the first step"


@pytest.mark.parametrize(
    ("text", "budget", "steps"),
    [
        ("+100steps", Budget(100, "steps", True), 600),
        ("+20%", Budget(20, "%", True), 600),
        ("+0.1%", Budget(0.1, "%", True), 501),
        ("+1500tokens", Budget(1500, "tokens", True), 502),
        ("+2epochs", Budget(2, "epochs", True), 520),
        ("+1x", Budget(1, "x", True), 505),
        ("+2Mflops", Budget(2e6, "flops", True), 520),
        ("+1min", Budget(1, "min", True), None),
        ("600steps", Budget(600, "steps"), 600),
    ],
)
def test_a_budget_beyond_the_start_in_every_unit(text: str, budget: Budget, steps: int | None) -> None:
    assert parse_budget(text) == budget
    assert budget.steps(batch_tokens=1000, epoch_tokens=10_000, parameters=5_000, flops_per_token=100.0, start=500) == steps


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\+20% trains so much beyond trainer\.start"):
        parse_budget("20%")


def test_the_shapes_of_a_cooldown() -> None:
    line, root = (
        build(component("schedule", "cooldown").options(shape=shape, final=0.1), batch_tokens=64, steps=None, start=100)
        for shape in ("linear", "sqrt")
    )
    assert [f(100, 200) for f in (line, root)] == [1.0, 1.0]
    assert [f(200, 200) for f in (line, root)] == pytest.approx([0.1, 0.1])
    assert line(150, 200) == pytest.approx(0.55)
    assert root(125, 200) == pytest.approx(0.1 + 0.9 * 0.5), "1 - sqrt(1/4)"


@pytest.mark.slow
def test_ranks_branch_from_one_process_and_one_process_from_ranks(
    corpus_file: Path, home_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("schedule.warmup=3", "callbacks.checkpoint.keep_every=5", "callbacks.checkpoint.best=false", "hardware.precision=fp32")
    end = ["schedule=cooldown", "trainer.budget=14steps", "trainer.start=latest@10"]
    road = tiny(corpus_file, "schedule=constant", *common, steps=10)
    cool = [o for o in tiny(corpus_file, *common[1:]) if not o.startswith("trainer.budget")] + end
    roots = {kind: tmp_path / kind for kind in ("alone", "ddp", "fsdp")}
    jobs = []
    for kind in ("ddp", "fsdp"):
        jobs += [Job(roots[kind], [*o, f"hardware/strategy={kind}"]) for o in (road, cool)]
    outcomes = trained(tmp_path / "launch", jobs, environment={"GPTLAB_HOME": str(home_folder), "HF_HUB_OFFLINE": "1"})
    assert [[o["state"] for o in ranks] for ranks in outcomes] == [["done", "done"]] * 4
    monkeypatch.setenv("GPTLAB_RUNS", str(roots["alone"]))
    run(road)
    alone = run(cool).run
    for kind in ("ddp", "fsdp"):
        made = Run(next(roots[kind].glob("*/*/start.json")).parent)
        assert made.identity == alone.identity
        assert len(made.metrics_file.read_text().splitlines()) == len(alone.metrics_file.read_text().splitlines())
        for name, value in weights(alone).items():
            torch.testing.assert_close(value, weights(made)[name], rtol=1e-3, atol=1e-5)
        parent = next(f.parent for f in roots[kind].glob("*/*/config.json") if not (f.parent / "start.json").exists())
        monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / f"from_{kind}"))
        mixed = run([o if not o.startswith("trainer.start") else f"trainer.start='{parent}@10'" for o in cool]).run
        for name, value in weights(alone).items():
            torch.testing.assert_close(value, weights(mixed)[name], rtol=1e-3, atol=1e-5)
