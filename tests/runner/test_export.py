"""One file holds a run: what is read back is what was trained, and nothing damaged or foreign is read in silence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptlab import compose, load, train
from gptlab.config import codec
from gptlab.config.errors import CheckpointError, ConfigError, IOFailure
from gptlab.model.transformer import count_parameters, new_model
from gptlab.runner import checkpoint
from gptlab.runner import export as module
from gptlab.runner.environment import source_hash
from gptlab.runner.export import export, read_export
from gptlab.runner.run import Run
from tests.conftest import MEASURED_AND_SAVED
from tests.tiny import tiny


@pytest.fixture
def run(finished_run: Run) -> Run:
    """A run of this test's own to show, damage or export."""
    return finished_run


def trained(corpus_file: Path, *more: str) -> Run:
    return train(compose(tiny(corpus_file, *MEASURED_AND_SAVED, *more))).run


@pytest.mark.parametrize(
    "more", [(), ("model/head=untied",), ("model.pad_vocab_to=64", "data/tokenizer=byte")], ids=["tied", "untied", "padded"]
)
def test_what_is_read_back_is_the_model_that_was_trained(corpus_file: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    run = trained(corpus_file, *more)
    made = export(run, tmp_path / "out" / "m.safetensors")
    config, tokenizer, weights, metadata = read_export(made.file)
    loaded = load(run)
    assert codec.to_json(config) == codec.to_json(loaded.config)
    assert tokenizer.state() == loaded.tokenizer.state()
    assert tokenizer.encode("the king").tolist() == loaded.tokenizer.encode("the king").tolist()
    expected = loaded.model.state_dict()
    assert weights.keys() == expected.keys(), "a tied matrix stands there once"
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    model = new_model(config.model, tokenizer.vocabulary, seed=1).eval()
    model.load_state_dict(weights)
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens), loaded.model(tokens))
    done = run.read("done.json")
    assert done is not None
    assert made.parameters == count_parameters(model)["total"] == done["summary"]["parameters"]
    assert (made.bytes, made.step, made.loss, made.loss_step) == (made.file.stat().st_size, 12, done["summary"]["val/loss"], 12)
    assert {k: metadata[k] for k in ("step", "identity", "source", "dtype", "format")} == {
        "step": "12", "identity": run.identity, "source": source_hash(), "dtype": "fp32", "format": "pt",
    }  # fmt: skip
    assert float(metadata["val/loss"]) == made.loss
    assert metadata["gptlab"] == (run.read("environment.json") or {})["packages"]["gptlab"]
    assert list((tmp_path / "out").iterdir()) == [made.file], "nothing temporary stays"
    assert load_file(made.file).keys() == expected.keys(), "and any reader of safetensors opens it"


def test_the_checkpoint_that_was_asked_for_is_written_with_the_loss_measured_by_then(run: Run, tmp_path: Path) -> None:
    losses = {int(m["step"]): m["val/loss"] for m in run.metrics() if "val/loss" in m}
    for which, step in (
        ("latest", 12),
        ("12", 12),
        ("8", 8),
        (str(run.checkpoints / "step-000000008"), 8),
        ("best", min(losses, key=losses.__getitem__)),
    ):
        made = export(run, tmp_path / "m.safetensors", which=which, force=True)
        weights = read_export(made.file)[2]
        assert made.step == step
        assert made.loss == losses[step]
        expected = checkpoint.load_model(run.checkpoints / checkpoint.checkpoint_name(step))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    run.metrics_file.unlink()
    made = export(run, tmp_path / "m.safetensors", force=True)
    assert (made.loss, made.loss_step) == (None, None)
    assert "val/loss" not in read_export(made.file)[3]


