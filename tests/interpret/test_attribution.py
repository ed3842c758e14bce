"""Contributions add up to the logit, and each is what a part's absence takes away where nothing reads it later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import components, register
from gptlab.interpret import attribute, capture, run_with
from gptlab.model.attention import MultiHead
from gptlab.model.block import _Block
from gptlab.model.head import Untied
from gptlab.model.input import PlainInput
from gptlab.model.lora import add_adapters
from gptlab.model.stream import InputSkip
from tests.interpret.conftest import PARTS, small, some_tokens


@pytest.mark.parametrize("kind", PARTS)
@torch.no_grad()
def test_contributions_add_up_to_the_logit(kind: str) -> None:
    model, tokens = small(**PARTS[kind]), some_tokens()
    found = attribute(model, tokens)
    logits = model(tokens)
    assert torch.equal(found.target, logits.argmax(-1))
    assert logits.std() > 0.2
    cap = getattr(model.head, "soft_cap", None)
    shown = found.logits if cap is None else cap * torch.tanh(found.logits / cap)
    assert ("soft_cap=3" in found.note) == (cap is not None)
    torch.testing.assert_close(found.values.sum(0), found.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(shown, logits.gather(-1, found.target[..., None])[..., 0], rtol=0, atol=1e-4)
    two = attribute(model, tokens, 3, against=5)
    torch.testing.assert_close(two.values.sum(0), two.logits, rtol=0, atol=1e-4)
    if cap is None:
        torch.testing.assert_close(two.logits, logits[..., 3] - logits[..., 5], rtol=0, atol=1e-4)


SLOTS = ("norm", "position", "input", "attention", "kernel", "value", "gate", "ffn", "block", "stream", "head", "parametrisation")


@pytest.mark.parametrize(("slot", "name"), [(slot, c.name) for slot in SLOTS for c in components(f"model/{slot}") if c.name != "flex"])
@torch.no_grad()
def test_every_component_can_be_captured_and_attributed(slot: str, name: str) -> None:
    model, tokens = small(depth=2, **{slot: name}), some_tokens()
    found = attribute(model, tokens, 3, against=5)
    torch.testing.assert_close(found.values.sum(0), found.logits, rtol=0, atol=1e-4)
    logits = capture(model, tokens, "embedded").logits
    torch.testing.assert_close(found.logits, logits[..., 3] - logits[..., 5], rtol=0, atol=1e-4)


@torch.no_grad()
def test_without_norms_a_contribution_is_what_its_absence_takes_away() -> None:
    model, tokens = small(norm="none", depth=1, ffn="none"), some_tokens()
    found = attribute(model, tokens, 7)
    plain = model(tokens)[..., 7]
    for head in range(4):
        without = run_with(model, tokens, {f"blocks.0.attention.head.{head}": torch.zeros(())}).logits[..., 7]
        part = found.values[found.components.index(f"blocks.0.attention.head.{head}")]
        assert part.abs().max() > 0.01
        torch.testing.assert_close(part, plain - without, rtol=0, atol=1e-5)


def test_frames_name_layer_kind_and_head() -> None:
    frame = attribute(small(**PARTS["gpt2"]), some_tokens()).frame(row=1, position=3)
    head = frame[frame.component == "blocks.2.attention.head.3"].iloc[0]
    assert (head.layer, head.kind, head["head"]) == (2, "attention", 3)
    assert set(frame.kind) == {"embedding", "position", "attention", "ffn", "bias"}
    found = attribute(small(**PARTS["gpt2"]), some_tokens())
    layers = found.by_layer(row=1, position=3)
    assert layers.value.sum() == pytest.approx(float(found.logits[1, 3]), abs=1e-4)


class Strange(nn.Module):
    def forward(self, x: Tensor, *more: object) -> Tensor:
        return x * x.abs()


@pytest.mark.parametrize("slot", ["norm", "stream", "block"])
def test_what_is_not_linear_is_refused_by_its_name(slot: str) -> None:
    if slot == "block":
        bases: tuple[type, ...] = (_Block,)
        members = {"__init__": lambda self, norm, attention, ffn: _Block.__init__(self, norm, attention, ffn), "forward": Strange.forward}
    else:
        bases, members = (Strange,), {}
    register(f"model/{slot}", "strange")(type(f"Strange_{slot}", bases, members | {"__module__": __name__}))
    with pytest.raises(ConfigError, match=rf"^model/{slot}=strange: .*attributed"):
        attribute(small(**{slot: "strange"}), some_tokens())


def test_a_token_beyond_the_vocabulary_has_no_logit() -> None:
    with pytest.raises(ConfigError, match="no logit of token 40"):
        attribute(small(), some_tokens(), 40)
    with pytest.raises(ConfigError, match="one a position"):
        attribute(small(), some_tokens(), torch.zeros(2, 11))


class Doubled(MultiHead):
    def forward(self, x: Tensor, context: Any) -> Tensor:
        return 2 * super().forward(x, context)


class Shifted(PlainInput):
    def forward(self, x: Tensor, positions: Tensor, cache: Any) -> Tensor:
        return x + 1


@torch.no_grad()
def test_a_subclass_is_one_part_and_the_sum_is_the_logit() -> None:
    register("model/attention", "doubled")(Doubled)
    register("model/input", "shifted")(Shifted)
    model, tokens = small(attention="doubled", input="shifted"), some_tokens()
    found = attribute(model, tokens, 3)
    assert {"input", "blocks.0.attention", "blocks.0.attention.bias"} < set(found.components)
    assert not any(".head." in name for name in found.components)
    torch.testing.assert_close(found.values.sum(0), model(tokens)[..., 3], rtol=0, atol=1e-4)


class Skipped(InputSkip):
    def forward(self, x: Tensor, context: Any) -> Tensor:
        return super().forward(x, context) + 1


class Louder(Untied):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_what_adds_what_is_not_known_is_refused() -> None:
    register("model/stream", "skipped")(Skipped)
    with pytest.raises(ConfigError, match="model/stream=skipped: what it makes of the stream is not known"):
        attribute(small(stream="skipped"), some_tokens())
    register("model/head", "louder")(Louder)
    with pytest.raises(
        ConfigError, match=r"up to 1 away from the model's logit: some part \(an adapter, a subclass\) adds what is not known"
    ):
        attribute(small(head="louder"), some_tokens())
    model = small()
    add_adapters(model, 2, 4.0, ["attention"], 0)
    attribute(model, some_tokens())  # an adapter begins by adding nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("out.adapter.up"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.5)
    with pytest.raises(ConfigError, match="an adapter, a subclass"):
        attribute(model, some_tokens())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_half_precision_rounds_is_no_part_that_is_not_known(dtype: torch.dtype) -> None:
    for kind in ("gpt2", "llama", "speed run", "sandwich"):
        attribute(small(**PARTS[kind]).to(dtype), some_tokens())
