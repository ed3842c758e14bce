"""`gptlab runs` and `gptlab export`: what is listed, what is found damaged, what is brought back, what is written to one file."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptlab import load
from gptlab.runner import checkpoint
from gptlab.runner.export import read_export
from gptlab.runner.run import Run, all_runs, locked
from tests.cli.conftest import Command, Result
from tests.conftest import MEASURED_AND_SAVED
from tests.tiny import tiny

FILES = ("manifest.json", "model.safetensors", "state.json", "state.safetensors")


@pytest.fixture
def run(finished_run: Run) -> Run:
    """A run of this test's own to show, damage or export."""
    return finished_run


def told(result: Result, code: int, *parts: str) -> str:
    """What is wrong, after checking the code, that it is one line on standard error, and that it names each part."""
    assert result.code == code, result.err
    assert "Traceback" not in result.out + result.err
    (line,) = result.err.strip().splitlines()
    for part in parts:
        assert part in line, line
    return line


# List, show, remove


def test_runs_are_listed_shown_and_removed(gptlab: Command, run: Run) -> None:
    listed = gptlab("runs", "list")
    assert run.identity in listed.out
    assert "done" in listed.out
    assert "checkpoint" not in listed.out, "of a run that is done nobody asks where it would resume"
    assert run.identity in gptlab("runs", "list", "shown").out
    assert gptlab("runs", "list", "shwn").code == 2
    shown = gptlab("runs", "show", run.identity[:6])
    assert "model/norm" in shown.out
    assert "val/loss" in shown.out
    assert gptlab("runs", "rm", run.identity, "--yes").code == 0
    assert gptlab("runs", "show", run.identity).code == 2
    assert "no runs yet" in gptlab("runs", "list").out


def test_a_folder_that_is_no_run_of_ours_is_never_deleted(gptlab: Command, run: Run, tmp_path: Path) -> None:
    stranger = tmp_path / "models" / "gpt2"
    stranger.mkdir(parents=True)
    (stranger / "config.json").write_text("{}")
    (tmp_path / "models" / "weights.bin").write_text("w")
    assert gptlab("runs", "rm", str(stranger), "--yes").code == 2
    copy = tmp_path / "models" / run.directory.name
    shutil.copytree(run.directory, copy)
    refused = gptlab("runs", "rm", str(copy), "--yes")
    assert refused.code == 2
    assert "does not lie in a study below" in refused.err
    assert (tmp_path / "models" / "weights.bin").exists()
    assert copy.exists()


def test_removing_a_studys_last_own_run_keeps_what_it_shares(gptlab: Command, run: Run, corpus_file: Path) -> None:
    for seed in ("0", "1"):
        gptlab("train", *tiny(corpus_file, *MEASURED_AND_SAVED, "study=other", f"seed={seed}"))
    own = next((Path(os.environ["GPTLAB_RUNS"]) / "other").glob("*/done.json")).parent.name.rpartition("-")[2]
    assert gptlab("runs", "rm", own, "--yes").code == 0
    assert json.loads(gptlab("compare", "other", "--json").out)["rows"][0]["seeds"] == [0]


def test_two_runs_are_told_apart(gptlab: Command, run: Run, corpus_file: Path) -> None:
    gptlab("train", *tiny(corpus_file, *MEASURED_AND_SAVED, "model/norm=rmsnorm"))
    other = next(r for r in all_runs() if r.identity != run.identity)
    shown = gptlab("runs", "diff", run.identity, other.identity)
    assert shown.code == 0, shown.err
    assert re.search(r"model/norm +layernorm +rmsnorm", shown.out)
    assert "val/loss" in shown.out
    assert "model.width" not in shown.out
    told_ = json.loads(gptlab("runs", "diff", run.identity, other.identity, "--json").out)
    assert told_["settings"] == {"model/norm": ["layernorm", "rmsnorm"], "model.norm.eps": [1e-5, 1e-6]}
    assert told_["made by"] == {}
    ours, theirs = ((r.read("done.json") or {})["summary"]["val/loss"] for r in (run, other))
    assert told_["metrics"]["val/loss"] == [ours, theirs]
    assert "they are one run" in gptlab("runs", "diff", run.identity, run.identity).out
    told(gptlab("runs", "diff", run.identity, "nobody"), 2, "no run matches 'nobody'")


