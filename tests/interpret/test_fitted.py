"""What is fitted to activations finds what was put there, and says when there was nothing to find."""

from __future__ import annotations

import pytest
import torch

from gptlab.config.errors import ConfigError, DivergedError
from gptlab.interpret import lens, probe, probes, top_texts, tune_lens
from gptlab.interpret.fitting import fit
from tests.interpret.conftest import VOCABULARY, small, some_tokens


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


def test_what_cannot_be_fitted_is_told() -> None:
    features = torch.zeros(4, 3, 2)
    with pytest.raises(ConfigError, match=r"labels \(4, 2\) must be one for each vector"):
        probe(features, torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match="3 held out, 1 classes"):
        probe(features, torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ConfigError, match="3 held out, 1 classes"):
        probe(features, torch.ones(4, 3, dtype=torch.long))
    with pytest.raises(ConfigError, match="held_out=1"):
        probe(features, torch.zeros(4, 3, dtype=torch.long), held_out=1)
    with pytest.raises(ConfigError, match=r"optimizer=adamm is not registered .did you mean adam"):
        fit(torch.nn.Linear(2, 2), lambda step: torch.zeros(()), steps=1, learning_rate=0.1, optimizer="adamm")
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        fit(linear, lambda step: linear.weight.sum() * torch.nan, steps=2, learning_rate=0.1)


def test_texts_need_a_tokeniser() -> None:
    with pytest.raises(ConfigError, match="needs a tokeniser"):
        top_texts(small(), torch.randint(VOCABULARY, (2, 4)), "blocks.0.ffn.hidden", [0])


def test_a_lens_of_a_model_in_half_precision_is_tuned() -> None:
    model, tokens = small().to(torch.bfloat16), some_tokens(8)
    tuned = tune_lens(model, tokens, steps=40)
    plain, own = (lens(model, tokens, tuned=one).table() for one in (None, tuned))
    assert own.kl[:3].mean() < 0.9 * plain.kl[:3].mean()
    assert own.kl[3] == 0


def test_a_lens_is_tuned_on_documents_apart() -> None:
    model, tokens = small(), some_tokens(4)
    apart = tune_lens(model, tokens, steps=2, document=torch.tensor([[0] * 5 + [1] * 7] * 4))
    whole, one = (tune_lens(model, tokens, steps=2, document=document) for document in (None, torch.zeros_like(tokens)))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), one.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), apart.parameters(), strict=True))
