"""The lens ends in the model's own logits, and tuning brings every layer nearer to them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptlab.config.errors import ConfigError
from gptlab.interpret import lens, tune_lens
from tests.interpret.conftest import PARTS, small, some_tokens


@pytest.mark.parametrize("kind", PARTS)
@torch.no_grad()
def test_the_last_place_is_the_model_and_the_first_the_embedding(kind: str) -> None:
    model, tokens = small(**PARTS[kind]), some_tokens()
    found = lens(model, tokens)
    assert len(found.names) == len(model.blocks) + 1
    assert torch.equal(found.logits(-1), model(tokens))
    assert torch.equal(found.logits(len(model.blocks)), model(tokens))
    own = model.embedded(model.input(model.position.embed(model.embedding(tokens), model.order[:, :12]), model.order[:, :12], None))
    assert torch.equal(found.logits(0), model.logits(model.norm(own)))


@torch.no_grad()
def test_tables_and_depth_are_what_they_say() -> None:
    model, tokens = small(seed=3), some_tokens()
    found = lens(model, tokens)
    table = found.table()
    for place in range(4):
        logits = found.logits(place)
        line = table.iloc[place]
        assert line.loss == pytest.approx(float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())), abs=1e-5)
        kl = F.kl_div(logits.log_softmax(-1), model(tokens).log_softmax(-1), log_target=True, reduction="sum") / tokens.numel()
        assert line.kl == pytest.approx(float(kl), abs=1e-5)
    assert list(table.agreement)[-1] == 1
    guesses, depth = found.guesses(), found.depth()
    for row in range(2):
        for t in range(12):
            said = guesses[:, row, t].tolist()
            assert depth[row, t] == next(p for p in range(4) if all(guess == said[-1] for guess in said[p:]))
    assert len(depth.unique()) > 1
    frame = found.frame(row=1, top=2)
    assert len(frame) == 4 * 12 * 2
    line = frame[(frame.place == "blocks.1") & (frame.position == 4) & (frame["rank"] == 1)].iloc[0]
    told = found.logits(2)[1, 4].softmax(-1)
    assert line.probability == pytest.approx(float(told.topk(2).values[1]))
    assert line.of_next == pytest.approx(float(told[tokens[1, 5]]))


def test_tuning_brings_held_out_layers_nearer_and_leaves_the_model() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = tune_lens(model, some_tokens(64, 16), steps=60, learning_rate=3e-3)
    held_out = some_tokens(16, 16, seed=9)
    plain, better = lens(model, held_out).table(), lens(model, held_out, tuned=tuned).table()
    assert (better.kl[:3] < 0.8 * plain.kl[:3]).all()
    assert better.kl[3] == plain.kl[3] == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_lens_of_another_model_is_refused() -> None:
    tuned = tune_lens(small(), some_tokens(), steps=1)
    with pytest.raises(ConfigError, match="is of 3 layers of width 24, the model has 2 layers of width 24"):
        lens(small(depth=2), some_tokens(), tuned=tuned)
    with pytest.raises(ConfigError, match="no lens to tune"):
        tune_lens(small(depth=0), some_tokens())
    with pytest.raises(ConfigError, match="steps=0"):
        tune_lens(small(), some_tokens(), steps=0)