def test_garbage_is_what_nobody_needs_and_is_asked_for_before_it_goes(gptlab: Command, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing to delete" in gptlab("runs", "gc").out
    half = run.checkpoints / ".step-000000099.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    lost = Run(run.directory.with_name("lost-0123456789"))
    lost.directory.mkdir()
    shutil.copy(run.directory / "config.json", lost.directory)
    lost.write("failed.json", {"code": 4, "message": "the loss is nan at step 3", "time": "now"})
    before = [c.name for c in checkpoint.checkpoints(run.checkpoints)]
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    kept = gptlab("runs", "gc")
    assert kept.code == 0, kept.err
    assert "kept" in kept.out
    assert "half-made" in kept.out
    assert "the loss is nan" in " ".join(kept.out.split())
    assert half.exists()
    assert lost.directory.exists()
    with locked(lost):
        gptlab("runs", "gc", "--yes")
        assert lost.directory.exists(), "somebody trains it"
    assert not half.exists()
    gptlab("runs", "gc", "--yes")
    assert not lost.directory.exists()
    assert [c.name for c in checkpoint.checkpoints(run.checkpoints)] == before
    assert gptlab("runs", "verify", run.identity).code == 0


def test_old_checkpoints_of_a_done_run_go_when_asked_for(gptlab: Command, run: Run) -> None:
    newest, best = checkpoint.newest_good(run.checkpoints), checkpoint.best_of(run.checkpoints)
    assert len(checkpoint.checkpoints(run.checkpoints)) > len({newest, best})
    assert gptlab("runs", "gc", "--checkpoints", "--yes").code == 0
    assert set(checkpoint.checkpoints(run.checkpoints)) == {c for c in (newest, best) if c is not None}
    assert "nothing to delete" in gptlab("runs", "gc", "--checkpoints").out


def test_a_diverged_run_is_listed_with_its_reason(gptlab: Command, corpus_file: Path) -> None:
    gptlab("train", *tiny(corpus_file, "study=nan", "optimizer.learning_rate=1e30", "callbacks.evaluation.every=1", steps=6))
    listed = gptlab("runs", "list")
    assert listed.code == 0, listed.err
    assert "failed" in listed.out
    assert "exit 4: " in listed.out


def test_a_run_that_can_resume_is_listed_with_the_step_of_its_newest_checkpoint(gptlab: Command, run: Run) -> None:
    (run.directory / "done.json").unlink()
    shutil.rmtree(run.checkpoints / "step-000000012")
    assert _row(gptlab("runs", "list"), run)[-7:-3] == ["stopped", "12", "step", "8"]
    run.write("failed.json", {"code": 4, "message": "the loss is nan", "time": "then"})
    failed = gptlab("runs", "list")
    assert _row(failed, run)[-7:-3] == ["failed", "12", "step", "8"]
    assert f"{run.identity} exit 4: the loss is nan" in failed.out
    shutil.rmtree(run.checkpoints)
    assert _row(gptlab("runs", "list"), run)[-6:-3] == ["failed", "12", "none"]


def _row(result: Result, run: Run) -> list[str]:
    assert result.code == 0, result.err
    return next(line.split() for line in result.out.splitlines() if line.strip().startswith(run.identity))


# Verify


def test_verify_names_what_is_whole(gptlab: Command, run: Run) -> None:
    found = gptlab("runs", "verify", run.identity)
    assert found.code == 0, found.err
    for name in ("step-000000012", "step-000000008", "config.json", "tokenizer.json", "metrics.jsonl"):
        assert name in found.out
    assert found.out.count("whole") == 3
    assert "✓ 2 checkpoints, whole; the newest is of step 12" in found.out
    assert "note" not in found.out
    as_json = json.loads(gptlab("runs", "verify", "latest", "--json").out)
    assert as_json["whole"] is True
    assert as_json["newest_whole"] == "step-000000012"
    assert [(c["step"], c["files"], c["problem"], c["unknown"]) for c in as_json["checkpoints"]] == [(12, 4, None, []), (8, 4, None, [])]
    sizes = [sum(f.stat().st_size for f in d.iterdir()) for d in checkpoint.checkpoints(run.checkpoints)]
    assert [c["bytes"] for c in as_json["checkpoints"]] == sizes
    told(gptlab("runs", "verify", "nosuch"), 2, "no run matches 'nosuch'")


def _cut_to(share: float) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, int(file.stat().st_size * share))


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut_to(0), _cut_to(0.5), _cut_to(0.99), _flip, Path.unlink], ids=["0%", "50%", "99%", "bit", "gone"])
def test_verify_names_the_damaged_checkpoint_and_what_resume_takes(gptlab: Command, run: Run, damage: Callable[[Path], None]) -> None:
    newest = run.checkpoints / "step-000000012"
    for name in FILES:
        before = (newest / name).read_bytes()
        damage(newest / name)
        line = told(gptlab("runs", "verify", "latest"), 5, "step-000000012 is damaged: ", "resume, sample and export take step-000000008")
        assert name == "manifest.json" or name in line
        (newest / name).write_bytes(before)
    assert gptlab("runs", "verify", "latest").code == 0


