"""Schedule-free AdamW: it is the library's, its average is, and it says what it needs."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, load_components
from tests.optimizer.test_groups import groups, model
from tests.optimizer.test_muon import stepped

load_components()
CPU = torch.device("cpu")


def made(of: torch.nn.Module, **options: Any) -> Any:
    return build(component("optimizer", "schedule_free").options(**options), groups=groups(of), device=CPU)


def test_it_trains_and_averages_as_the_library_does() -> None:
    ours, theirs = model().double(), model().double()
    optimizer = made(ours, learning_rate=0.01, weight_decay=0.1)
    roles = theirs.roles()
    decayed = [p for n, p in theirs.named_parameters() if roles[n] in ("matrix", "embedding", "head")]
    plain = [p for n, p in theirs.named_parameters() if roles[n] in ("gain", "bias")]
    reference = AdamWScheduleFree([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.01)
    reference.train()
    stepped(ours, optimizer, 5)
    stepped(theirs, reference, 5)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=name)
    reference.eval()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(optimizer.average(one), other.data, rtol=0, atol=1e-12, msg=name)


def test_before_a_step_the_average_is_the_weight_and_afterwards_not() -> None:
    of = model()
    optimizer = made(of)
    assert all(torch.equal(optimizer.average(p), p) for p in of.parameters())
    before = [p.detach().clone() for p in of.parameters()]
    assert all(optimizer.average(p).data_ptr() != p.data_ptr() for p in of.parameters()), "a copy, which may be written to"
    stepped(of, optimizer, 2)
    assert any(not torch.equal(optimizer.average(p), p) for p in of.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, of.parameters(), strict=True))


def test_roles_have_rates_of_their_own() -> None:
    of = model()
    optimizer = made(of, learning_rate=0.01, rates={"embedding": 0.0}, decays={"head": 0.5})
    assert {g["role"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        "bias": (0.01, 0.0), "embedding": (0.0, 0.1), "gain": (0.01, 0.0), "head": (0.01, 0.5), "matrix": (0.01, 0.1),
    }  # fmt: skip
    before = of.embedding.weight.detach().clone()
    stepped(of, optimizer, 2)
    assert torch.equal(of.embedding.weight, before)


def test_without_the_library_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match=r"needs the library schedulefree: run `pip install 'gptlab\[optimizers\]'`$"):
        made(model())


@pytest.mark.parametrize(("options", "told"), [({"beta1": 0.0}, "optimizer.beta1=0.0"), ({"beta2": 1.0}, "optimizer.beta2=1.0"),
                                               ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0")])  # fmt: skip
def test_an_impossible_setting_is_refused(options: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        made(model(), **options)
