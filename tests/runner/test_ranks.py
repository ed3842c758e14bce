"""Several ranks train what one process trains: the same numbers, the same folder, and the same end whatever happens to one of them."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab import compose, train
from gptlab.config.errors import ConfigError
from gptlab.hardware.world import World
from gptlab.runner import checkpoint
from gptlab.runner.run import Run
from gptlab.runner.validation import _dealt
from tests.ranks import Job, gptlab, trained, until
from tests.tiny import tiny

pytestmark = pytest.mark.slow  # launches of torchrun, minutes in all; test_sharded.py has a short one of either strategy
STRATEGIES = ("ddp", "fsdp")
STEPS = 50
NOTED = re.compile(r"^(rows\.\d+\.jsonl|log\.\d+\.txt|\.lock)$")  # what these tests leave in a run, and what is a rank's own


def strategy(name: str) -> str:
    return f"hardware/strategy={name}"


def fault(name: str, **options: object) -> list[str]:
    return [f"+callback@callbacks.fault={name}", *(f"callbacks.fault.{key}={value}" for key, value in options.items())]


def run_in(runs: Path) -> Run:
    (found,) = runs.glob("*/*/config.json")
    return Run(found.parent)


def losses(run: Run) -> dict[int, float]:
    return {m["step"]: m["train/loss"] for m in run.metrics() if "train/loss" in m}


def held_out(run: Run) -> list[float]:
    return [m["val/loss"] for m in run.metrics() if "val/loss" in m]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in checkpoint.load_model(checkpoint.require_good(run.checkpoints)).items()}


def noted(run: Run) -> dict[int, list[dict[str, Any]]]:
    """What each rank wrote down of each step, by rank."""
    found: dict[int, list[dict[str, Any]]] = {}
    for file in sorted(run.directory.glob("rows.*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            found.setdefault(line["step"], []).append(line)
    return found


def rows(run: Run) -> dict[int, list[str]]:
    return {step: [row for line in lines for row in line["rows"]] for step, lines in noted(run).items()}


def files(run: Run) -> list[str]:
    """The names of a run's files, less the time in W&B's."""
    found = [f.relative_to(run.directory) for f in run.directory.rglob("*") if f.is_file() and not NOTED.match(f.name)]
    return sorted(re.sub(r"\d{8}_\d{6}", "TIME", str(f)) for f in found if "checkpoints" not in f.parts and f.parts[-2:-1] != ("logs",))


@dataclass(frozen=True)
class Made:
    """Where a module's runs lie, and what became of each."""

    root: Path
    outcomes: dict[str, list[dict[str, Any]]]

    def run(self, name: str) -> Run:
        return run_in(self.root / name)