def test_a_loss_measured_before_the_step_is_told_with_its_own_step(corpus_file: Path, tmp_path: Path) -> None:
    run = trained(corpus_file, "callbacks.checkpoint.every=5", "callbacks.evaluation.every=4")
    made = export(run, tmp_path / "m.safetensors", which="10")
    assert (made.step, made.loss_step) == (10, 8)
    assert read_export(made.file)[3]["val/step"] == "8"


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_once_to_the_dtype(run: Run, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    weights = read_export(export(run, tmp_path / "m.safetensors", dtype=dtype).file)[2]
    exact = checkpoint.load_model(run.checkpoints / "step-000000012")
    for name, weight in weights.items():
        assert weight.dtype == kind
        assert torch.equal(weight, exact[name].to(kind)), name


def test_what_fp16_cannot_hold_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = checkpoint.load_model

    def large(folder: Path) -> dict[str, torch.Tensor]:
        return {name: weight * 1e7 for name, weight in plain(folder).items()}

    monkeypatch.setattr(checkpoint, "load_model", large)
    with pytest.raises(ConfigError, match=r"--dtype fp16: .* holds values beyond 65,504"):
        export(run, tmp_path / "m.safetensors", dtype="fp16")
    export(run, tmp_path / "m.safetensors", dtype="bf16")


def test_a_failed_write_keeps_the_old_file_and_says_what_is_needed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = export(run, tmp_path / "m.safetensors").file
    before = file.read_bytes()

    def full(weights: dict[str, torch.Tensor], partial: Path, metadata: dict[str, str]) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    needed = sum(w.numel() * 4 for w in checkpoint.load_model(run.checkpoints / "step-000000012").values())
    with pytest.raises(IOFailure, match=rf"No space left on device\); it needs {needed:,} bytes"):
        export(run, file, force=True)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["m.safetensors"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(IOFailure, match="could not be written"):
        export(run, tmp_path / "file" / "m.safetensors")


def test_a_checkpoint_that_does_not_fit_its_config_is_not_exported(run: Run, tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((run.directory / "config.json").read_text())
    config["config"]["model"]["width"] = 32
    run.write("config.json", config)
    with pytest.raises(CheckpointError, match=r"step-000000012 does not fit its config\.json"):
        export(run, tmp_path / "m.safetensors")
    (run.directory / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        export(run, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_no_bit_of_an_export_can_flip_unseen(run: Run, tmp_path: Path) -> None:
    file = export(run, tmp_path / "m.safetensors").file
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    places = {*range(0, header, 23), *range(8), header - 1, header, len(whole) - 1, *range(header, len(whole), 401)}
    for place in sorted(places):
        for bit in (1, 32):
            content = bytearray(whole)
            content[place] ^= bit
            file.write_bytes(content)
            with pytest.raises(CheckpointError, match=r"m\.safetensors"):
                read_export(file)
    file.write_bytes(whole)
    read_export(file)


def _cut(share: float) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, int(file.stat().st_size * share))


def _foreign(file: Path) -> None:
    save_file({"weight": torch.zeros(2)}, file)


def _newer(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata=metadata | {module.MARK: "9"})


def _lacking(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["tokenizer"]
    save_file(load_file(file), file, metadata=metadata)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut(0), "is no safetensors file, or damaged"),
        (_cut(0.5), "is no safetensors file, or damaged"),
        (_cut(0.99), "is no safetensors file, or damaged"),
        (lambda file: file.write_text("hello " * 100), "is no safetensors file, or damaged"),
        (Path.unlink, "there is no file"),
        (_foreign, "none that `gptlab export` wrote"),
        (_newer, "export version '9'; this gptlab reads version 1"),
        (_lacking, "its header lacks tokenizer"),
    ],
    ids=["0%", "50%", "99%", "text", "gone", "foreign", "newer", "lacking"],
)
def test_what_is_no_export_of_ours_is_told(run: Run, tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    file = export(run, tmp_path / "m.safetensors").file
    damage(file)
    with pytest.raises(CheckpointError, match=said):
        read_export(file)


def test_a_component_that_is_not_registered_here_is_told(run: Run, tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((run.directory / "config.json").read_text())
    file = export(run, tmp_path / "m.safetensors").file
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    config["config"]["model"]["norm"] = {"name": "theirnorm"}
    metadata["config"] = json.dumps(config)
    weights = load_file(file)
    metadata[module.HASH] = module._digest(metadata, weights)
    save_file(weights, file, metadata=metadata)
    with pytest.raises(ConfigError, match="model/norm=theirnorm is not registered"):
        read_export(file)
