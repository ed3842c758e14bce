"""Autoencoders of runs: which of their weights are opened, and which texts excite what they found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError
from gptlab.interpret import autoencoder
from gptlab.interpret.units import excited
from gptlab.model.autoencoder import PREFIX
from gptlab.runner.averages import kept_in
from gptlab.runner.checkpoint import choose, load_tensors
from tests.interpret.conftest import small, some_tokens
from tests.tiny import tiny


def test_the_average_of_an_autoencoder_is_opened_where_it_is_asked_for(corpus_file: Path) -> None:
    base = train(compose(tiny(corpus_file, "study=base", steps=2))).run
    own = [o for o in tiny(corpus_file, "study=looks", f"trainer.init_from='{base.identity}'", steps=3) if o != "data/tokenizer=char"]
    look = [*own, "objective=sae", "objective.features=24", "objective.activation=blocks.0"]
    run = train(compose([*look, "+callback@callbacks.ema=ema", "optimizer.learning_rate=0.01"])).run
    loaded, chosen = load(run), choose(run.checkpoints, "latest")
    kept = kept_in(chosen)
    assert kept is not None
    trained, others = load_tensors(chosen)
    opened = {which: autoencoder(loaded, weights=which).autoencoder.state_dict() for which in ("default", "trained", "average")}
    for name, value in opened["average"].items():
        average = others.get(f"{kept.tensors}{PREFIX}{name}", trained[f"{PREFIX}{name}"])  # a buffer has none
        assert torch.equal(value, average)
        assert torch.equal(opened["trained"][name], trained[f"{PREFIX}{name}"])
        assert torch.equal(opened["default"][name], opened["trained"][name])
    assert not torch.equal(opened["average"]["directions"], opened["trained"]["directions"])
    with pytest.raises(ConfigError, match="weights=mean is not one of"):
        autoencoder(loaded, weights="mean")


def test_a_text_that_does_not_excite_a_unit_is_not_among_its_texts() -> None:
    model, tokens, corpus = small(depth=1, ffn="relu2"), some_tokens(1), some_tokens(6, 3, seed=4)
    with torch.no_grad():
        model.blocks[0].ffn.up.bias -= 2  # so that many never rise
    found = excited(model, tokens, corpus, per_layer=96)
    assert all(own.max() > 0 for unit in found for _, own in unit.texts)
    assert {len(unit.texts) for unit in found} >= {0, 4}


def test_documents_of_a_corpus_are_kept_apart() -> None:
    model, tokens, corpus = small(), some_tokens(1), some_tokens(4)
    document = torch.tensor([[0] * 5 + [1] * 7] * 4)
    apart, whole = (excited(model, tokens, corpus, document=given, top=4) for given in (document, None))
    second = excited(model, tokens, corpus[:, 5:], top=4)
    for one, other, alone in zip(apart, whole, second, strict=True):
        texts, expected, mixed = dict(one.texts), dict(alone.texts), dict(other.texts)
        for row in texts.keys() & expected.keys():
            torch.testing.assert_close(texts[row][5:], expected[row])
        assert any(not torch.equal(texts[row], mixed[row]) for row in texts.keys() & mixed.keys())