@pytest.fixture(scope="module")
def variables(home_folder: Path) -> dict[str, str]:
    return {"GPTLAB_HOME": str(home_folder), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, variables: dict[str, str]) -> Made:
    """The same 50 steps in many ways, in three launches: on two ranks, in one process, on two ranks again."""
    root = tmp_path_factory.mktemp("ranks")
    common = ["trainer.batch_tokens=256", "hardware.precision=fp32", "callbacks.evaluation.every=25", "+callback@callbacks.rows=rows"]
    text = tiny(corpus_file, *common, steps=STEPS)
    dyck = ["data=dyck", *(o for o in text if not o.startswith("data"))]
    short = [*text, "trainer.budget=12steps", "hardware.micro_batch=2"]

    def legs(*first: str) -> list[tuple[str, list[str]]]:
        alone = "callbacks.fault.rank=1"  # the other must leave with it
        return [("ddp-first", [*dyck, strategy("ddp"), *first]), ("fsdp-first", [*dyck, strategy("fsdp"), *first, alone])]

    two = [
        (f"{name}-{kind}-{split}", [*base, strategy(kind), f"hardware.micro_batch={split}", f"tracker={tracker}"])
        for name, base in (("text", text), ("dyck", dyck))
        for kind in STRATEGIES
        for split, tracker in ((8, "offline" if name == "text" else "none"), (2, "none"))
    ]
    unused = [*text, "model/ffn=none", "trainer.budget=12steps"]  # the norm before it has no gradient
    two += [("unused-ddp", [*unused, strategy("ddp"), "hardware.micro_batch=2"]), ("unused-fsdp", [*unused, strategy("fsdp")])]
    two += legs(*fault("signal_at", step=17))
    one = [
        (f"{name}-single-{split}", [*base, f"hardware.micro_batch={split}", f"tracker={tracker}"])
        for name, base in (("text", text), ("dyck", dyck))
        for split, tracker in ((16, "offline" if name == "text" else "none"), (4, "none"), (1, "none"))
    ]
    one += [("unused-single", unused)]
    one += [(name, [*dyck, *fault("signal_at", step=34)]) for name in ("ddp-first", "fsdp-first")]
    one += [(f"{mode}-single", [*short, f"trainer.on_nonfinite={mode}", *fault("poison", micro=5)]) for mode in ("skip", "rollback")]
    last = [("ddp-first", [*dyck, strategy("fsdp")]), ("fsdp-first", [*dyck, strategy("ddp")])]
    for kind in STRATEGIES:
        poisoned = [*short, strategy(kind), *fault("poison", rank=1, micro=1)]
        last += [(f"{mode}-{kind}", [*poisoned, f"trainer.on_nonfinite={mode}"]) for mode in ("stop", "skip", "rollback")]
        last += [(f"gradient-{kind}", [*poisoned, "callbacks.fault.what=gradient"])]
        last += [(f"limit-{kind}", [*text, strategy(kind), "trainer.budget=100000steps", "trainer.time_limit=1.5s"])]
        last += [(f"minutes-{kind}", [*text, strategy(kind), "trainer.budget=0.01min"])]
    wrong = [
        ("uneven", [*text, strategy("ddp"), "trainer.batch_tokens=240"]),
        ("single", [*text]),
        ("fp16", [*text, strategy("fsdp"), "hardware.precision=fp16"]),
        ("micro", [*text, strategy("ddp"), "hardware.micro_batch=3"]),
    ]
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for ranks, jobs in ((2, two), (0, one), (2, [*last, *wrong])):
        found = trained(root, [Job(root / name, overrides) for name, overrides in jobs], ranks=ranks, environment=variables)
        outcomes |= {f"{name} first" if name in outcomes else name: o for (name, _), o in zip(jobs, found, strict=True)}
        if jobs is two:
            outcomes |= {f"{name} stopped": outcomes.pop(name) for name in ("ddp-first", "fsdp-first")}
    return Made(root, outcomes)


WAYS = [f"single-{n}" for n in (4, 1)] + [f"{kind}-{n}" for kind in STRATEGIES for n in (8, 2)]


@pytest.mark.parametrize("data", ["text", "dyck"])
@pytest.mark.parametrize("way", WAYS)
def test_fifty_steps_are_the_same_however_a_batch_is_split_and_shared(made: Made, data: str, way: str) -> None:
    reference, other = made.run(f"{data}-single-16"), made.run(f"{data}-{way}")
    assert reference.identity == other.identity
    assert list(losses(other)) == list(range(1, STEPS + 1))
    assert losses(other) == pytest.approx(losses(reference), rel=1e-5)
    assert len(held_out(other)) == 2
    assert held_out(other) == pytest.approx(held_out(reference), rel=1e-5)
    theirs = weights(other)
    for name, value in weights(reference).items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_model_with_a_parameter_that_nothing_uses_trains_on_several_ranks(made: Made, kind: str) -> None:
    assert [o["state"] for o in made.outcomes[f"unused-{kind}"]] == ["done", "done"], made.outcomes[f"unused-{kind}"]
    assert losses(made.run(f"unused-{kind}")) == pytest.approx(losses(made.run("unused-single")), rel=1e-5)


