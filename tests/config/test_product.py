"""A CPU without bf16 instructions makes bf16's numbers, by fp32's products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptlab.config import product
from gptlab.model import linear as linear_module
from gptlab.model.experts import grouped_product
from gptlab.model.linear import HiddenLinear, Linear
from gptlab.optimizer.muon import orthogonalised


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def by_both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], list[Tensor]]], list[tuple[Tensor, Tensor]]]:
    """What is made by torch's own bf16 products and by emulated ones, one beside the other."""

    def made(function: Callable[[], list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for native in (True, False):
            for module in (product, linear_module):
                monkeypatch.setattr(module, "cpu_multiplies_bf16", lambda native=native: native)
            found.append(function())
        return list(zip(*found, strict=True))

    return made


def test_only_bf16_on_such_a_cpu_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 2)
    monkeypatch.setattr(product, "cpu_multiplies_bf16", lambda: False)
    assert product.emulated(x.bfloat16())
    assert not product.emulated(x)
    assert not product.emulated(x.bfloat16().to("meta"))
    monkeypatch.setattr(product, "cpu_multiplies_bf16", lambda: True)
    assert not product.emulated(x.bfloat16())


def test_an_emulated_product_is_exact_but_for_its_last_rounding(by_both) -> None:  # type: ignore[no-untyped-def]
    a, b = random(9, 40).bfloat16(), random(40, 7, seed=1).bfloat16()
    exact = a.double() @ b.double()
    for found in by_both(lambda: [product.mm(a, b)])[0]:
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize(("kind", "width"), [(Linear, 64), (HiddenLinear, 64), (Linear, 320)])
def test_a_layer_and_its_gradients_are_those_of_torchs_bf16(by_both, kind: type[Linear], width: int) -> None:  # type: ignore[no-untyped-def]
    layer, x = kind(width, 320, bias=True), random(5, width).requires_grad_()
    layer.weight.data, layer.bias.data = random(320, width, seed=1), random(320, seed=2)

    def run() -> list[Tensor]:
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()
        return [out.detach().float(), *(p.grad.clone() for p in (x, layer.weight, layer.bias) if p.grad is not None)]

    for native, emulated in by_both(run):
        assert float((native - emulated).norm() / native.norm()) < 5e-3


def test_experts_are_those_of_torchs_bf16(by_both) -> None:  # type: ignore[no-untyped-def]
    rows, weight, bias = (t.bfloat16().requires_grad_() for t in (random(11, 16), random(3 * 8, 16, seed=1), random(3 * 8, seed=2)))
    ends = torch.tensor([4, 4, 11])

    def run() -> list[Tensor]:
        out = grouped_product(rows, weight, bias, ends)
        assert out.dtype == torch.bfloat16
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (rows, weight, bias))]

    for native, emulated in by_both(run):
        assert native.dtype == emulated.dtype
        assert float((native.float() - emulated.float()).norm() / native.float().norm()) < 5e-3


def test_muons_update_is_that_of_bf16(by_both) -> None:  # type: ignore[no-untyped-def]
    matrices = random(3, 24, 48)
    exact = orthogonalised(matrices, 5)
    ((native, emulated),) = by_both(lambda: [orthogonalised(matrices.bfloat16(), 5).float()])
    for found in (native, emulated):
        assert float((found - exact).abs().max()) < 0.05
    assert float((native - emulated).norm() / native.norm()) < 0.02
