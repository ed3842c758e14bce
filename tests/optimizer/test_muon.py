"""Muon and Lion: what an update is, which parameters they take, and rates by role."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, load_components
from gptlab.optimizer.groups import parameter_groups
from gptlab.optimizer.muon import orthogonalised, scale_of
from tests.optimizer.test_groups import groups, model

load_components()
CPU = torch.device("cpu")


def stepped(made: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    x = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(made(x).flatten(0, 1), x.roll(-1, 1).flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalised(matrices, 5)
    values = torch.linalg.svdvals(made)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    rotated = left.mT @ made @ right.mT  # the singular vectors are those of the matrix, so that this is diagonal
    assert float((rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))).abs().max()) < 1e-3


def test_matrices_iterated_together_are_those_iterated_alone() -> None:
    matrices = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(1))
    together = orthogonalised(matrices, 5)
    for matrix, one in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalised(matrix[None], 5)[0], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "theirs"), [("original", "original"), ("rms", "match_rms_adamw")])
def test_plain_matrices_move_as_with_torchs_muon(scale: str, theirs: str) -> None:
    ours, reference = model(), model()
    options = component("optimizer", "muon").options(scale=scale, learning_rate=0.02, weight_decay=0.1)
    optimizer = build(options, groups=groups(ours), device=CPU)
    plain = [n for n, role in reference.roles().items() if role == "matrix" and "qkv" not in n]
    named = dict(reference.named_parameters())
    other = torch.optim.Muon([named[n] for n in plain], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn=theirs)
    x = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(0))
    for made, by in ((ours, optimizer), (reference, other)):
        by.zero_grad()
        F.cross_entropy(made(x).flatten(0, 1), x.roll(-1, 1).flatten()).backward()
        by.step()
    for name in plain:
        moved = dict(ours.named_parameters())[name]
        torch.testing.assert_close(moved, named[name], rtol=0, atol=2e-4, msg=name)  # bf16 products, batched and not


def test_queries_keys_and_values_are_each_made_orthogonal() -> None:
    made = model()
    (matrices,) = [g for g in groups(made) if g["role"] == "matrix"]
    assert dict(zip(matrices["names"], matrices["parts"], strict=True))["blocks.0.attention.qkv.weight"] == [16, 16, 16]
    optimizer = build(component("optimizer", "muon").options(precision="fp32", learning_rate=1.0), groups=groups(made), device=CPU)
    qkv = made.blocks[0].attention.qkv.weight
    before = qkv.detach().clone()
    stepped(made, optimizer, 1)
    for part in (before - qkv.detach()).split(16):
        values = torch.linalg.svdvals(part)
        assert 0.3 < float(values.median()) < 1.3, values


def test_what_is_no_matrix_moves_as_with_adamw() -> None:
    ours, reference = model().double(), model().double()
    frozen = component("optimizer", "muon").options(learning_rate=0.0, adam_learning_rate=0.01)
    stepped(ours, build(frozen, groups=groups(ours), device=CPU))
    options = component("optimizer", "adamw").options(learning_rate=0.01, weight_decay=0.0, rates={"matrix": 0.0})
    stepped(reference, build(options, groups=groups(reference), device=CPU))
    for (name, one), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9, msg=name)


def test_the_scale_is_named() -> None:
    assert scale_of(torch.Size((64, 16)), "original") == 2.0
    assert scale_of(torch.Size((16, 64)), "original") == 1.0
    assert scale_of(torch.Size((16, 64)), "rms") == pytest.approx(1.6)


def test_lion_is_its_formula() -> None:
    made = model().double()
    optimizer = build(component("optimizer", "lion").options(learning_rate=0.01, weight_decay=0.5), groups=groups(made), device=CPU)
    weight = {n: p.detach().clone() for n, p in made.named_parameters()}
    mean = {n: torch.zeros_like(w) for n, w in weight.items()}
    roles = made.roles()
    for _ in range(3):
        stepped(made, optimizer, 1)
        for name, parameter in made.named_parameters():
            gradient = parameter.grad
            decay = 0.5 if roles[name] in ("matrix", "embedding", "head") else 0.0
            weight[name] = weight[name] * (1 - 0.01 * decay) - 0.01 * torch.sign(0.9 * mean[name] + 0.1 * gradient)
            mean[name] = 0.99 * mean[name] + 0.01 * gradient
            torch.testing.assert_close(parameter, weight[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_a_role_has_its_own_rate_and_decay(name: str) -> None:
    made = model()
    own = {"rates": {"embedding": 0.1}, "decays": {"gain": 0.2, "head": 0.0}}
    options = component("optimizer", name).options(learning_rate=0.5, weight_decay=0.1, **own)
    found = {g["role"]: g for g in build(options, groups=groups(made), device=CPU).param_groups}
    base = 3e-3 if name == "muon" else 0.5
    assert found["embedding"]["lr"] == pytest.approx(0.1 * base)
    assert found["matrix"]["lr"] == 0.5
    assert [found[r]["weight_decay"] for r in ("matrix", "gain", "head", "bias")] == [0.1, 0.2, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rates": {"matrx": 1.0}}, r"optimizer.rates.matrx: no such role \(did you mean matrix\?\); there are matrix, embedding"),
        ({"decays": {"head": -1.0}}, "optimizer.decays.head=-1.0 must be at least 0"),
        ({"rates": {"head": math.inf}}, "optimizer.rates.head=inf"),
        ({"iterations": 0}, "optimizer.iterations=0"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"adam_learning_rate": math.nan}, "optimizer.adam_learning_rate=nan"),
    ],
)
def test_what_muon_cannot_do_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(component("optimizer", "muon").options(**options), groups=groups(model()), device=CPU)


def test_a_matrix_of_three_dimensions_is_refused() -> None:
    made = model()
    made.blocks[0].ffn.experts = torch.nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(ConfigError, match=r"optimizer=muon cannot take blocks\.0\.ffn\.experts"):
        build(component("optimizer", "muon").options(), groups=parameter_groups(made, made.roles()), device=CPU)