def test_verify_names_every_damaged_checkpoint(gptlab: Command, run: Run) -> None:
    _flip(run.checkpoints / "step-000000008" / "state.json")
    line = told(gptlab("runs", "verify", "latest"), 5, "step-000000008 is damaged: state.json", "take step-000000012")
    assert "step-000000012 is damaged" not in line
    _flip(run.checkpoints / "step-000000012" / "model.safetensors")
    found = gptlab("runs", "verify", "latest", "--json")
    told(found, 5, "step-000000008 is damaged", "step-000000012 is damaged: model.safetensors", "with --rerun, starts over")
    as_json = json.loads(found.out)
    assert as_json["whole"] is False
    assert as_json["newest_whole"] is None
    assert ["model.safetensors" in as_json["checkpoints"][0]["problem"], "state.json" in as_json["checkpoints"][1]["problem"]] == [
        True,
        True,
    ]


def test_verify_opens_nothing_by_pickle_and_tells_of_what_was_planted(
    gptlab: Command, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = run.checkpoints / "step-000000012"
    for name in (".metadata", "model.pt"):
        (newest / name).write_bytes(pickle.dumps(_Bomb(str(tmp_path / "exploded"))))
    (newest / "extra").mkdir()
    (newest / "extra" / "state.json").write_text(json.dumps({"_target_": "os.system", "command": f"touch {tmp_path / 'exploded'}"}))
    (run.checkpoints / ".step-000000016.part").mkdir()
    with monkeypatch.context() as patch:
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patch.setattr(module, name, _never)
        found = gptlab("runs", "verify", "latest")
    assert found.code == 0, found.err
    assert "note: step-000000012: not in its manifest, and never read: .metadata, extra/state.json, model.pt" in found.out
    assert "checkpoints/.step-000000016.part: left half-made" in found.out
    assert gptlab("sample", "latest", "--max-tokens", "4").code == 0
    assert not (tmp_path / "exploded").exists()


class _Bomb:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> object:
        return open, (self.file, "w")


def _never(*arguments: object, **named: object) -> object:
    raise AssertionError("something was unpickled")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"version": 1}', '{"version": 7}', b"\xff"])
def test_verify_reads_the_other_files_of_a_run(gptlab: Command, run: Run, content: str | bytes | None) -> None:
    for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
        file, before = run.directory / name, (run.directory / name).read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        if name != "metrics.jsonl" or content in (None, "{", "[]", b"\xff"):
            told(gptlab("runs", "verify", str(run.directory)), 5, f"{name}: ")
        file.write_bytes(before)
    assert gptlab("runs", "verify", "latest").code == 0


def test_a_metrics_line_cut_off_by_a_crash_is_only_noted(gptlab: Command, run: Run) -> None:
    whole = run.metrics_file.read_text()
    run.metrics_file.write_text(whole[:-20])
    told(gptlab("runs", "verify", "latest"), 5, "metrics.jsonl: line ")
    (run.directory / "done.json").unlink()
    found = gptlab("runs", "verify", "latest")
    assert found.code == 0, found.err
    assert "its last line was cut off" in found.out
    lines = whole.splitlines()
    run.metrics_file.write_text("\n".join([lines[0], "{", *lines[1:]]))
    told(gptlab("runs", "verify", "latest"), 5, "metrics.jsonl: line 2 is not JSON")


def test_a_run_without_checkpoints_is_told_unless_it_is_new(gptlab: Command, run: Run) -> None:
    shutil.rmtree(run.checkpoints)
    told(gptlab("runs", "verify", "latest"), 5, "is done and holds no checkpoint")
    (run.directory / "done.json").unlink()
    new = gptlab("runs", "verify", "latest")
    assert new.code == 0, new.err
    assert "no checkpoint yet" in new.out
    with locked(run):
        assert gptlab("runs", "verify", "latest").code == 0, "it is being trained"
    run.write("failed.json", {"code": 1, "message": "m", "time": "t"})
    told(gptlab("runs", "verify", "latest"), 5, "is failed and holds no checkpoint")


