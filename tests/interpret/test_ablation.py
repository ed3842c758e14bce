"""Ablation costs what a run with the part's absence written by hand costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.interpret import ablate, capture, run_with
from gptlab.interpret.activations import losses
from gptlab.model.transformer import Transformer
from tests.interpret.conftest import PARTS, small, some_tokens


def loss_of(logits: Tensor, tokens: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def silenced(model: Transformer) -> Transformer:
    """Head 2 of block 1 can write nothing, by its own weights."""
    with torch.no_grad():
        model.blocks[1].attention.out.weight[:, 12:18] = 0
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "speed run", "parallel"])
@torch.no_grad()
def test_zero_ablation_is_the_model_without_the_weights(kind: str) -> None:
    tokens = some_tokens(4)
    model = small(**PARTS[kind])
    frame = ablate(model, tokens, "blocks.1.attention.head.2", how="zero")
    whole = loss_of(model(tokens), tokens)
    without = loss_of(silenced(small(**PARTS[kind]))(tokens), tokens)
    assert list(frame.component) == ["blocks.1.attention.head.2"]
    assert frame.loss[0] == pytest.approx(without, abs=1e-6)
    assert frame.cost[0] == pytest.approx(without - whole, abs=1e-6)
    assert abs(frame.cost[0]) > 1e-4


@torch.no_grad()
def test_mean_and_resample_take_the_reference() -> None:
    model, tokens, reference = small(), some_tokens(4), some_tokens(4, seed=5)
    name = "blocks.1.ffn"
    mean = capture(model, reference, name)[name].mean((0, 1))
    by_hand = loss_of(run_with(model, tokens, {name: mean}).logits, tokens)
    assert ablate(model, tokens, name, how="mean", reference=reference).loss[0] == pytest.approx(by_hand, abs=1e-6)
    assert ablate(model, tokens, name, how="mean").loss[0] != pytest.approx(by_hand, abs=1e-4)
    other = capture(model, reference[:1], name)[name]
    by_hand = loss_of(run_with(model, tokens, {name: other}).logits, tokens)
    assert ablate(model, tokens, name, how="resample", reference=reference[:1]).loss[0] == pytest.approx(by_hand, abs=1e-6)
    same = tokens[:1].expand(3, -1).contiguous()
    assert ablate(model, same, name, how="resample").cost[0] == pytest.approx(0, abs=1e-6), "the other rows are the same text"
    assert abs(ablate(model, tokens, name, how="resample").cost[0]) > 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "fused", "sandwich", "experts", "no norm, no ffn", "average", "bigram"])
def test_every_part_and_nothing(kind: str) -> None:
    model, tokens = small(**PARTS[kind]), some_tokens(3)
    frame = ablate(model, tokens)
    depth, heads = len(model.blocks), 1 if kind == "average" else 4
    assert len(frame) == depth * (heads + 1)
    nothing = ablate(model, tokens, (), together=True)
    assert list(nothing.cost) == [0]
    assert nothing.loss[0] == pytest.approx(loss_of(model.requires_grad_(False)(tokens), tokens), abs=1e-6)
    if depth:
        names = list(frame.component)
        together = ablate(model, tokens, names, how="zero", together=True)
        assert len(together) == 1
        edits = {name: torch.zeros(()) for name in names}
        assert together.loss[0] == pytest.approx(loss_of(run_with(model, tokens, edits).logits, tokens), abs=1e-6)


def test_what_cannot_be_ablated_is_told() -> None:
    model = small()
    with pytest.raises(ConfigError, match="how=median: no such ablation; there are zero, mean, resample"):
        ablate(model, some_tokens(), how="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give more rows, or a reference"):
        ablate(model, some_tokens(1), how="resample")
    with pytest.raises(ConfigError, match="1 of 9 tokens will not do for rows of 12"):
        ablate(model, some_tokens(1), how="resample", reference=some_tokens(1, 9))
    with pytest.raises(ConfigError, match="at least two tokens in a row"):
        ablate(model, [[1]])
    with pytest.raises(ConfigError, match=r"did you mean blocks.1.ffn"):
        ablate(model, some_tokens(), "blocks.1.fn")
    with pytest.raises(ConfigError, match=r"blocks.0.ffn.slots has no rows that could be exchanged"):
        ablate(small(**PARTS["experts"]), some_tokens(), "blocks.0.ffn.slots", how="resample")


@torch.no_grad()
def test_losses_are_cross_entropy() -> None:
    model, tokens = small(), some_tokens()
    logits = model(tokens)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(losses(logits, tokens), expected)
