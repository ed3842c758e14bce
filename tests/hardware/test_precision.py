"""Number formats: what is rounded, what is not, and that a model learns the same in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from gptlab import compose, train
from gptlab.config.errors import ConfigError, Stopped
from gptlab.config.resolve import Machine, resolve
from gptlab.data.prepare import prepare
from gptlab.hardware.fp8 import BACKWARD, FORWARD, fp8_linear, product, quantised
from gptlab.hardware.precision import autocast, in_precision
from gptlab.model.linear import Linear
from gptlab.model.transformer import new_model
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from tests.signals import SignalAt
from tests.tiny import tiny

CPU = torch.device("cpu")
CARD = Machine(devices=("cuda", "cpu"), gpu_bf16=True, gpu_fp8=True)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_fp8_products_are_close_forward_and_backward() -> None:
    x, weight, bias = drawn(3, 16, 64).requires_grad_(), drawn(48, 64).requires_grad_(), drawn(48).requires_grad_()
    wanted = drawn(3, 16, 48)
    exact = torch.autograd.grad((F.linear(x, weight, bias) * wanted).sum(), (x, weight, bias))
    product = fp8_linear(x, weight, bias)
    assert product.dtype == torch.bfloat16
    found = torch.autograd.grad((product * wanted).sum(), (x, weight, bias))
    error = (product.float() - F.linear(x, weight, bias)).norm() / F.linear(x, weight, bias).norm()
    assert 1e-3 < error < 0.05, "8 bits are coarse, and no coarser than that"
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 0.08


@pytest.mark.parametrize("left", [FORWARD, BACKWARD])
def test_the_product_of_a_cpu_is_torchs_own(left: torch.dtype) -> None:
    a, b = quantised(drawn(64, 96), left), quantised(drawn(48, 96), FORWARD)
    torchs = torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], out_dtype=torch.bfloat16)
    torch.testing.assert_close(product(a, b), torchs, rtol=2**-7, atol=1e-5)  # the last bit of bf16: sums are rounded in another order


def test_fp8_leaves_an_odd_product_in_bf16_and_takes_zeros() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fp8_linear(drawn(16, 64), drawn(6, 64)), F.linear(drawn(16, 64), drawn(6, 64)))
    assert torch.equal(fp8_linear(torch.zeros(16, 64), drawn(16, 64)), torch.zeros(16, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_a_scale_uses_the_whole_format(factor: float) -> None:
    x = drawn(32, 32) * factor
    small, scale = quantised(x, torch.float8_e4m3fn)
    assert small.float().abs().max() == torch.finfo(torch.float8_e4m3fn).max
    torch.testing.assert_close(small.float() * scale, x, rtol=0.07, atol=float(x.abs().max()) / 500)


def test_fp8_takes_part_in_every_layer_but_embedding_and_head() -> None:
    model = new_model(compose(["model=llama", "model.width=64", "model.heads=4", "model.depth=2", "model.context_length=32"]).model, 301, 0)
    tokens = torch.randint(0, 301, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), autocast(CPU, "bf16"):
        expected = model(tokens)
        in_precision(model, "fp8")
        found = model(tokens)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 8
    assert all(isinstance(m, Linear) and m.product is fp8_linear for m in layers)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize(
    ("machine", "more", "sentence"),
    [
        (Machine(devices=("cpu",), cpu_bf16=True), (), r"hardware\.precision=fp8 needs a GPU with 8-bit products"),
        (replace(CARD, gpu_fp8=False), (), r"hardware\.precision=fp8 needs a GPU with 8-bit products"),
        (CARD, ("model.width=72", "model.heads=3"), r"model\.width=72 is no multiple of 16"),
        (CARD, ("model.context_length=40", "trainer.batch_tokens=80"), r"model\.context_length=40 is no multiple of 16"),
        (CARD, ("hardware/strategy=fsdp",), r"hardware\.precision=fp8 .* use ddp or bf16"),
    ],
)
def test_fp8_without_what_it_needs_is_refused(machine: Machine, more: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(compose(["hardware.precision=fp8", *more]), machine)


def test_fp8_on_a_card_that_has_it_is_taken() -> None:
    assert resolve(compose(["hardware.precision=fp8"]), CARD).hardware.precision == "fp8"


@pytest.mark.parametrize("recipe", ["nano", "speedrun", "llama"])
def test_pure_bf16_rounds_every_parameter_and_no_angle(recipe: str) -> None:
    model = in_precision(new_model(compose([f"model={recipe}"]).model, 65, 0), "bf16_pure")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.bfloat16 not in {b.dtype for b in model.buffers()}
    logits = model(torch.zeros(1, 8, dtype=torch.long))
    assert logits.dtype == torch.bfloat16


def test_a_pure_bf16_run_resumes_bit_for_bit_and_halves_its_weights(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = tiny(corpus_file, "hardware.precision=bf16_pure", "model/position=rotary")
    whole = train(compose(overrides)).run
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "other"))
    monkeypatch.setattr(SignalAt, "fired", False)
    interrupted = [*overrides, "+callback@callbacks.stop=signal_at"]
    with pytest.raises(Stopped):
        train(compose(interrupted))
    second = train(compose(interrupted)).run
    assert whole is not None
    assert second is not None
    assert [m.get("train/loss") for m in second.metrics()] == [m.get("train/loss") for m in whole.metrics()]
    newest = max((whole.directory / "checkpoints").glob("step-*"))
    with safe_open(newest / "model.safetensors", framework="pt") as file:  # type: ignore[no-untyped-call]
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.slow
def test_half_precision_follows_the_curve_of_fp32(shared_text: Callable[[str], Path], tmp_path: Path) -> None:
    """300 steps: bf16, fp16 with its loss scaling (emulated here: `resolve` refuses it on a CPU), and fp8's products likewise."""
    small = ["model.width=64", "model.depth=2", "model.heads=2", "trainer.batch_tokens=512", "trainer.budget=300steps", "tracker=none"]
    base = compose(["data=shakespeare", f"data.corpus.path={shared_text('tinyshakespeare.txt')}", *small])
    data = prepare(base.data)
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16", "fp16", "fp8", "bf16_pure"):
        config = resolve(replace(base, callbacks={}), Machine(devices=("cpu",)))
        config = replace(config, hardware=replace(config.hardware, precision=precision))
        trainer: Any = Trainer(config, data, Run(tmp_path / precision))
        trainer.model.train()
        losses[precision] = []
        for number in range(300):
            losses[precision].append(trainer.train_step(trainer.loader.batch(number))["train/loss"])
            trainer.state.step += 1
    for precision, bound in (("bf16", 0.01), ("fp16", 0.01), ("fp8", 0.02), ("bf16_pure", 0.02)):
        apart = [abs(a / b - 1) for a, b in zip(losses[precision], losses["fp32"], strict=True)]
        assert 0 < max(apart) < bound, precision