def test_the_ranks_rows_count_differently_where_the_answers_alone_are_scored(made: Made) -> None:
    unequal = [[line["weight"] for line in lines] for lines in noted(made.run("dyck-ddp-8")).values()]
    assert sum(a != b for a, b in unequal) > STEPS / 2, "else equal losses prove nothing about unequal weights"


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_run_is_the_same_folder_metrics_and_wandb_files_whatever_the_number_of_ranks(made: Made, kind: str) -> None:
    one, two = made.run("text-single-16"), made.run(f"text-{kind}-8")
    assert one.directory.name == two.directory.name
    assert files(one) == files(two)
    assert sum("wandb/offline-run" in f and f.endswith(".wandb") for f in files(two)) == 1
    assert [m.keys() for m in one.metrics()] == [m.keys() for m in two.metrics()]
    assert one.read("data.json") == two.read("data.json")
    ours, theirs = one.read("config.json"), two.read("config.json")
    assert ours is not None
    assert theirs is not None
    assert theirs["config"].pop("hardware") != ours["config"].pop("hardware")
    assert ours == theirs
    assert (two.read("environment.json") or {})["ranks"] == 2


@pytest.mark.parametrize("first", STRATEGIES)
def test_a_resume_on_another_number_of_ranks_keeps_the_order_of_the_data(made: Made, first: str) -> None:
    whole, parts = made.run("dyck-single-16"), made.run(f"{first}-first")
    stopped = made.outcomes[f"{first}-first stopped"]
    assert [(o["state"], o["code"]) for o in stopped] == [("Stopped", 75)] * 2
    assert stopped[0]["message"] == stopped[1]["message"], "both leave at the same step"
    assert rows(parts) == rows(whole)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert held_out(parts) == pytest.approx(held_out(whole), rel=1e-5)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_its_rows(made: Made, kind: str) -> None:
    outcomes = made.outcomes[f"stop-{kind}"]
    assert [o["code"] for o in outcomes] == [4, 4]
    for outcome in outcomes:
        assert "the loss is nan on rank 1 at step 7 (rows 104 to 111, batch 6 of the data's order" in outcome["message"]
    assert [o["code"] for o in made.outcomes[f"gradient-{kind}"]] == [4, 4]
    assert "the gradient norm is nan at step 7" in made.outcomes[f"gradient-{kind}"][0]["message"]
    assert made.run(f"stop-{kind}").state == "failed"


