"""A run that begins with another's weights: the same model and tokeniser, a training of its own; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptlab import compose, load, train
from gptlab.cli.train import train as command
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.runner.run import Run, all_runs, find_run
from tests.tiny import tiny

PARTS = ("model/norm=rmsnorm", "model/position=learned", "model.attention.kv_heads=1", "study=parents")


@pytest.fixture
def parent(corpus_file: Path) -> Run:
    return train(compose(tiny(corpus_file, *PARTS))).run


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another text, of the same letters."""
    file = tmp_path / "other.txt"
    file.write_text("the great stone under a table reads and the queen sings over the night. " * 200)
    return file


def child(text: Path, parent: Run, *more: str, budget: str = "2steps") -> list[str]:
    settings = ["data=text", f"data.corpus.path={text}", "tracker=none", "trainer.batch_tokens=64", "callbacks.samples.tokens=4"]
    return [*settings, f"trainer.init_from={parent.identity}", f"trainer.budget={budget}", *more]


def test_a_run_begins_with_the_weights_of_another(parent: Run, other: Path) -> None:
    theirs = load(parent)
    made = train(compose(child(other, parent, "optimizer.learning_rate=0", "optimizer.weight_decay=0"))).run
    ours = load(made)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True))
    assert ours.tokenizer.state() == theirs.tokenizer.state()
    assert component_of(ours.config.model.norm).name == "rmsnorm", "its model, without a word about it"
    assert ours.config.trainer.init_from == f"{parent.identity}@12"
    assert made.read("parent.json") == {"run": parent.identity, "name": parent.name, "study": "parents", "step": 12}
    assert made.read("data.json") != parent.read("data.json")


def test_it_trains_and_stands_apart_from_a_run_from_nothing(parent: Run, other: Path) -> None:
    begun = train(compose(child(other, parent, budget="30steps"))).run
    assert next(m["step"] for m in begun.metrics() if "train/loss" in m) == 10, "from step 0, not from the twelfth"
    assert begun.metrics()[-1]["val/loss"] < parent.metrics()[-1]["val/loss"]
    earlier = train(compose(child(other, parent, f"trainer.init_from={parent.identity}@12", budget="30steps")))
    assert earlier.state == "skipped", "the same start, however it is spelt"


def test_what_an_override_says_of_the_model_is_kept(parent: Run, other: Path) -> None:
    config = compose(child(other, parent, "model.dropout=0.3", "model/kernel=naive", "model.attention.window=5", "model.context_length=8"))
    model = config.model
    assert (model.dropout, component_of(model.kernel).name, model.width) == (0.3, "naive", 16)
    assert (getattr(model.attention, "window"), getattr(model.attention, "kv_heads")) == (5, 1)  # noqa: B009
    made = load(train(config).run)
    assert made.model.position.table.weight.shape[0] == 8, "of the learned positions the first"  # type: ignore[union-attr]


def test_what_does_not_fit_is_named(parent: Run, other: Path) -> None:
    at = rf"trainer\.init_from={parent.identity}@12: "
    for more, said in (
        (("model.context_length=32",), at + r"position\.table\.weight is \(16, 16\) there and \(32, 16\) here"),
        (("model.depth=2",), at + r"blocks\.1\.\S+ is not there"),
        (("model/ffn=swiglu",), at + r"blocks\.0\.ffn\.up\.weight is \(64, 16\) there and \(\d+, 16\) here"),
        (("model=char", "model.context_length=16"), at + r"embedding\.weight is \(\d+, 16\) there and \(\d+, 384\) here"),
        (("data/tokenizer=byte",), r"trainer\.init_from brings the tokeniser of its run"),
        (("trainer.start=x",), r"trainer\.init_from and trainer\.start"),
        (("trainer.init_from=nobody",), r"no run matches 'nobody'"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(compose(child(other, parent, *more)))
    assert [run.identity for run in all_runs()] == [parent.identity], "nothing is made of what is refused"


def test_a_parent_may_lie_anywhere(parent: Run, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = child(other, parent, f"trainer.init_from='parents/{parent.name}'")
    assert command(["--scratch", *by_name]) == 0
    assert [run.identity for run in all_runs()] == [parent.identity]
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "elsewhere"))
    assert command(child(other, parent, f"trainer.init_from={parent.directory}")) == 0
    (made,) = all_runs()
    assert (made.read("parent.json") or {})["run"] == parent.identity


def test_a_sweep_of_children_is_compared(parent: Run, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["-m", *child(other, parent, "study=children", "optimizer.learning_rate=1e-3,1e-4")]) == 0
    assert "2 runs: 2 trained" in capsys.readouterr().out
    assert json.loads((find_run("latest").directory / "parent.json").read_text())["run"] == parent.identity


def test_a_run_resumes_without_beginning_again(parent: Run, other: Path) -> None:
    overrides = child(other, parent, "callbacks.checkpoint.every=5", budget="20steps")
    whole = train(compose(overrides)).run
    weights = load(whole).model.state_dict()
    (whole.directory / "done.json").unlink()
    for checkpoint in sorted(whole.checkpoints.iterdir())[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    again = train(compose(overrides)).run
    assert again.directory == whole.directory
    assert all(torch.equal(a, b) for a, b in zip(load(again).model.state_dict().values(), weights.values(), strict=True))


def test_a_tokeniser_from_a_file_is_that_of_the_run(parent: Run, other: Path) -> None:
    path = parent.directory / "tokenizer.json"
    made = train(compose([*tiny(other), "data/tokenizer=file", f"data.tokenizer.path='{path}'"])).run
    assert json.loads((made.directory / "tokenizer.json").read_text()) == json.loads(path.read_text())
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path=nowhere: there is no file nowhere"):
        train(compose([*tiny(other), "data/tokenizer=file", "data.tokenizer.path=nowhere"]))
