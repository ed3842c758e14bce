"""Callback insight: its measures are those of the library, it changes no number of the training, and says what a model lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError
from gptlab.data.loader import Batch, held_out_batches
from gptlab.data.prepare import prepare
from gptlab.interpret import head_scores, lens, repeated_tokens
from gptlab.interpret.insight import in_context, of_text
from gptlab.runner.run import Run
from tests.data.test_conversations import chats, written
from tests.faulty import weights_hash
from tests.ranks import Job, trained
from tests.tiny import tiny

INSIGHT = "+callback@callbacks.insight=insight"


def told(run: Run) -> dict[int, dict[str, float]]:
    return {m["step"]: {k: v for k, v in m.items() if k.startswith("insight/")} for m in run.metrics() if "insight/milliseconds" in m}


def test_it_changes_no_number_of_the_training(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiny(corpus_file, "model.dropout=0.2", "model.depth=2")
    plain = train(compose(own)).run
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "watched"))
    watched = train(compose([*own, INSIGHT, "callbacks.insight.every=2", "callbacks.insight.per_head=true"])).run
    assert watched.identity == plain.identity
    assert weights_hash(watched) == weights_hash(plain)
    losses = [[(m["step"], m["train/loss"]) for m in r.metrics() if "train/loss" in m] for r in (plain, watched)]
    assert losses[0] == losses[1]
    assert list(told(watched)) == [1, 2, 4, 6, 8, 10, 12]


def test_its_measures_are_those_of_the_library(corpus_file: Path) -> None:
    own = tiny(corpus_file, INSIGHT, "model.depth=2", "callbacks.insight.every=12", "callbacks.insight.tokens=64")
    config = compose([*own, "callbacks.insight.per_head=true", "callbacks.insight.lens_tokens=64", "optimizer.learning_rate=0.05"])
    run = train(config).run
    line, loaded = told(run)[12], load(str(run.directory))
    scores = head_scores(loaded, repeated_tokens(loaded, rows=4))
    for name in ("induction", "previous_token", "duplicate_token"):
        assert line[f"insight/{name}"] == pytest.approx(scores[name].max(), abs=1e-5)
        for layer, group in scores.groupby("layer"):
            assert line[f"insight/{name}/{layer}"] == pytest.approx(group[name].max(), abs=1e-5)
            for head, score in zip(group["head"], group[name], strict=True):
                assert line[f"insight/{name}/{layer}/head_{head}"] == pytest.approx(score, abs=1e-5)
    assert line["insight/entropy"] == pytest.approx(scores["entropy"].mean(), abs=1e-4)
    batch = next(held_out_batches(prepare(loaded.config.data), "val", 16, 64, 4))
    looked = lens(loaded, batch.inputs)
    assert line["insight/lens_depth"] == pytest.approx(float(looked.depth().float().mean()), abs=1e-6)
    assert line["insight/residual_norm/1"] == pytest.approx(float(looked.streams[-1].norm(dim=-1).mean()), rel=1e-4)
    with torch.no_grad():
        nats = -loaded.model(batch.inputs).log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    assert line["insight/in_context_loss"] == pytest.approx(float(nats[:, 14:].mean() - nats[:, 1:3].mean()), abs=1e-5)
    squares = sum(float(p.detach().double().square().sum()) for p in loaded.model.parameters())
    assert line["insight/weight_norm"] == pytest.approx(squares**0.5, rel=1e-5)


def test_of_a_task_the_loss_is_held_against_the_frequencies_of_its_answers() -> None:
    targets = torch.tensor([[0, 0, 1, 1], [2, 2, 0, 1]])
    weight = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    nats = torch.full((2, 4), 9.0)
    nats[:, 2:] = 0.25
    entropy = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    assert in_context(nats, Batch(targets, targets, weight)) == pytest.approx(0.25 - float(entropy))


def test_chats_have_no_in_context_loss(tmp_path: Path) -> None:
    own = tiny(written(tmp_path, chats(60, turns=1, longest=3)), INSIGHT, "callbacks.insight.tokens=512", steps=1)
    swapped = {"data=text": "data/corpus=chat", "data/tokenizer=char": "data/tokenizer=chat"}
    sizes = ["objective=sft", "model.context_length=128", "trainer.batch_tokens=256"]
    line = told(train(compose([*(swapped.get(o, o) for o in own), *sizes])).run)[1]
    assert {"insight/induction", "insight/lens_depth", "insight/residual_norm/0"} < set(line)
    assert "insight/in_context_loss" not in line


def test_a_model_without_patterns_is_told_once_and_the_rest_is_measured(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(compose(tiny(corpus_file, INSIGHT, "model.depth=0", "callbacks.insight.every=4"))).run
    assert capsys.readouterr().out.count("no scores of heads: this model has no attention (model.depth=0, a bigram)") == 1
    assert {"insight/in_context_loss", "insight/lens_depth", "insight/weight_norm"} < set(told(run)[12])
    assert not any("induction" in name for name in told(run)[12])


def test_a_mixed_precision_a_task_and_a_short_context_are_measured(corpus_file: Path) -> None:
    task = [o for o in tiny(corpus_file, INSIGHT, "hardware.precision=bf16", steps=1) if not o.startswith("data")]
    assert list(told(train(compose([*task, "data=copy"])).run)) == [1]
    short = tiny(corpus_file, INSIGHT, "model.context_length=2", steps=1)
    assert "insight/in_context_loss" in told(train(compose(short)).run)[1]


@pytest.mark.parametrize("option", ["every=0", "tokens=0", "lens_tokens=0", "rows=-1"])
def test_options_that_mean_nothing_are_refused(corpus_file: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"callbacks.insight.{option} must be at least 1")):
        train(compose(tiny(corpus_file, INSIGHT, f"callbacks.insight.{option}")))


def test_the_logits_of_a_row_at_a_time_are_those_of_all(corpus_file: Path) -> None:
    run = train(compose(tiny(corpus_file, steps=2))).run
    loaded = load(str(run.directory))
    batch = next(held_out_batches(prepare(loaded.config.data), "val", 16, 64, 4))
    one, all_rows = of_text(loaded.model, batch, 16), of_text(loaded.model, batch, 64)
    assert one["in_context_loss"] == all_rows["in_context_loss"]


@pytest.mark.slow
def test_sharded_and_copied_models_are_measured_as_one_process_does(corpus_file: Path, tmp_path: Path) -> None:
    own = tiny(corpus_file, INSIGHT, "model.depth=2", "callbacks.insight.every=2", steps=4)
    kinds = {kind: Job(tmp_path / kind, [*own, f"hardware/strategy={kind}"]) for kind in ("ddp", "fsdp")}
    for outcomes in trained(tmp_path / "jobs", list(kinds.values())):
        assert [o["state"] for o in outcomes] == ["done", "done"], outcomes
    alone = told(train(compose(own)).run)
    for kind, job in kinds.items():
        theirs = told(Run(job.directory))
        assert theirs.keys() == alone.keys()
        for step, line in alone.items():
            assert theirs[step].keys() == line.keys(), kind
            for name in line.keys() - {"insight/milliseconds"}:
                assert theirs[step][name] == pytest.approx(line[name], rel=2e-3, abs=1e-4), f"{kind}, step {step}: {name}"