@pytest.mark.parametrize("mode", ["skip", "rollback"])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_ranks_pass_over_a_batch_together(made: Made, mode: str, kind: str) -> None:
    run, alone = made.run(f"{mode}-{kind}"), made.run(f"{mode}-single")
    assert [o["state"] for o in made.outcomes[f"{mode}-{kind}"]] == ["done", "done"]
    passed = [json.loads(line) for line in (run.directory / "passed.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in passed] == [6]
    assert list(losses(run)) == list(range(1, 13))
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    last = {step: lines[-1]["rows"] for step, lines in noted(alone).items()}  # a roll-back trains some steps twice
    for rank in (0, 1):
        theirs = [json.loads(line) for line in (run.directory / f"rows.{rank}.jsonl").read_text().splitlines()]
        assert {line["step"]: line["rows"] for line in theirs} == {step: all_[8 * rank : 8 * rank + 8] for step, all_ in last.items()}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_ranks_agree_on_the_step_at_which_the_clock_ends_them(made: Made, kind: str) -> None:
    limit = made.outcomes[f"limit-{kind}"]
    assert [o["code"] for o in limit] == [75, 75]
    assert limit[0]["message"] == limit[1]["message"]
    assert "by its time limit (trainer.time_limit)" in limit[0]["message"]
    assert [o["state"] for o in made.outcomes[f"minutes-{kind}"]] == ["done", "done"]
    for name in ("limit", "minutes"):
        run = made.run(f"{name}-{kind}")
        steps = [len(lines) for lines in noted(run).values()]
        assert steps == [2] * len(steps), "each step was made by both"
        assert checkpoint.step_of(checkpoint.require_good(run.checkpoints)) == len(steps)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_held_out_batch_counts_once_and_each_rank_passes_equally_often(size: int) -> None:
    batches: list[Any] = list(range(7))
    dealt = [list(_dealt(iter(batches), World(rank, size))) for rank in range(size)]
    assert len({len(mine) for mine in dealt}) == 1, "else a rank waits for another's pass"
    assert sorted(batch for mine in dealt for _, batch, counts in mine if counts) == batches
    assert all(number == batch for mine in dealt for number, batch, counts in mine if counts), "each is known by its place"


def test_what_ranks_cannot_do_is_a_wrong_setting_on_each(made: Made) -> None:
    for name, words in (
        ("uneven", "trainer.batch_tokens=240 makes 15 sequences of 16 tokens, which 2 ranks cannot share evenly; try 256"),
        ("single", "hardware/strategy=single is one process; torchrun started 2: use hardware/strategy=ddp or fsdp"),
        ("fp16", "with hardware/strategy=fsdp use bf16 or fp32"),
        ("micro", "hardware.micro_batch=3 does not divide the 8 sequences of each of the 2 ranks"),
    ):
        assert [o["code"] for o in made.outcomes[name]] == [2, 2], name
        assert all(words in o["message"] for o in made.outcomes[name]), made.outcomes[name]
        assert not (made.root / name).exists(), "nothing was made"


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_strategy_of_several_ranks_asks_for_torchrun(corpus_file: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"hardware/strategy={kind} needs torchrun: torchrun --nproc-per-node 2 -m gptlab train"):
        train(compose(tiny(corpus_file, strategy(kind))))


# What befalls one process of several: each needs processes of its own. There is dropout, so that equal weights mean equal chance too.


def faulty(corpus_file: Path, kind: str, *more: str) -> list[str]:
    saved = [f"callbacks.checkpoint.{setting}" for setting in ("every=5", "keep=4", "best=false")]
    return tiny(corpus_file, strategy(kind), *saved, "hardware.precision=fp32", "model.dropout=0.1", *more, steps=20)


@dataclass
class Interrupted:
    """A run that something befell, and the command that goes on with it: the same, without the fault."""

    name: str
    kind: str
    job: Job


@pytest.fixture(scope="module")
def interrupted() -> list[Interrupted]:
    """The runs that the tests of this file interrupted; the last test goes on with all of them in one launch."""
    return []


@pytest.fixture
def to_resume(interrupted: list[Interrupted], corpus_file: Path, request: pytest.FixtureRequest) -> Any:
    """Called by a test at its end: what it interrupted can be gone on with."""

    def note(kind: str, *more: str) -> None:
        job = Job(Path(os.environ["GPTLAB_RUNS"]), faulty(corpus_file, kind, *more))
        interrupted.append(Interrupted(request.node.name, kind, job))

    return note


def our_run() -> Run:
    return run_in(Path(os.environ["GPTLAB_RUNS"]))


LOST = "gptlab: another rank died or did not answer in time"


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_killed_rank_takes_the_other_along_and_costs_no_number(corpus_file: Path, tmp_path: Path, to_resume: Any, kind: str) -> None:
    with gptlab(tmp_path, *faulty(corpus_file, kind, *fault("kill_at", step=13, rank=1))) as ranks:
        assert ranks.wait() != 0
        assert ranks.codes == {0: 74, 1: -9}
        assert len(ranks.said) == 1
        assert ranks.said[0].startswith(LOST)
        assert "the same command goes on from the last checkpoint" in ranks.said[0]
        assert not ranks.tracebacks
    assert (our_run().read("failed.json") or {})["code"] == 74
    assert checkpoint.step_of(checkpoint.require_good(our_run().checkpoints)) == 10
    to_resume(kind)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_first_rank_killed_costs_no_number(corpus_file: Path, tmp_path: Path, to_resume: Any, kind: str) -> None:
    with gptlab(tmp_path, *faulty(corpus_file, kind, *fault("kill_at", step=13, rank=0))) as ranks:
        assert ranks.wait() != 0
        assert ranks.codes == {0: -9, 1: 74}
        assert "Traceback" in (our_run().directory / "log.1.txt").read_text()
        assert ranks.said[0].startswith(LOST.replace("gptlab: ", "gptlab: rank 1: "))
    to_resume(kind)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_sigterm_to_torchrun_ends_all_ranks_at_one_step(corpus_file: Path, tmp_path: Path, to_resume: Any, kind: str) -> None:
    paced = ["+callback@callbacks.pace=pace", "callbacks.pace.seconds=0.3"]
    with gptlab(tmp_path, *faulty(corpus_file, kind, *paced)) as ranks:
        until(lambda: list(Path(os.environ["GPTLAB_RUNS"]).glob("*/*/metrics.jsonl")) and len(losses(our_run())) > 2, "three steps")
        os.kill(ranks.process.pid, signal.SIGTERM)
        assert ranks.wait() != 0
        assert [re.sub(r"step \d+", "step N", line) for line in ranks.said] == [
            "gptlab: stopped at step N by SIGTERM; the same command resumes it"
        ]
    run = our_run()
    assert run.state == "stopped"
    assert checkpoint.step_of(checkpoint.require_good(run.checkpoints)) == max(losses(run))
    assert "stopped at step" in (run.directory / "log.1.txt").read_text()
    to_resume(kind)


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_ends_both_at_one_step(corpus_file: Path, tmp_path: Path, to_resume: Any, kind: str, rank: int) -> None:
    with gptlab(tmp_path, *faulty(corpus_file, kind, *fault("signal_at", step=8, rank=rank))) as ranks:
        assert ranks.wait() != 0
        assert ranks.codes == {0: 75, 1: 75}
    assert checkpoint.step_of(checkpoint.require_good(our_run().checkpoints)) in (8, 9)
    to_resume(kind)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_a_clusters_warning_that_torchrun_passes_on_ends_all_ranks(corpus_file: Path, tmp_path: Path, to_resume: Any, name: str) -> None:
    paced = ["+callback@callbacks.pace=pace", "callbacks.pace.seconds=0.3"]
    handled = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"]
    with gptlab(tmp_path, *faulty(corpus_file, "ddp", *paced), options=handled) as ranks:
        until(lambda: list(Path(os.environ["GPTLAB_RUNS"]).glob("*/*/metrics.jsonl")) and len(losses(our_run())) > 2, "three steps")
        os.kill(ranks.process.pid, signal.Signals[name])
        assert ranks.wait() != 0
        assert any(name in line for line in ranks.said), ranks.output
    assert our_run().state == "stopped"
    to_resume("ddp")


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_rank_that_hangs_is_given_up_after_the_time_out(corpus_file: Path, tmp_path: Path, to_resume: Any, kind: str) -> None:
    hung = [*fault("hang_at", step=13, rank=1), "hardware.strategy.timeout=0.1"]
    with gptlab(tmp_path, *faulty(corpus_file, kind, *hung)) as ranks:
        assert ranks.wait(120) != 0
        assert ranks.codes == {0: 74, 1: -9}
        assert [line[: len(LOST)] for line in ranks.said] == [LOST]
    to_resume(kind)


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("exception", "gptlab: rank 1: RuntimeError: a component of the user's failed; the traceback is in "),
        ("memory", "gptlab: rank 1: out of memory at step 14 on cpu: try "),
    ],
)
def test_a_failure_of_one_rank_is_told_in_its_log_and_hangs_nobody(
    corpus_file: Path, tmp_path: Path, to_resume: Any, kind: str, failure: str, said: str
) -> None:
    split = "hardware.micro_batch=2"
    with gptlab(tmp_path, *faulty(corpus_file, kind, split, *fault("raise_at", step=13, rank=1, kind=failure))) as ranks:
        assert ranks.wait(120) != 0
        assert ranks.codes == {0: 74, 1: 1}
        assert any(line.startswith(said) for line in ranks.said), ranks.output
    log = (our_run().directory / "log.1.txt").read_text()
    assert "Traceback" in log
    assert ("a component of the user's failed" if failure == "exception" else "CUDA out of memory") in log
    if failure == "memory":
        assert any("hardware.micro_batch=1 (now 2; the numbers stay the same)" in line for line in ranks.said)
    assert checkpoint.step_of(checkpoint.require_good(our_run().checkpoints)) == 10
    to_resume(kind, split)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sweep_ends_at_once_when_one_rank_fails_alone(corpus_file: Path, tmp_path: Path, variables: dict[str, str], rank: int) -> None:
    """The others wait in the midst of its step: no further job can begin. The same command goes on with what is left."""
    arms = tiny(corpus_file, strategy("ddp"), "seed=0,1")
    with gptlab(tmp_path, "-m", *arms, *fault("raise_at", step=4, rank=rank)) as ranks:
        assert ranks.wait(90) != 0, "well before the time-out of ten minutes"
        assert "a component of the user's failed" in "".join(f.read_text() for f in Path(os.environ["GPTLAB_RUNS"]).glob("*/*/log*.txt"))
        assert not list(Path(os.environ["GPTLAB_RUNS"]).glob("*/*seed=1*"))
    with gptlab(tmp_path, "-m", *arms) as ranks:
        assert ranks.wait() == 0
        assert "2 runs: 2 trained, 0 skipped, 0 failed" in ranks.output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_under_one_shard_ends_all_ranks_and_leaves_the_older_checkpoints(
    corpus_file: Path, tmp_path: Path, to_resume: Any, rank: int
) -> None:
    with gptlab(tmp_path, *faulty(corpus_file, "fsdp", *fault("full_disk", step=10, rank=rank))) as ranks:
        assert ranks.wait(120) != 0
        assert ranks.codes == {0: 74, 1: 74}
        assert any("the disk is full: the checkpoint needs" in line for line in ranks.said), ranks.output
    folder = our_run().checkpoints
    assert [f.name for f in folder.iterdir()] == ["step-000000005"]
    assert weights(our_run())
    to_resume("fsdp")


