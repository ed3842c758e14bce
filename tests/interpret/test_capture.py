"""Any activation by its name: what it is, what looking changes (nothing), and what a wrong name is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptlab import load
from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.interpret import capture, names, patterns, run_with, same_tokenizer
from gptlab.interpret.taps import Place, tapped
from gptlab.runner.run import Run
from tests.interpret.conftest import PARTS, VOCABULARY, small, some_tokens


@pytest.mark.parametrize("kind", PARTS)
@torch.no_grad()
def test_looking_changes_nothing(kind: str) -> None:
    model, tokens = small(**PARTS[kind]), some_tokens()
    plain, state, modules = model(tokens), list(model.state_dict()), [name for name, _ in model.named_modules()]
    model.train()
    found = capture(model, tokens, "*norm*")
    assert model.training
    assert torch.equal(found.logits, plain)
    torch.testing.assert_close(capture(model, tokens).logits, plain, rtol=0, atol=2e-6)  # with the naive kernel, for the patterns
    assert torch.equal(model.eval()(tokens), plain)
    assert list(model.state_dict()) == state
    assert [name for name, _ in model.named_modules()] == modules
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["gpt2", "fused", "sandwich", "speed run", "experts", "average", "bigram"])
def test_every_name_is_captured_by_itself(kind: str) -> None:
    model, tokens = small(**PARTS[kind]), some_tokens()
    every, listed = capture(model, tokens), names(model)
    assert list(every) == listed
    assert every["embedded"].shape == (2, 12, 24)
    for name in listed:
        alone = capture(model, tokens, name)
        assert list(alone) == [name]
        torch.testing.assert_close(alone[name], every[name], rtol=1e-5, atol=1e-5)


def test_heads_and_neurons_are_parts_of_their_taps() -> None:
    model, tokens = small(**PARTS["llama"]), some_tokens()
    found = capture(model, tokens, ["blocks.1.attention.z", "blocks.*.attention.head.2", "blocks.1.ffn.hidden", "blocks.1.ffn.neuron.7"])
    assert [name for name in found if ".head." in name] == [f"blocks.{layer}.attention.head.2" for layer in range(3)]
    assert torch.equal(found["blocks.1.attention.head.2"], found["blocks.1.attention.z"][..., 12:18])
    assert torch.equal(found["blocks.1.ffn.neuron.7"], found["blocks.1.ffn.hidden"][..., 7:8])
    assert len(names(model, "*.head.*")) == 12


def test_a_pattern_is_of_the_naive_kernel_and_says_so() -> None:
    tokens = some_tokens()
    shown, fused = small(kernel="naive"), small(kernel="sdpa")
    plain, asked = capture(shown, tokens), capture(fused, tokens)
    assert plain.note == capture(fused, tokens, "*.ffn").note == ""
    assert asked.note == "patterns are computed by model/kernel=naive: model/kernel=sdpa shows none"
    assert list(plain) == list(asked)
    for name in plain:
        assert torch.equal(plain[name], asked[name])
    kernel: Any = fused.blocks[0].attention
    assert not kernel.kernel.materialises_pattern


def test_an_even_mean_has_the_pattern_of_one() -> None:
    model, tokens = small(attention="average"), some_tokens()
    looked = patterns(model, tokens)
    assert "model/attention=average" in looked.note
    assert torch.equal(looked[0][0, 0, 3], torch.tensor([0.25] * 4 + [0.0] * 8))
    values = capture(model, tokens, ["blocks.1.attention.value", "blocks.1.attention.z"])
    mean = looked[1][:, 0] @ values["blocks.1.attention.value"]
    torch.testing.assert_close(mean, values["blocks.1.attention.z"])
    document = torch.tensor([[0] * 5 + [1] * 7] * 2)
    assert torch.equal(patterns(model, tokens, document=document)[0][0, 0, 6, :7], torch.tensor([0.0] * 5 + [0.5] * 2))


@torch.no_grad()
def test_changing_nothing_changes_nothing_and_changing_all_is_another_run() -> None:
    model = small(**PARTS["speed run"])
    tokens, other = some_tokens(), some_tokens(seed=2)
    plain = model(tokens)
    assert torch.equal(run_with(model, tokens, {"*": lambda x: x}).logits, plain)
    everything = capture(model, other)
    assert torch.equal(run_with(model, tokens, dict(everything)).logits, model(other))
    one = run_with(model, tokens, {"blocks.1.attention.head.2": torch.zeros(())}, ["blocks.1.attention.z"])
    assert not one["blocks.1.attention.z"][..., 12:18].any()
    assert one["blocks.1.attention.z"][..., :12].all()
    assert not torch.equal(one.logits, plain)


def test_a_change_of_a_part_leaves_what_it_was_made_of() -> None:
    x = torch.ones(2, 3, 4)
    changed = Place("a head", "z", (1, 3)).write(x, lambda part: 2 * part)
    assert torch.equal(changed[1, 2], torch.tensor([1.0, 2.0, 2.0, 1.0]))
    assert (x == 1).all(), "another tap may hold it"


WRONG = {
    "blocks.0.atention.pattern": "did you mean blocks.0.attention.pattern",
    "blocks.9.ffn": r"did you mean blocks\.\d\.ffn\?",
    "blocks.*.pattrn": "no such activation",
    "nonsense": r"names\(model\) lists them",
    "position": "gives no activation",
    "blocks.0.attention.head.4": "has 4 heads, from 0 to 3",
    "blocks.0.ffn.neuron.96": "has 96 neurons, from 0 to 95",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_is_told_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[name]):
        capture(small(), some_tokens(), name)


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("bigram", "blocks.0.attention.pattern", "no blocks .model.depth=0, a bigram."),
        ("average", "blocks.0.attention.pattern", "model/attention=average. has no pattern|model/attention=average has no pattern"),
        ("average", "blocks.0.attention.head.0", "has no heads of its own"),
        ("experts", "blocks.0.ffn.neuron.0", "model/ffn=moe. has no neurons"),
    ],
)
def test_a_part_that_has_no_such_thing_says_so(kind: str, name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        capture(small(**PARTS[kind]), some_tokens(), name)
    with pytest.raises(ConfigError, match=r"no attention .model.depth=0"):
        patterns(small(depth=0), some_tokens())


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (torch.zeros(1, 17, dtype=torch.long), "the prompt has 17 tokens, more than model.context_length=16"),
        ([], "at least one token"),
        ([[1, 2], [3]], "rows of different lengths"),
        ([1, VOCABULARY], f"holds token {VOCABULARY}; this model's ids go from 0 to {VOCABULARY - 1}"),
        ("a text", "no tokeniser"),
        (["a text", "another"], "the prompt is a list of texts; give one text, or rows of token ids of one length"),
        ([1.0, 2.0], "the prompt is of float32; token ids are whole numbers"),
        (torch.ones(1, 3, dtype=torch.bool), "the prompt is of bool; token ids are whole numbers"),
    ],
)
def test_tokens_that_the_model_cannot_take(tokens: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        capture(small(), tokens)


def test_a_value_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"blocks.0.ffn has the shape \(2, 12, 24\); a value of shape \(2, 11, 24\)"):
        run_with(small(), some_tokens(), {"blocks.0.ffn": torch.zeros(2, 11, 24)})


def test_a_run_takes_a_text_and_two_tokenisers_are_refused(finished_run: Run) -> None:
    run = load(finished_run)
    assert capture(run, "the king", "embedded")["embedded"].shape == (1, 8, 16)
    with pytest.raises(ConfigError, match="the prompt is '', which has no token; give a text of at least one"):
        capture(run, "")
    with pytest.raises(ConfigError, match="the prompt has 20 tokens"):
        capture(run, "the king" + " " * 12)
    assert same_tokenizer({"a": run, "b": run}) is run.tokenizer
    other = load(finished_run)
    other.tokenizer.fit(["xyz"])
    with pytest.raises(ConfigError, match=r"a and b have two tokenisers .char and char."):
        same_tokenizer({"a": run, "b": other})


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "position"), ("gpt2", "positio[n]"), ("experts", "blocks.0.ffn.down"), ("gpt2", "blocks.*.mlp")]
)
def test_a_change_of_what_gives_nothing_is_refused(kind: str, name: str) -> None:
    told = "no such activation" if "mlp" in name else "is a part of this model that gives no activation"
    with pytest.raises(ConfigError, match=told):
        run_with(small(**PARTS[kind]), some_tokens(), {name: torch.zeros(())})


def test_of_a_glob_what_gives_nothing_is_left_out() -> None:
    model = small(**PARTS["experts"])
    taken = [place.name for place in tapped(model, "blocks.0.ffn.*")]
    assert "blocks.0.ffn.slots" in taken
    assert "blocks.0.ffn.down" not in taken
    assert all(name in names(model) for name in taken)


def test_the_axes_of_tokens_are_those_that_grow_with_them() -> None:
    dense = [
        "embedded",
        *(f"blocks.0.attention.{tap}" for tap in ("q", "v", "gate", "z", "head.1", "pattern", "scores")),
        "blocks.0.ffn.neuron.3",
    ]
    found = {place.name.rpartition("attention.")[2]: axes for place, axes in tapped(small(kernel="sdpa"), dense).items()}
    one = dict.fromkeys(("embedded", "gate", "z", "head.1", "blocks.0.ffn.neuron.3"), (1,))
    assert found == one | {"q": (2,), "v": (2,), "pattern": (2, 3), "scores": (2, 3)}
    flat = tapped(small(**PARTS["experts"]), ["blocks.0.ffn.slots", "blocks.0.ffn.scores", "blocks.0.ffn"])
    assert list(flat.values()) == [(0,), (0,), (1,)]
    assert list(tapped(small(**PARTS["no norm, no ffn"]), "blocks.0.ffn").values()) == [()]


def test_the_nearest_name_gives_something() -> None:
    with pytest.raises(ConfigError) as told:
        capture(small(), some_tokens(), "positon")
    assert "did you mean position?" not in str(told.value)


class Dark(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: object) -> Tensor:
        return self.out(x)


def test_an_attention_from_outside_without_a_pattern_is_not_sent_to_what_fails_too() -> None:
    register("model/attention", "dark")(Dark)
    with pytest.raises(ConfigError, match=r"model/attention=dark has no pattern that could be shown$"):
        patterns(small(attention="dark"), some_tokens())
