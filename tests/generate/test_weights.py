"""Rounded weights: near the model's own logits, held once, and read beyond no row's end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptlab import compose
from gptlab.config.errors import ConfigError
from gptlab.config.product import cpu_multiplies_bf16
from gptlab.generate import native, weights
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling
from gptlab.generate.weights import for_generation, held_bytes
from gptlab.model.transformer import Transformer, new_model

VOCABULARY = 61
X = torch.randint(VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(0))


def model(*overrides: str) -> Transformer:
    small = ["model.width=48", "model.heads=3", "model.depth=2", "model.context_length=24", "model.dropout=0"]
    return new_model(compose([*small, *overrides]).model, VOCABULARY, 0).eval()


PARTS = ["model/norm=layernorm", "model/position=rotary", "model/head=untied", "model/ffn=swiglu", "model.width=36"]
NO_BF16 = pytest.mark.skipif(not cpu_multiplies_bf16(), reason="no bf16 products on this CPU")


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=NO_BF16), "int8"])
@pytest.mark.parametrize("part", PARTS)
@torch.inference_mode()
def test_logits_stay_near_and_texts_come_out(precision: str, part: str) -> None:
    own = model(part)(X)
    made = for_generation(model(part), precision)
    for rows in (X, X[:1, :1], X[:2, :1]):  # many rows go another way than one
        error = (made(rows).float() - own[: len(rows), : rows.shape[1]]).abs().max()
        assert error < (0.05 if precision == "bf16" else 0.1) * own.std()
    assert len(list(generate(made, [[1, 2], [3]], Sampling(max_tokens=5)))) == 10


def test_int8_is_within_half_a_step_of_each_rows_scale() -> None:
    matrix = torch.randn(20, 37) * torch.logspace(-3, 1, 20)[:, None]
    product = weights._Int8(matrix)
    held = product._weight[:, :37].float() * product._scale.float()[:, None]
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((held - matrix).abs() <= step / 2 + matrix.abs() * 2**-8).all()  # the scale itself is rounded to bf16
    x = torch.randn(1, 37, dtype=torch.bfloat16)
    expected = x.float() @ held.t()
    torch.testing.assert_close(product(x, matrix).float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("width", [1, 15, 16, 37, 342])
def test_no_width_reads_what_is_not_its_own(width: int) -> None:
    for _ in range(20):
        product = weights._Int8(torch.ones(5, width))
        torch.full((4096,), torch.nan, dtype=torch.bfloat16)  # what lies in freed memory
        assert product(torch.ones(1, width, dtype=torch.bfloat16), torch.empty(0)).isfinite().all()


@NO_BF16
def test_a_matrix_is_held_once() -> None:
    made = for_generation(model("model/head=untied"), "bf16")
    total = sum(p.numel() for p in made.parameters())
    assert held_bytes(made) == 2 * total == held_bytes(model("model/head=untied")) / 2
    assert made.blocks[0].attention.qkv.product._weight.data_ptr() == made.blocks[0].attention.qkv.weight.data_ptr()  # type: ignore[union-attr]
    assert made.head.multiply._weight.data_ptr() == made.head.weight.data_ptr()  # type: ignore[union-attr]
    assert held_bytes(for_generation(model(), "int8")) < 0.6 * 2 * sum(p.numel() for p in model().parameters())


@NO_BF16
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.inference_mode()
def test_without_a_compiler_it_says_so_and_the_products_are_torchs(precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = model()(X)
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path))
    for compiler in ("/no/compiler", "false"):  # none at all, and one that fails
        monkeypatch.setenv("CC", compiler)
        native.available.cache_clear()
        native.library.cache_clear()
        with pytest.warns(native.NativeWarning, match="product.c could not be built"):
            made = for_generation(model(), precision)
    monkeypatch.undo()
    native.available.cache_clear()
    for rows in (X, X[:1, :1], X[:2, :1]):
        error = (made(rows).float() - own[: len(rows), : rows.shape[1]]).abs().max()
        assert error < (0.05 if precision == "bf16" else 0.1) * own.std()


def test_bf16_without_instructions_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "cpu_multiplies_bf16", lambda: False)
    with pytest.raises(ConfigError, match="--precision bf16: this CPU has no bf16 products"):
        for_generation(model(), "bf16")


def test_fp32_changes_nothing_and_another_name_is_refused() -> None:
    made = model()
    before = made(X)
    assert torch.equal(for_generation(made, "fp32")(X), before)
    with pytest.raises(ConfigError, match="--precision fp64 is not one of fp32, bf16, int8"):
        for_generation(made, "fp64")
