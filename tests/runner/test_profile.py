"""`trainer.profile`: the steps that were asked for, in files that can be read, and not one number of the training changed."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab import compose, train
from gptlab.config.errors import ConfigError, DivergedError
from gptlab.runner import profile
from gptlab.runner.profile import BETWEEN, Profile, memory, own_time, table
from gptlab.runner.run import Run
from gptlab.runner.timeline import Held, Span, draw
from tests.faulty import faults, weights_hash
from tests.tiny import tiny

EVALUATED = "callbacks.evaluation.every=1"  # between any two steps


@pytest.fixture(scope="module")
def profiled(corpus_file: Path, home_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run whose steps 5 to 7 are profiled, measured after each; and what it said."""
    folder = tmp_path_factory.mktemp("profiled")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_HOME", str(home_folder))
        patch.setenv("GPTLAB_RUNS", str(folder))
        patch.setattr(profile, "ROWS", 1000)  # whichever operators were slow this time
        patch.setattr(profile, "say", lambda *parts: said.append("".join(p if isinstance(p, str) else p[0] for p in parts)))
        run = train(compose(tiny(corpus_file, "model.dropout=0.2", "hardware.micro_batch=2", EVALUATED, "trainer.profile=5-7"))).run
    return run, "\n".join(said)


def events(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run.directory / "profile" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    return found


def test_profiling_changes_neither_a_number_nor_the_identity_nor_the_name(profiled: tuple[Run, str], corpus_file: Path) -> None:
    run, _ = profiled
    plain = train(compose(tiny(corpus_file, "model.dropout=0.2", "hardware.micro_batch=2", EVALUATED))).run
    assert plain.directory.name == run.directory.name
    assert weights_hash(plain) == weights_hash(run)
    assert [m.get("train/loss") for m in plain.metrics()] == [m.get("train/loss") for m in run.metrics()]


def test_the_trace_holds_the_steps_that_were_asked_for(profiled: tuple[Run, str]) -> None:
    steps = [e["name"] for e in events(profiled[0]) if e.get("cat") == "user_annotation" and e["name"].startswith("step ")]
    assert steps == ["step 5", "step 6", "step 7"]
    assert any(e["name"] == "aten::mm" for e in events(profiled[0]))


def test_one_line_says_where_it_is_what_it_cost_and_what_takes_longest(profiled: tuple[Run, str]) -> None:
    run, said = profiled
    assert said.count("\n") == 0
    assert f"steps 5 to 7 in {run.directory / 'profile'};" in said
    assert re.search(r"\d+\.\d ms a step while recording, \d+\.\d ms before; most of it in \S.* \d+%, \S.* \d+%, \S.* \d+%$", said)


def _rows(run: Run) -> dict[str, tuple[float, float, float]]:
    """Of the table by name: milliseconds a step, share in percent, calls a step."""
    text = (run.directory / "profile" / "operators.txt").read_text(encoding="utf-8")
    found = re.findall(r"^ +([\d.]+) +([\d.]+)% +([\d.]*)  (.+)$", text, re.MULTILINE)
    return {name: (float(a), float(b), float(c or 0)) for a, b, c, name in found}


def test_the_table_is_of_the_training_steps_alone(profiled: tuple[Run, str]) -> None:
    rows = _rows(profiled[0])
    # two micro-batches a step look up tokens and positions; the evaluations between the steps are in the trace, and not counted
    assert rows["aten::embedding"][2] == 4
    assert len([e for e in events(profiled[0]) if e["name"] == "aten::embedding"]) > 3 * 4
    assert rows[BETWEEN][2] == 1
    shares = [share for _, share, _ in rows.values()]
    assert sum(shares) == pytest.approx(100, abs=3), "everything in a step is in the table once"
    assert [ms for ms, _, _ in list(rows.values())[:-1]] == sorted((ms for ms, _, _ in list(rows.values())[:-1]), reverse=True)


def test_the_memory_timeline_adds_up_and_ends_where_it_began(profiled: tuple[Run, str]) -> None:
    folder = profiled[0].directory / "profile"
    with (folder / "memory.csv").open(encoding="utf-8") as opened:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(opened)]
    assert len(rows) > 100
    held = 0.0
    for before, row in zip([{"milliseconds": -1e9}, *rows], rows, strict=False):
        held += row["change_bytes"]
        assert held == row["held_bytes"]
        assert row["milliseconds"] >= before["milliseconds"]
    parameters = 3632 * 4
    assert max(row["held_bytes"] for row in rows) > parameters, "at least the gradients"
    assert abs(rows[-1]["held_bytes"]) < parameters, "and they are freed"
    assert (folder / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_large_trace_is_compressed(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "PLAIN_BYTES", 1000)
    run = train(compose(tiny(corpus_file, "trainer.profile=2", steps=2))).run
    folder = run.directory / "profile"
    assert sorted(f.name for f in folder.iterdir()) == ["memory.csv", "memory.png", "operators.txt", "trace.json.gz"]
    assert json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    monkeypatch.setattr(profile, "PLAIN_BYTES", 10**9)
    train(compose(tiny(corpus_file, "trainer.profile=1", steps=2)), rerun=True)
    assert sorted(f.name for f in folder.iterdir()) == ["memory.csv", "memory.png", "operators.txt", "trace.json"]
    assert "before" not in (folder / "operators.txt").read_text(encoding="utf-8"), "nothing came before the first step"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("0", "names no step"),
        ("5-3", "names no step"),
        ("abc", "names no step"),
        ("-3", "names no step"),
        ("5-", "names no step"),
        ("2.5", "names no step"),
        ("1-101", "is 101 steps; 100 are the most"),
        ("13", "the run has 12 steps"),
        ("10-20", "the run has 12 steps"),
    ],
)
def test_what_names_no_step_of_the_run_is_refused(corpus_file: Path, asked: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        train(compose(tiny(corpus_file, f"trainer.profile='{asked}'")))
    assert f"trainer.profile={asked}" in str(error.value)
    assert said in str(error.value)
    assert error.value.code == 2


def test_a_session_that_ends_early_writes_what_there_is_or_says_that_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps, made in ((3, True), (1, False)):
        folder = tmp_path / str(steps)
        profiler = Profile("2-9", folder, torch.device("cpu"), None)
        with profiler.session():
            for _ in range(steps):
                with profiler:
                    torch.ones(4, 4) @ torch.ones(4, 4)
        assert (folder / "trace.json").exists() == made
        said = " ".join(capsys.readouterr().out.split())
        assert ("steps 2 to 3 in" if made else "nothing was recorded; the session ended after its step 1") in said


def test_a_step_that_fails_leaves_no_profiler_running(corpus_file: Path) -> None:
    with faults(), pytest.raises(DivergedError):
        train(compose(tiny(corpus_file, "+callback@callbacks.fault=poison", "callbacks.fault.batches=[3]", "trainer.profile=3-9")))
    assert not torch.autograd._profiler_enabled()


def test_own_time_is_what_nothing_called_within_took() -> None:
    here, there = (1, 1), (1, 2)
    spans = [
        Span("step 3", here, 0, 100), Span("a", here, 10, 40), Span("b", here, 15, 10), Span("b", here, 30, 5), Span("a", here, 60, 20),
        Span("b", there, 12, 30),
    ]  # fmt: skip
    own = own_time(spans)
    assert own == {BETWEEN: (40, 1), "a": (45, 2), "b": (45, 3)}
    assert "    0.045   45.0%           3.0  b" in table("x", own, spans[:1])


def test_memory_of_a_gpu_is_absolute_and_of_the_cpu_what_came_after() -> None:
    def event(ts: float, change: int, total: int, kind: int) -> dict[str, Any]:
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": change, "Total Allocated": total, "Device Type": kind, "Ev Idx": 0}}

    found = [event(2, -4, 1006, 1), event(1, 10, 1010, 1), event(1, 8, 58, 0)]
    assert [h.total for h in memory(found, 1)] == [1010, 1006]
    assert [h.total for h in memory(found, 0)] == [8]
    assert memory([], 0) == []


def test_a_picture_of_no_phases_is_drawn_all_the_same(tmp_path: Path) -> None:
    draw(tmp_path / "memory.png", [Held(1, 8, 8), Held(5, -8, 0)], [Span("step 1", (1, 1), 0, 10)], [], absolute=True)
    assert (tmp_path / "memory.png").stat().st_size > 1000


@pytest.mark.gpu
def test_a_gpu_s_kernels_and_memory_are_in_the_profile(corpus_file: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    more = ("hardware.device=cuda", "trainer.profile=5-7", *(f"+callback@callbacks.{n}={n}" for n in ("norms", "activations", "attention")))
    run = train(compose(tiny(corpus_file, *more))).run
    text = (run.directory / "profile" / "operators.txt").read_text(encoding="utf-8")
    assert "kernels on the GPU" in text
    assert re.search(r"the GPU busy in \d+%", text)
    assert (run.directory / "profile" / "memory.png").exists()
