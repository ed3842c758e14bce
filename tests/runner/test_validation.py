"""The held-out loss is the mean over every token, however it is cut into batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gptlab import compose
from gptlab.config.resolve import Machine, resolve
from gptlab.data.prepare import prepare
from gptlab.model.transformer import new_model
from gptlab.runner import validation
from tests.tiny import tiny


def test_it_is_the_mean_over_every_token_whatever_the_batch(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(compose(tiny(corpus_file)), Machine(devices=("cpu",)))
    data = prepare(config.data)
    model = new_model(config.model, data.manifest["tokenizer"]["vocabulary"], 0)
    stream = data.stream("val")
    tokens = torch.from_numpy(stream.window(0, len(stream)))
    losses = []
    for start in range(0, len(tokens) - 1, 16):
        inputs, targets = tokens[start : start + 17][:-1], tokens[start + 1 : start + 17]
        losses += F.cross_entropy(model(inputs[None])[0], targets, reduction="none").tolist()
    assert len(losses) == len(tokens) - 1
    for size in (16, 100, 8192):
        monkeypatch.setattr(validation, "EVALUATION_TOKENS", size)
        assert validation.measure(model, data, config)["val/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert model.training, "the model is left as it was"