# Fetch


def test_a_fetched_run_is_resumed_by_the_same_command(
    gptlab: Command, run: Run, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {k: v.clone() for k, v in checkpoint.load_model(run.checkpoints / "step-000000012").items()}
    (run.directory / "done.json").unlink()
    shutil.rmtree(run.checkpoints / "step-000000012")
    shutil.copytree(run.directory, tmp_path / "mirror" / "shown" / run.directory.name)
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "elsewhere"))
    fetched = gptlab("runs", "fetch", str(tmp_path / "mirror"))
    assert fetched.code == 0, fetched.err
    assert str(tmp_path / "elsewhere" / "shown" / run.directory.name) in fetched.out.replace("\n", "")
    assert "the command that trained it resumes it here" in fetched.out
    resumed = gptlab("train", *tiny(corpus_file, *MEASURED_AND_SAVED))
    assert "resumed at step 8" in resumed.out
    here = tmp_path / "elsewhere" / "shown" / run.directory.name / "checkpoints" / "step-000000012"
    assert all(torch.equal(v, weights[k]) for k, v in checkpoint.load_model(here).items())
    told(gptlab("runs", "fetch", str(tmp_path / "mirror")), 2, "--force")
    told(gptlab("runs", "fetch", str(tmp_path / "nothing")), 2, "holds no run")


# Export, and which checkpoint


def test_export_says_what_it_wrote_and_replaces_nothing_unasked(
    gptlab: Command, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = gptlab("export", run.identity, "--to", "safetensors")
    assert made.code == 0, made.err
    file = tmp_path / f"{run.directory.name}.safetensors"
    done = run.read("done.json")
    assert done is not None
    for said in (file.name, f"{done['summary']['parameters']:,} parameters in fp32", "step 12", f"val {done['summary']['val/loss']:.4f}"):
        assert said in made.out
    told(gptlab("export", run.identity), 2, "is there already; --force replaces it")
    earlier = gptlab("export", run.identity, "--force", "--checkpoint", "8", "--dtype", "bf16")
    assert "parameters in bf16" in earlier.out
    assert "step 8" in earlier.out
    assert read_export(file)[3]["step"] == "8"


def test_wrong_export_settings_are_told(gptlab: Command, run: Run, tmp_path: Path) -> None:
    out = ("--output", str(tmp_path / "out.safetensors"))
    told(gptlab("export", "nosuch", *out), 2, "no run matches 'nosuch'")
    told(gptlab("export", "latest", "--to", "coreml", *out), 2, "--to coreml: there is safetensors, hf, gguf, onnx")
    told(gptlab("export", "latest", "--dtype", "int8", *out), 2, "--dtype int8 is not one of fp32, bf16, fp16")
    told(gptlab("export", "latest", "--output", str(tmp_path)), 2, "is a folder")
    told(gptlab("export", "latest", "--checkpoint", "9", *out), 5, "step 9", "12, 8")
    told(gptlab("export", "latest", "--checkpoint", "newest", *out), 5, "newest", "latest, best")
    _flip(run.checkpoints / "step-000000012" / "model.safetensors")
    told(gptlab("export", "latest", "--checkpoint", "12", *out), 5, "model.safetensors is not the file that was written")
    assert not (tmp_path / "out.safetensors").exists()
    assert "step 8" in gptlab("export", "latest", *out).out, "latest is the newest whole one"


def test_a_sample_is_of_the_checkpoint_that_was_asked_for(gptlab: Command, run: Run) -> None:
    made = {which: gptlab("sample", "latest", "--max-tokens", "20", "--checkpoint", which).out for which in ("latest", "12", "8", "best")}
    assert made["12"] == made["latest"]
    assert made["8"].strip("\n") == load(run, checkpoint="8").sample(max_tokens=20).strip("\n")
    losses = {checkpoint.step_of(c): checkpoint.manifest_of(c)["metrics"]["val/loss"] for c in checkpoint.checkpoints(run.checkpoints)}
    assert made["best"] == made[str(min(losses, key=lambda step: losses[step]))]
    folder = run.checkpoints / "step-000000008"
    assert gptlab("sample", "latest", "--max-tokens", "20", "--checkpoint", str(folder)).out == made["8"]
    told(gptlab("sample", "latest", "--checkpoint", "7"), 5, "step 7", "12, 8")
    _flip(folder / "model.safetensors")
    told(gptlab("sample", "latest", "--checkpoint", "8"), 5, "step-000000008", "model.safetensors")
