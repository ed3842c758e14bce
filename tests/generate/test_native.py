"""Products in C: torch's own, for any count of rows and any width, and built anew for what they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptlab.generate import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")

WIDTHS = [1, 15, 32, 37, 64, 342, 768]
ROWS = [1, 2, 3, 4, 5, 8, 9, 17]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_the_product_rounded_once(rows: int, width: int) -> None:
    torch.manual_seed(rows)
    for outputs in (1, 7, 16, 131):
        matrix, bias, x = torch.randn(outputs, width), torch.randn(outputs).bfloat16(), torch.randn(rows, 1, width).bfloat16()
        exact = x.double() @ matrix.bfloat16().double().t()
        torch.testing.assert_close(native.Product(matrix.bfloat16())(x), exact.bfloat16(), rtol=2**-7, atol=1e-4)
        numbers, scale = torch.randint(-127, 128, (outputs, width), dtype=torch.int8), torch.rand(outputs)
        exact = x.double() @ (numbers.double() * scale[:, None].double()).t() + bias.double()
        torch.testing.assert_close(native.Product(numbers, scale)(x, bias), exact.bfloat16(), rtol=2**-7, atol=1e-2)


def test_numbers_that_are_none_and_those_beyond_the_format_are_as_in_torch() -> None:
    matrix = torch.tensor([[torch.nan, 0], [torch.inf, 1], [3e38, 3e38], [1e-40, 0], [1.0, 2**-9]]).bfloat16()
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    torch.testing.assert_close(native.Product(matrix)(x)[0], (matrix.float() @ x[0].float()).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_rows_that_do_not_lie_side_by_side_are_read_where_they_are() -> None:
    matrix, x = torch.randn(20, 32).bfloat16(), torch.randn(3, 5, 32).bfloat16()
    assert torch.equal(native.Product(matrix)(x[:, -1]), native.Product(matrix)(x[:, -1].contiguous()))


def test_threads_share_a_matrix_and_leave_nothing_out() -> None:
    matrix, x = torch.randn(1003, 96).bfloat16(), torch.randn(2, 96).bfloat16()
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(native.Product(matrix)(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, made[0]) for one in made)


def test_it_is_built_once_for_a_compiler_and_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path))
    for cpu in ("one", "one", "another"):
        monkeypatch.setattr(native, "_cpu", lambda cpu=cpu: cpu)
        native.library.__wrapped__()
    assert len(list((tmp_path / "native").iterdir())) == 2
