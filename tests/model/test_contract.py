"""Every registered component keeps what its slot promises, and the checks see those that do not."""

import re
import uuid
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gptlab.config import registry
from gptlab.config.registry import Component, component, components, load_components, register
from gptlab.runner import contract_model
from gptlab.runner.contract import Check, contract

load_components()
# Options that change what a component computes, and so are components of their own as far as promises go.
VARIANTS = [
    ("model/attention", "multihead", {"kv_heads": 2}),
    ("model/attention", "multihead", {"kv_heads": 1, "window": 3}),
    ("model/attention", "multihead", {"qk_norm": True}),
    ("model/value", "embedding", {"every": 2}),
    ("model/attention", "average", {"form": "loop"}),
    ("model/attention", "average", {"form": "softmax"}),
    ("model/ffn", "gelu", {"approximate": "none"}),
    ("model/head", "tied", {"soft_cap": 5.0}),
    ("model/head", "untied", {"soft_cap": 5.0}),
    ("model/position", "t5", {"buckets": 4, "max_distance": 6}),
    ("optimizer", "sgd", {"momentum": 0.0}),
    ("schedule", "cosine", {"warmup": 0}),
    ("schedule", "wsd", {"warmup": 900}),
]


def broken(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.passed}


@pytest.mark.parametrize("chosen", components(), ids=lambda c: f"{c.slot.path}={c.name}")
def test_component_keeps_its_contract(chosen: Component) -> None:
    assert not broken(contract(chosen))


@pytest.mark.parametrize(("slot", "name", "options"), VARIANTS, ids=str)
def test_options_of_a_component_keep_its_contract(slot: str, name: str, options: dict[str, object]) -> None:
    chosen = component(slot, name)
    assert not broken(contract(chosen, chosen.options(**options)))


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch):
    """Register a component for one test, and forget it after."""
    monkeypatch.setattr(registry, "_COMPONENTS", dict(registry._COMPONENTS))
    monkeypatch.setattr(registry, "_BY_OPTIONS", dict(registry._BY_OPTIONS))

    def add(slot: str, factory) -> Component:
        name = f"faulty_{uuid.uuid4().hex}"
        register(slot, name)(factory)
        return component(slot, name)

    return add


class MeanOverTime(nn.Module):
    """Subtracts the mean over the row: each place sees the future."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class MeanOverBatch(nn.Module):
    """Subtracts the mean over the batch: each row sees the others."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class FirstToken(nn.Module):
    """Adds the row's first token to all: causal, but blind to where documents end."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x + x[:, :1]


class TwoFaced(nn.Module):
    """Another function once compiled."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if torch.compiler.is_compiling() else x


class Forgetful(nn.Module):
    """Holds a weight that the state dict does not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class PlaceInCall(nn.Module):
    """Counts places from the start of the call, not of the row."""

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__()

    def forward(self, x: Tensor, context: object) -> Tensor:
        return x * torch.arange(x.shape[1], dtype=x.dtype)[:, None]


class Rooted(nn.Module):
    """Roots of negative numbers."""

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor, context: object) -> Tensor:
        return (x @ self.weight).sqrt()


class Reader(nn.Module):
    """Looks at the next token's id, which no gradient shows."""

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__()

    def forward(self, x: Tensor, context) -> Tensor:
        return x * context.tokens.roll(-1, 1)[..., None].to(x.dtype)


def by_call(width: int):
    return lambda spec, generator: torch.randn(spec.shape)


def backwards():
    return lambda step, total: 1.5 - step / total


def late():
    return lambda step, total: min(1.0, step / 100)


def stepped():
    return lambda step, total: 1.0 if step < total / 2 else 0.1


class UnmaskedKernel:
    materialises_pattern = False

    def __call__(self, q, k, v, *, scale, dropout, **_):
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


def uphill(groups, device):
    return torch.optim.SGD([{"params": g["params"]} for g in groups], lr=0.1, maximize=True)


class Lossy:
    name, vocabulary, end_of_text, separator = "byte", 10, None, ""

    def fit(self, texts) -> None: ...

    def encode(self, text: str):
        return component("data/tokenizer", "byte").factory().encode(text.lower())

    def decode(self, ids) -> str:
        return component("data/tokenizer", "byte").factory().decode(ids)

    def state(self):
        return {}

    def restore(self, state) -> None: ...


@pytest.mark.parametrize(
    ("slot", "factory", "check", "said"),
    [
        ("model/norm", MeanOverTime, "causality", "when the tokens from there on change"),
        ("model/norm", MeanOverBatch, "rows", "when another row changes"),
        ("model/norm", Forgetful, "state", "before and after saving"),
        ("model/norm", FirstToken, "documents", "when the one before it changes"),
        ("model/ffn", PlaceInCall, "cache", "differ by"),
        ("model/ffn", Rooted, "gradients", "is not finite"),
        ("model/ffn", Reader, "causality", "when the tokens from there on change"),
        ("model/norm", TwoFaced, "compile", "compiled and eager logits"),
        ("model/init", by_call, "determinism", "differs between two models of one seed"),
        ("model/kernel", UnmaskedKernel, "parity with naive", "causal and naive"),
        ("optimizer", uphill, "descent", "took the loss of its own batch"),
        ("schedule", backwards, "range", "not in \\[0, 1\\]"),
        ("schedule", late, "range", "its batch is wasted"),
        ("schedule", stepped, "continuity", "jumps from 1.000 to 0.100"),
        ("data/tokenizer", Lossy, "round trip", "to be"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_contract_catches(faulty, monkeypatch: pytest.MonkeyPatch, slot: str, factory, check: str, said: str) -> None:
    if check != "compile":
        monkeypatch.setattr(contract_model, "_compile", lambda config: "")  # the slowest of the checks
    found = broken(contract(faulty(slot, factory)))
    assert re.search(said, found[check]), found


def test_a_crash_in_one_check_leaves_the_others(faulty) -> None:
    class Crash(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.float64:
                raise RuntimeError("not in float64\nand a second line")
            return x

    checks = contract(faulty("model/norm", Crash))
    assert broken(checks)["rows"] == "RuntimeError: not in float64"
    assert not {"options", "shape", "determinism", "shared weights"} & set(broken(checks))


def test_contract_leaves_the_thread_count_alone() -> None:
    torch.set_num_threads(2)
    contract(component("model/norm", "none"))
    assert torch.get_num_threads() == 2


def test_a_required_option_is_named_and_can_be_given(tmp_path: Path) -> None:
    text = component("data/corpus", "text")
    assert "path" in contract(text)[0].detail
    file = tmp_path / "a.txt"
    file.write_text("text")
    assert not broken(contract(text, text.options(path=str(file))))
    assert "no such file" in broken(contract(text, text.options(path=str(tmp_path / "b.txt"))))["build"]
