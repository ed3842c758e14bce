"""What is fitted to activations finds what was put there, and says when there was nothing to find."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config.errors import ConfigError, DivergedError
from gptlab.interpret import probe, probes, run_with, top_texts, train_autoencoder
from gptlab.interpret.autoencoder import SparseAutoencoder
from gptlab.interpret.fitting import fit
from gptlab.model.transformer import Transformer
from tests.interpret.conftest import PARTS, VOCABULARY, small, some_tokens


@torch.no_grad()
def loss_of(model: Transformer, row: Tensor, edit: Callable[[Tensor], Tensor] | None) -> float:
    logits = run_with(model, row, {} if edit is None else {"blocks.0": edit}).logits
    return float(F.cross_entropy(logits[0, :-1], row[0, 1:]))


def test_a_probe_reads_what_is_there_and_its_control_does_not() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(40, 10, 6, generator=draw)
    labels = (features[..., 2] + 0.1 * torch.randn(40, 10, generator=draw) > 0).long()
    found = probe(features, labels)
    assert found.held_out == 100
    assert found.accuracy > 0.9
    assert abs(found.control - 0.5) < 0.2
    assert found.weight.abs().argmax(1).tolist() == [2, 2]
    noise = probe(features, torch.randint(2, (40, 10), generator=draw))
    assert noise.accuracy < 0.7
    left = labels.clone()
    left[:, 5:] = -1
    assert probe(features, left).held_out == 50


def test_probes_of_a_model_find_its_token_in_the_embedding() -> None:
    model, tokens = small(position="rotary"), some_tokens(60, 16)
    frame = probes(model, tokens, tokens % 2)
    assert list(frame.name) == ["embedded", "blocks.0", "blocks.1", "blocks.2"]
    assert frame.accuracy[0] > 0.95
    assert frame.control[0] < 0.75
    before = probes(model, tokens[:, 1:], tokens[:, :-1] % 2, "embedded")
    assert before.accuracy[0] < 0.75, "the embedding knows nothing of the token before"


def test_an_autoencoder_finds_the_directions_that_made_its_input() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(12, 16, generator=draw), dim=-1)
    chosen = torch.zeros(4000, 12).scatter(1, torch.rand(4000, 12, generator=draw).topk(2, 1).indices, 1.0)
    x = (chosen * (1 + torch.rand(4000, 12, generator=draw))) @ truth
    made = SparseAutoencoder(16, 24, 2)
    with torch.no_grad():
        made.directions.copy_(torch.randn(24, 16, generator=draw))
        made.renormalise()
        made.encoder.weight.copy_(made.directions)
        made.encoder.bias.zero_()
        made.center.copy_(x.mean(0))
        made.offset.zero_()

    def loss(step: int) -> torch.Tensor:
        some = x[torch.randint(4000, (256,), generator=draw)]
        return (made(some) - some).square().mean()

    seen = fit(made, loss, steps=600, learning_rate=5e-3, after=made.renormalise)
    assert seen[-1] < 0.2 * seen[0]
    assert (made.directions @ truth.T).max(0).values.median() > 0.9
    assert (made.encode(x) > 0).sum(-1).max() <= 2
    torch.testing.assert_close(made.directions.norm(dim=-1), torch.ones(24))


def test_an_autoencoder_of_a_model_is_judged_by_what_it_gives_back() -> None:
    model, tokens = small(), some_tokens(40, 16)
    found = train_autoencoder(model, tokens, "blocks.0", features=96, active=8, steps=300, batch=256, learning_rate=3e-3)
    assert 0.6 < found.explained <= 1
    torch.testing.assert_close(found.autoencoder.directions.norm(dim=-1), torch.ones(96))
    assert 0 < found.alive <= 1
    assert 0 < float(found.frequency.sum()) <= 8
    again = train_autoencoder(model, tokens, "blocks.0", features=96, active=8, steps=3, batch=256)
    assert again.explained < found.explained
    assert torch.equal(
        again.autoencoder.directions,
        train_autoencoder(model, tokens, "blocks.0", features=96, active=8, steps=3, batch=256).autoencoder.directions,
    )
    assert not any(p.requires_grad for p in found.autoencoder.parameters())
    row = tokens[:1]
    same = train_autoencoder(model, row.expand(6, -1), "blocks.0", features=96, active=2, steps=3)  # any row held out is this one
    assert same.loss == pytest.approx(loss_of(model, row, None), abs=1e-5)
    assert same.loss_through == pytest.approx(loss_of(model, row, same.autoencoder), abs=1e-5)
    assert same.loss_without == pytest.approx(loss_of(model, row, lambda x: x.mean((0, 1)).expand_as(x)), abs=1e-5)
    assert len({round(x, 4) for x in (same.loss, same.loss_through, same.loss_without)}) == 3


def test_what_cannot_be_fitted_is_told() -> None:
    features = torch.zeros(4, 3, 2)
    with pytest.raises(ConfigError, match=r"labels \(4, 2\) must be one for each vector"):
        probe(features, torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match="3 held out, 1 classes"):
        probe(features, torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ConfigError, match="held_out=1"):
        probe(features, torch.zeros(4, 3, dtype=torch.long), held_out=1)
    with pytest.raises(ConfigError, match="at least two rows"):
        train_autoencoder(small(), some_tokens(1), "embedded")
    with pytest.raises(ConfigError, match="active=9 must be from 1 to features=8"):
        train_autoencoder(small(), some_tokens(), "embedded", features=8, active=9)
    with pytest.raises(ConfigError, match="is no vector a token"):
        train_autoencoder(small(**PARTS["experts"]), some_tokens(3, 7), "blocks.0.ffn.slots")
    with pytest.raises(ConfigError, match=r"optimizer=adamm is not registered .did you mean adam"):
        fit(torch.nn.Linear(2, 2), lambda step: torch.zeros(()), steps=1, learning_rate=0.1, optimizer="adamm")
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        fit(linear, lambda step: linear.weight.sum() * torch.nan, steps=2, learning_rate=0.1)


def test_texts_need_a_tokeniser() -> None:
    with pytest.raises(ConfigError, match="needs a tokeniser"):
        top_texts(small(), torch.randint(VOCABULARY, (2, 4)), "blocks.0.ffn.hidden", [0])
