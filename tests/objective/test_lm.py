"""The loss in chunks is the loss: the same number and gradients, without ever holding all the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, register
from gptlab.config.slots import SLOTS
from gptlab.data.loader import Batch
from gptlab.model.context import Context
from gptlab.model.transformer import Transformer, new_model
from gptlab.objective.lm import next_token_loss

VOCABULARY, CONTEXT, WIDTH = 301, 32, 36


def model(*overrides: str) -> Transformer:
    small = ["model=nano", f"model.width={WIDTH}", "model.heads=2", "model.depth=1", f"model.context_length={CONTEXT}"]
    return new_model(compose([*small, *overrides]).model, VOCABULARY, seed=0)


def batch(weighted: bool = False) -> Batch:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (3, CONTEXT + 1), generator=draw)
    return Batch(rows[:, :-1], rows[:, 1:], torch.rand((3, CONTEXT), generator=draw) if weighted else None)


def measured(made: Transformer, given: Batch, **options: Any) -> tuple[float, Tensor]:
    made.zero_grad()
    loss = next_token_loss(made, given, **options) / given.targets.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


@pytest.mark.parametrize("head", ["tied", "untied", "untied_softcap"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunks_give_the_loss_and_gradients_of_the_whole(head: str, weighted: bool, z_loss: float) -> None:
    made, given = model(f"model/head={head}", "model.pad_vocab_to=64"), batch(weighted)
    whole = measured(made, given, z_loss=z_loss)
    for chunk in (7, CONTEXT, 96, 1000):  # one that does not divide the 96 tokens, two that do, one that holds them all
        loss, gradients = measured(made, given, z_loss=z_loss, chunk=chunk)
        assert loss == pytest.approx(whole[0], rel=1e-6), chunk
        torch.testing.assert_close(gradients, whole[1], rtol=1e-5, atol=1e-6, msg=f"chunk {chunk}")


class Largest(TorchDispatchMode):
    """The most elements that a tensor with the vocabulary's width had, and how many products made one."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (
            isinstance(made, Tensor) and made.dim() >= 2 and made.shape[-1] == VOCABULARY and made.shape[0] != WIDTH
        ):  # no gradient of the head
            self.elements = max(self.elements, made.numel())
            self.products += func is torch.ops.aten.mm.default
        return made


def test_no_more_logits_are_held_than_a_chunk_and_none_is_made_twice() -> None:
    made = model("model/head=untied")
    seen: dict[int, Largest] = {}
    for chunk in (0, 8):
        with Largest() as seen[chunk]:
            measured(made, batch(), chunk=chunk)
    assert seen[0].elements == 96 * VOCABULARY
    assert seen[8].elements == 8 * VOCABULARY
    assert (seen[0].products, seen[8].products) == (1, 12), "a chunk's logits are made once, and never again for the backward pass"


def test_without_gradients_chunks_give_the_loss_alone() -> None:
    made, given = model(), batch()
    with torch.no_grad():
        assert next_token_loss(made, given, chunk=8).item() == pytest.approx(next_token_loss(made, given).item(), rel=1e-6)


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    loss = next_token_loss(model(), batch(), chunk=8) / 3
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_compiled_chunks_equal_eager_ones() -> None:
    made, given = model(), batch()
    expected = measured(made, given, chunk=8)
    compiled = torch.compile(lambda: next_token_loss(made, given, chunk=8), backend="aot_eager")
    made.zero_grad()
    loss = compiled() / given.targets.numel()
    loss.backward()
    assert loss.item() == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None]), expected[1])


@register("model/ffn", "demanding")
class Demanding(nn.Module):
    """Asks for a loss of its own: its bias squared."""

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.layer, self.bias = layer, nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.losses is not None:
            context.losses[f"demand/{self.layer}"] = self.bias.square().mean()
        return torch.zeros_like(x) * self.bias


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [0, 8])
def test_what_a_part_adds_counts_once_a_token(weighted: bool, chunk: int) -> None:
    chosen = component("model/ffn", "demanding").options()
    config = replace(model().config, ffn=chosen)
    made, given = new_model(config, VOCABULARY, seed=0), batch(weighted)
    with torch.no_grad():
        for block in made.blocks:
            block.ffn.bias.fill_(0.5)  # type: ignore[union-attr, operator]
    plain = next_token_loss(new_model(replace(config, ffn=component("model/ffn", "none").options()), VOCABULARY, seed=0), given)
    assert next_token_loss(made, given, chunk=chunk).item() == pytest.approx(plain.item() + 0.25 * given.token_weight, rel=1e-6)


def test_a_chunk_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.chunk=-1 must be at least 1 token"):
        build(component("objective", "lm").options(chunk=-1))
    assert SLOTS["objective"].wiring == ()