def test_a_wrong_setting_is_said_once_by_all_ranks(corpus_file: Path, tmp_path: Path) -> None:
    with gptlab(tmp_path, *tiny(corpus_file, strategy("ddp"), "trainer.batch_tokens=48")) as ranks:
        assert ranks.wait() != 0
        assert 2 in ranks.codes.values()
        assert len(ranks.said) == 1, ranks.output
    assert not Path(os.environ["GPTLAB_RUNS"]).exists()


@pytest.mark.parametrize("kind", STRATEGIES)
def test_one_rank_alone_prints(corpus_file: Path, tmp_path: Path, kind: str) -> None:
    with gptlab(tmp_path, *faulty(corpus_file, kind)) as ranks:
        assert ranks.wait() == 0
        assert ranks.output.count("✓") == 1
        assert ranks.output.count("parameters, cpu x 2, fp32") == 1
        assert len([line for line in ranks.output.splitlines() if line.strip()]) == 2, ranks.output


def test_what_was_interrupted_goes_on_with_the_same_command_and_no_number_changes(
    interrupted: list[Interrupted], tmp_path: Path, corpus_file: Path, variables: dict[str, str]
) -> None:
    """The weights of each are those of the run that nothing befell, bit for bit. Needs the tests above, in this process."""
    if not interrupted:
        pytest.skip("nothing was interrupted: run the whole file")
    whole = [Job(tmp_path / kind, faulty(corpus_file, kind)) for kind in STRATEGIES]
    outcomes = trained(tmp_path, [*whole, *(i.job for i in interrupted)], environment=variables)
    assert [o["state"] for ranks in outcomes for o in ranks] == ["done"] * 2 * len(outcomes), outcomes
    expected = {kind: run_in(tmp_path / kind) for kind in STRATEGIES}
    for found in interrupted:
        run, reference = run_in(found.job.runs), expected[found.kind]
        assert list(losses(run)) == list(range(1, 21)), found.name
        assert losses(run) == losses(reference), found.name
        ours, theirs = weights(reference), weights(run)
        assert all(torch.equal(theirs[name], value) for name, value in ours.items()), found.name
        assert not list(run.checkpoints.glob(".*")), f"{found.name}: nothing temporary stays"
