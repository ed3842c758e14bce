"""`gptlab data show`: the rows it prints are those that training takes, and what cannot be shown is told in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab import compose
from gptlab.config import codec
from gptlab.config.resolve import resolve
from gptlab.data.loader import Batch, Loader
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared, preparer
from gptlab.data.sources import training_rows
from gptlab.hardware.device import machine
from gptlab.runner import checkpoint
from gptlab.runner.passed import note_passed
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from tests.cli.conftest import Command, Result
from tests.conftest import sentences
from tests.data.conftest import hub  # noqa: F401
from tests.stand_ins.hub_server import Server, write_repository
from tests.tiny import tiny


def begun(tmp_path: Path, overrides: list[str]) -> Run:
    """A run as training leaves it before its first step."""
    config = resolve(compose(overrides), machine())
    data = prepare(config.data)
    run = Run(tmp_path / "runs" / "default" / "base-0123456789")
    run.directory.mkdir(parents=True)
    run.write("config.json", codec.to_json(config))
    run.write("data.json", {"folder": str(data.folder), "hash": data.hash})
    return run


def documents(file: Path, count: int = 60) -> Path:
    file.write_text("\n".join(json.dumps({"text": sentences(n % 3 + 1, seed=n)}) for n in range(count)))
    return file


def mix(tmp_path: Path) -> list[str]:
    (tmp_path / "b.txt").write_text(sentences(100, seed=9))
    parts = {"one": documents(tmp_path / "a.jsonl"), "two": tmp_path / "b.txt"}
    chosen = [f"+data/corpus@data.corpus.sources.{name}=text" for name in parts]
    return ["data=mix", "data/tokenizer=byte", *chosen, *(f"data.corpus.sources.{name}.path={file}" for name, file in parts.items())]


def settings(kind: str, tmp_path: Path, corpus_file: Path) -> list[str]:
    own = {
        "concatenate": lambda: tiny(documents(tmp_path / "a.jsonl"), "data/tokenizer=byte"),
        "best_fit": lambda: tiny(documents(tmp_path / "a.jsonl"), "data/tokenizer=byte", "data.packing=best_fit"),
        "characters": lambda: tiny(corpus_file),
        "mix": lambda: [*tiny(corpus_file)[3:], *mix(tmp_path)],
        "task": lambda: [*tiny(corpus_file)[3:], "data=copy", "data/tokenizer=char", "model.context_length=32"],
    }
    return [*own[kind](), "trainer.budget=300steps", "seed=3"]


def shown(gptlab: Command, *arguments: str) -> dict[str, Any]:
    result = gptlab("data", "show", "latest", "--json", *arguments)
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def told(result: Result, code: int, *parts: str) -> None:
    """One line on standard error, the right code, and each part in the line."""
    assert result.code == code, result.err
    assert "Traceback" not in result.out + result.err
    (line,) = result.err.strip().splitlines()
    for part in parts:
        assert part in line, line


def same(found: dict[str, Any], batch: Batch) -> None:
    """The rows that were shown are the batch: its inputs, its targets, what of them is scored."""
    tokens = np.array([row["tokens"] for row in found["rows"]])
    assert np.array_equal(tokens[:, :-1], batch.inputs.numpy())
    assert np.array_equal(tokens[:, 1:], batch.targets.numpy())
    if batch.weight is not None:
        assert np.array_equal([row["scored"] for row in found["rows"]], batch.weight.numpy() > 0)


@pytest.mark.parametrize("kind", ["concatenate", "best_fit", "characters", "mix", "task"])
def test_the_rows_of_a_step_are_those_of_the_loader(gptlab: Command, tmp_path: Path, corpus_file: Path, kind: str) -> None:
    run = begun(tmp_path, settings(kind, tmp_path, corpus_file))
    config = run.config()
    data = prepare(config.data)
    context = config.model.context_length
    rows = int(config.trainer.batch_tokens) // context
    loader = Loader(training_rows(data, context, config.data.packing, int(config.seeds.data or 0)), rows, documents=True)
    for step in (1, 2, 64, 65, 300):  # of several blocks and, where the text is short, of several epochs
        found = shown(gptlab, "--step", str(step), "--tokens")
        batch = loader.batch(step - 1)
        assert (found["step"], found["batch"], found["rows_of_batch"], len(found["rows"])) == (step, step - 1, rows, rows)
        assert [row["row"] for row in found["rows"]] == list(range((step - 1) * rows, step * rows))
        same(found, batch)
        assert batch.document is not None
        for row, tokens, document in zip(found["rows"], batch.inputs.tolist(), batch.document.tolist(), strict=True):
            assert len(row["documents"]) == len(set(document))
            assert "".join(row["documents"]) == data.tokenizer.decode(tokens)
            assert row["source"] in (data.parts or {data.manifest["corpus"]: data})


def test_the_rows_of_a_step_are_those_a_run_was_trained_on_also_past_a_batch(
    gptlab: Command, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Batch] = []
    plain = Trainer.train_step

    def note(trainer: Trainer, batch: Batch) -> Any:
        taken.append(batch)
        return plain(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", note)
    overrides = tiny(corpus_file, "callbacks.checkpoint.every=4", "callbacks.checkpoint.best=false")
    assert gptlab("train", *overrides).code == 0
    run = Run(next((tmp_path / "runs").glob("*/*/done.json")).parent)
    assert len(taken) == 12
    for step in (1, 12):
        same(shown(gptlab, "--step", str(step), "--tokens"), taken[step - 1])
    (run.directory / "done.json").unlink()
    shutil.rmtree(run.checkpoints / checkpoint.checkpoint_name(12))
    note_passed(run, 9, 10, "the loss is nan")
    taken.clear()
    assert gptlab("train", *overrides).code == 0
    assert len(taken) == 4, "the steps 9 to 12"
    for step in range(9, 13):
        found = shown(gptlab, "--step", str(step), "--tokens")
        same(found, taken[step - 9])
        assert found["batch"] == step - 1 + (step >= 10)
        assert [line["batch"] for line in found["passed"]] == ([9] if step == 10 else [])


def test_a_step_that_passed_a_batch_over_says_so_and_the_batch_can_be_shown(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    run = begun(tmp_path, tiny(corpus_file))
    before = shown(gptlab, "--step", "6")
    for _ in range(2):  # a run that resumes may come upon it again
        note_passed(run, 5, 6, "the loss is nan")
    after = gptlab("data", "show", "latest", "--step", "6")
    assert "step 6 of 12: batch 6, rows 24 to 27 of 16 tokens" in after.out
    assert after.out.count("passed over at this step: batch 5 (the loss is nan); --batch 5 shows it") == 1
    assert "passed over" not in gptlab("data", "show", "latest", "--step", "7").out
    batch = gptlab("data", "show", "latest", "--batch", "5")
    assert "no step takes this batch" in batch.out
    assert shown(gptlab, "--batch", "5")["rows"] == before["rows"]
    assert shown(gptlab, "--batch", "12")["rows"] == shown(gptlab, "--step", "12")["rows"]
    told(gptlab("data", "show", "latest", "--batch", "13"), 2, "--batch 13", "the batches 0 to 12")
    told(gptlab("data", "show", "latest", "--batch", "-1"), 2, "--batch -1", "the batches 0 to 12")


def test_rows_are_printed_with_their_number_documents_and_source(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    run = begun(tmp_path, [*settings("mix", tmp_path, corpus_file), "model.context_length=64", "trainer.batch_tokens=512"])
    found = shown(gptlab, "--step", "3")
    printed = gptlab("data", "show", "latest", "--step", "3").out
    assert "step 3 of 300: batch 2, rows 16 to 23 of 64 tokens" in printed
    for row in found["rows"]:
        count = len(row["documents"])
        assert f"{row['row']} {row['source']}  {count} document{'s' * (count > 1)}\n" in printed
        assert "⏎".join(row["documents"]) in printed, "the whole of it"
    assert {len(row["documents"]) > 1 for row in found["rows"]} == {True, False}
    less = gptlab("data", "show", "latest", "--step", "3", "--rows", "2").out
    assert "the first 2 of them" in less
    assert "17 " in less
    assert "\n18 " not in less
    ids = gptlab("data", "show", "latest", "--step", "3", "--rows", "1", "--tokens").out
    tokens = shown(gptlab, "--step", "3", "--rows", "1", "--tokens")["rows"][0]["tokens"]
    assert " ".join(map(str, tokens)) in " ".join(ids.replace("⏎", " ").split())
    assert "│" in ids
    assert run.state == "new"


def test_of_a_task_what_is_scored_is_marked(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    run = begun(tmp_path, settings("task", tmp_path, corpus_file))
    printed = gptlab("data", "show", "latest", "--step", "2").out.splitlines()
    data = prepare(run.config().data)
    for row in shown(gptlab, "--step", "2", "--tokens")["rows"]:
        place = printed.index("  " + data.tokenizer.decode(row["tokens"]))
        marks = printed[place + 1].ljust(3 + len(row["scored"]))[3:]
        assert [mark == "^" for mark in marks] == row["scored"]
        assert any(row["scored"])


@pytest.mark.parametrize("budget", ["17steps", "3ktokens", "2epochs", "0.5x", "1e7flops"])
def test_a_step_beyond_the_budget_is_refused_with_the_range(gptlab: Command, corpus_file: Path, tmp_path: Path, budget: str) -> None:
    run = begun(tmp_path, tiny(corpus_file, f"trainer.budget={budget}"))
    config = run.config()
    last = Trainer(config, prepare(config.data), run).steps
    assert last is not None
    for step in (0, -1, last + 1):
        told(gptlab("data", "show", "latest", "--step", str(step)), 2, f"--step {step}:", f"the steps 1 to {last:,} ")
    assert shown(gptlab, "--step", str(last))["step"] == last


def test_a_run_by_the_clock_has_the_steps_it_has_come_to(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    run = begun(tmp_path, tiny(corpus_file, "trainer.budget=1min"))
    told(gptlab("data", "show", "latest", "--step", "1"), 2, "has come to no step yet", "trainer.budget=1min")
    run.metrics_file.write_text('{"step": 7}\n')
    told(gptlab("data", "show", "latest", "--step", "8"), 2, "the steps 1 to 7 ")
    assert len(shown(gptlab, "--step", "7")["rows"]) == 4


def test_a_text_that_has_changed_or_gone_is_told(gptlab: Command, tmp_path: Path, empty_home: Path) -> None:
    file = documents(tmp_path / "own.jsonl")
    run = begun(tmp_path, tiny(file))
    shutil.rmtree(empty_home)
    assert gptlab("data", "show", "latest", "--step", "1").code == 0, "it is prepared again"
    documents(file, 61)
    os.utime(file, (1, 1))
    told(gptlab("data", "show", "latest", "--step", "1"), 3, run.directory.name, "the text has changed since")
    file.unlink()
    told(gptlab("data", "show", "latest", "--step", "1"), 2, "there is no such file")
    (run.directory / "data.json").unlink()
    documents(file)
    told(gptlab("data", "show", "latest", "--step", "1"), 3, "data.json cannot be read")


def test_wrong_arguments_are_told(gptlab: Command, corpus_file: Path, tmp_path: Path) -> None:
    told(gptlab("data", "show", "nosuch", "--step", "1"), 2, "there are no runs")
    run = begun(tmp_path, tiny(corpus_file))
    told(gptlab("data", "show", "nosuch", "--step", "1"), 2, "no run matches 'nosuch'")
    for arguments in ((), ("--step", "1", "--batch", "1")):
        told(gptlab("data", "show", "latest", *arguments), 2, "--step S, from 1, or --batch N, from 0: one of the two")
    for arguments in (("--rows", "0"), ("--step", "x")):
        assert gptlab("data", "show", "latest", *arguments).code == 2
    (run.directory / "config.json").write_text("{")
    told(gptlab("data", "show", "latest", "--step", "1"), 2, "no readable config.json")


def test_a_stream_stops_growing_when_its_rows_are_shown(
    gptlab: Command,
    hub: Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.publish("owner/set", write_repository(tmp_path / "r", {"default": {"train": [sentences(5, seed=n) for n in range(60)]}}, files=1))
    stream = ["data=hub", "data.corpus.dataset=owner/set", "data.corpus.held_out=1k", "data/tokenizer=byte", "data.corpus.tokens=6k"]
    run = begun(tmp_path, [*tiny(tmp_path)[3:], *stream])
    config = run.config()
    data = prepare(config.data)
    loader = Loader(training_rows(data, 16, "concatenate", 0), 4)
    closed: list[Path] = []
    plain = Prepared.close

    def close(prepared: Prepared) -> None:
        closed.append(prepared.folder)
        plain(prepared)

    monkeypatch.setattr(Prepared, "close", close)
    same(shown(gptlab, "--step", "9", "--tokens"), loader.batch(8))
    told(gptlab("data", "show", "latest", "--step", "99"), 2, "1 to 12")
    assert closed == [data.folder] * 2, "also when the step is refused"
    assert preparer(data.folder) is None
