"""Probes while a model is trained: they are written down, and the training does not know of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError
from gptlab.evaluate.probes import probe
from gptlab.evaluate.results import kept
from tests.tiny import tiny

PROBED = ["+callback@callbacks.probes=probes", "callbacks.probes.every=5", "callbacks.probes.limit=6"]


def losses(run: Any) -> list[tuple[int, float, float]]:
    return [(m["step"], m["train/loss"], m["train/gradient_norm"]) for m in run.metrics() if "train/loss" in m]


def test_the_training_is_bit_for_bit_the_same(corpus_file: Path) -> None:
    overrides = tiny(corpus_file, "data/tokenizer=byte", "model.dropout=0.1", "study=probed")
    plain = train(compose(overrides)).run
    before, weights = losses(plain), load(plain).model.state_dict()
    run = train(compose([*overrides, *PROBED]), rerun=True).run
    assert run.identity == plain.identity, "it is the same run"
    assert losses(run) == before
    after = load(run).model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    told = {m["step"]: m for m in run.metrics() if "eval/english/acc" in m}
    assert list(told) == [5, 10, 12]
    assert 0 <= told[5]["eval/english/acc"] <= 1
    assert {"eval/english/acc_stderr", "eval/english/agreement/acc", "eval/induction/acc"} <= told[5].keys()
    loaded = load(run)
    again = {s.name: s.value for s in probe(loaded.model, loaded.tokenizer, ["english", "induction"], limit=6)}
    assert again == pytest.approx({name: told[12][f"eval/{name}"] for name in again}), "of the weights at the end"
    assert {name: score.value for name, score in kept(run).items()} == pytest.approx(again)


def test_what_cannot_be_asked_is_said_before_the_first_step(corpus_file: Path) -> None:
    for more, said in (
        (["callbacks.probes.probes=[addition]"], "cannot write a single one"),  # by characters, of a text without digits
        (["callbacks.probes.probes=[englisch]"], "no such probe"),
        (["callbacks.probes.probes=[]"], "nothing to ask"),
        (["callbacks.probes.limit=-1"], "must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(compose(tiny(corpus_file, "study=probed", PROBED[0], *more)))


@pytest.mark.slow
def test_tasks_in_a_folder_are_measured_too(corpus_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tests.evaluate.test_harness import ROWS, TASK

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "kings.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    overrides = tiny(corpus_file, "data/tokenizer=byte", "model.dropout=0.1", "model.context_length=32", "study=tasked")
    before = losses(train(compose(overrides)).run)
    asked = [*PROBED, "callbacks.probes.probes=[]", "callbacks.probes.tasks=[kings]", f"callbacks.probes.folder={tmp_path / 'tasks'}"]
    run = train(compose([*overrides, *asked]), rerun=True).run
    assert losses(run) == before
    assert [m["step"] for m in run.metrics() if "eval/kings/acc" in m] == [5, 10, 12]
