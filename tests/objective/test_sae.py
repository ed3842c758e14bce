"""A sparse autoencoder trained by the runner: the model stays as it is, the features are found again, and what they keep is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError
from gptlab.config.resolve import resolve
from gptlab.hardware.device import machine
from gptlab.interpret import autoencoder, judge_autoencoder, run_with, top_texts
from gptlab.interpret.features import has_autoencoder
from gptlab.interpret.units import excited
from gptlab.model.autoencoder import PREFIX, SparseAutoencoder
from gptlab.runner.checkpoint import checkpoints, load_model, step_of
from gptlab.runner.memory import forecast_memory
from gptlab.runner.run import Run, all_runs

CONTEXT = 16
SIZES = ["tracker=none", "model.width=16", "model.heads=2", "model.depth=2", f"model.context_length={CONTEXT}", "trainer.batch_tokens=128",
         "callbacks.samples.tokens=4", "trainer.log_every=1", "data/corpus=text", "data.validation_tokens=256"]  # fmt: skip
LOOK = ["objective=sae", "objective.features=48", "objective.active=4", "optimizer.learning_rate=0.01", "trainer.budget=40steps",
        "study=looks"]  # fmt: skip


@pytest.fixture
def base(corpus_file: Path) -> Run:
    return train(compose([*SIZES, "data/tokenizer=byte", f"data.corpus.path={corpus_file}", "trainer.budget=30steps", "study=base"])).run


def looking(base: Run, corpus_file: Path, *more: str) -> list[str]:
    return [*SIZES, f"data.corpus.path={corpus_file}", f"trainer.init_from='{base.identity}'", *LOOK, *more]


def test_the_activation_is_given_back_ever_better_and_the_model_stays(base: Run, corpus_file: Path) -> None:
    made = train(compose(looking(base, corpus_file, "objective.activation=blocks.1"))).run
    lines = [m for m in made.metrics() if "val/explained" in m]
    assert lines[-1]["val/explained"] > max(0.5, lines[0]["val/explained"])
    assert 0 < lines[-1]["val/alive"] <= 1
    own, before = load(made), load(base)
    assert own.model.state_dict().keys() == before.model.state_dict().keys()
    assert all(torch.equal(own.model.state_dict()[name], tensor) for name, tensor in before.model.state_dict().items())
    assert has_autoencoder(own)
    assert not has_autoencoder(before)
    found = autoencoder(own)
    assert found.name == "blocks.1"
    assert found.autoencoder.directions.shape == (48, 16)
    text = torch.randint(97, 122, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = found.encode(run_with(own, text, {}, "blocks.1")["blocks.1"])
    assert 0 < int((features > 0).sum(-1).max()) <= 4


def test_a_run_goes_on_where_it_was_ended(base: Run, corpus_file: Path) -> None:
    whole = train(compose(looking(base, corpus_file, "callbacks.checkpoint.every=20"))).run
    expected = load_model(checkpoints(whole.checkpoints)[-1])
    for folder in checkpoints(whole.checkpoints):
        if step_of(folder) > 20:
            shutil.rmtree(folder)
    (whole.directory / "done.json").unlink()
    again = train(compose(looking(base, corpus_file, "callbacks.checkpoint.every=20"))).run
    assert again.identity == whole.identity
    found = load_model(checkpoints(again.checkpoints)[-1])
    assert any(name.startswith(PREFIX) for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_held_out_loss_is_that_of_the_model_through_the_autoencoder(base: Run, corpus_file: Path) -> None:
    made = train(compose(looking(base, corpus_file, "data.validation_tokens=64", "objective.activation=blocks.0"))).run
    own = load(made)
    features = autoencoder(own)
    ids = torch.tensor([[*b"the quick brown "], [*b"fox jumps over t"]])
    judged = judge_autoencoder(own, ids, features)

    def loss_of(edit: object) -> float:
        logits = run_with(own, ids, {} if edit is None else {"blocks.0": edit}).logits  # type: ignore[dict-item]
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    assert judged.loss == pytest.approx(loss_of(None), abs=1e-5)
    assert judged.loss_through == pytest.approx(loss_of(lambda x: features.autoencoder(x)), abs=1e-5)
    assert judged.loss_without == pytest.approx(loss_of(lambda x: features.autoencoder.center.expand_as(x)), abs=1e-5)
    assert len({round(x, 4) for x in (judged.loss, judged.loss_through, judged.loss_without)}) == 3
    plain = [m for m in base.metrics() if "val/loss" in m][-1]["val/loss"]
    assert made.metrics()[-1]["val/loss"] != pytest.approx(plain, abs=1e-6), "the loss is that through the autoencoder"
    texts = top_texts(own, ids, features.name, [int(judged.frequency.argmax())], through=features.encode)
    assert len(texts)
    shown = excited(own, ids[:1], ids, features=features)
    assert shown[0].layer == "features of blocks.0"
    assert {one.layer for one in shown} == {"features of blocks.0", "0", "1"}


def test_an_autoencoder_finds_the_directions_that_made_its_input() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.randn(12, 16, generator=draw), dim=-1)
    chosen = torch.zeros(4000, 12).scatter(1, torch.rand(4000, 12, generator=draw).topk(2, 1).indices, 1.0)
    x = (chosen * (1 + torch.rand(4000, 12, generator=draw))) @ truth
    made = SparseAutoencoder(16, 24, 2).initialise(draw)
    made.standardise(x)
    torch.testing.assert_close(made.center, x.mean(0))
    updates = torch.optim.Adam(made.parameters(), lr=5e-3)
    seen = []
    for _ in range(600):
        some = x[torch.randint(4000, (256,), generator=draw)]
        loss = (made(some) - some).square().mean()
        loss.backward()
        updates.step()
        updates.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < 0.2 * seen[0]
    assert (F.normalize(made.directions, dim=-1) @ truth.T).max(0).values.median() > 0.9
    assert (made.encode(x) > 0).sum(-1).max() <= 2
    larger = made(x)
    with torch.no_grad():
        made.directions.mul_(3)
    torch.testing.assert_close(made(x), larger, msg="directions count with length 1")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["objective.activation=blocks.7"], r"objective\.activation=blocks\.7: this model has no such part"),
        (["objective.activation=blocks.0.attenton"], r"did you mean blocks\.0\.attention"),
        (["objective.activation=head.nothing"], "no such part"),
        (["objective.active=0"], r"objective\.active=0 must be at least 1"),
        (["objective.active=49"], r"objective\.active=49 must be at least 1, and at most objective\.features=48"),
        (["objective.features=0", "objective.active=129"], r"objective\.active=129 is more than the 128 features"),
        (["trainer.init_from="], r"objective=sae looks into a model that is trained already: give trainer\.init_from=RUN"),
    ],
)
def test_what_cannot_be_looked_into_is_refused(base: Run, corpus_file: Path, more: list[str], why: str) -> None:
    before = len(all_runs())
    with pytest.raises(ConfigError, match=why):
        train(compose(looking(base, corpus_file, *more)))
    assert len(all_runs()) == before, "nothing is made of a run that is refused"


def test_memory_is_forecast(base: Run, corpus_file: Path) -> None:
    config = resolve(compose(looking(base, corpus_file, "hardware.device=cpu")), machine())
    assert forecast_memory(config, 256, process=0).activations > 0


def test_a_run_without_an_autoencoder_is_told_what_makes_one(base: Run) -> None:
    with pytest.raises(ConfigError, match="gptlab train objective=sae"):
        autoencoder(load(base))
