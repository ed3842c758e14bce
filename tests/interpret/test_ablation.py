"""Ablation costs what a run with the part's absence written by hand costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.interpret import ablate, capture, run_with
from gptlab.interpret.ablation import How, _edit
from gptlab.interpret.activations import losses
from gptlab.interpret.taps import tapped
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
    for how in ("zero", "mean", "resample"):
        for kind, name in (("gpt2", "position"), ("experts", "blocks.0.ffn.down")):
            with pytest.raises(ConfigError, match=f"^{name} is a part of this model that gives no activation; gptlab.interpret.names"):
                ablate(small(**PARTS[kind]), some_tokens(), name, how=how)
    with pytest.raises(
        ConfigError, match="is of queries and keys, and its mean over rows of 6 tokens does not fit rows of 12; give a reference"
    ):
        ablate(model, some_tokens(), "blocks.0.attention.pattern", reference=some_tokens(2, 6))


@torch.no_grad()
def test_losses_are_cross_entropy() -> None:
    model, tokens = small(), some_tokens()
    logits = model(tokens)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(losses(logits, tokens), expected)


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("tap", ["pattern", "scores", "q", "v", "gate"])
@torch.no_grad()
def test_no_token_is_told_of_later_ones(tap: str, how: How) -> None:
    model, tokens, reference = small(gate="per_head"), some_tokens(4), some_tokens(5, seed=3)
    ((place, axes),) = tapped(model, f"blocks.0.attention.{tap}").items()
    edit = _edit(model, place, axes, tokens, reference, how, 0)
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % 29
    one, two = (run_with(model, ids, {place.name: edit}).logits for ids in (tokens, other))
    assert one.isfinite().all()
    torch.testing.assert_close(one[:, :-1], two[:, :-1], rtol=0, atol=1e-6)
    assert not torch.equal(one, model(tokens))


@torch.no_grad()
def test_a_mean_is_of_each_head_by_itself() -> None:
    model, tokens = small(gate="per_head"), some_tokens(4)
    for tap, axes in (("k", (0, 2)), ("gate", (0, 1)), ("pattern", (0,))):
        name = f"blocks.1.attention.{tap}"
        mean = capture(model, tokens, name)[name].mean(axes, keepdim=True)
        by_hand = loss_of(run_with(model, tokens, {name: lambda x, mean=mean: mean.expand_as(x)}).logits, tokens)
        assert ablate(model, tokens, name).loss[0] == pytest.approx(by_hand, abs=1e-6), tap


def test_scores_of_zero_are_an_even_mean_of_what_may_be_seen() -> None:
    model, tokens = small(), some_tokens()
    name = "blocks.1.attention.scores"
    ((place, axes),) = tapped(model, name).items()
    seen = run_with(model, tokens, {name: _edit(model, place, axes, tokens, tokens, "zero", 0)}, "blocks.1.attention.pattern")
    torch.testing.assert_close(seen["blocks.1.attention.pattern"][0, 0, 3], torch.tensor([0.25] * 4 + [0.0] * 8))


def test_a_reference_of_the_same_rows_gives_no_row_its_own() -> None:
    model, tokens = small(), some_tokens(2)
    for seed in range(4):
        other = ablate(model, tokens, "blocks.1.ffn", how="resample", reference=tokens.clone(), seed=seed)
        assert other.cost[0] == ablate(model, tokens, "blocks.1.ffn", how="resample").cost[0], "of two rows there is one other"
    with pytest.raises(ConfigError, match="give more rows, or a reference"):
        ablate(model, tokens[:1], how="resample", reference=tokens[:1].clone())
