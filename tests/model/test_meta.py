"""A model without memory: the shapes of one with it, counted without what torch needs to compute."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from gptlab.config.compose import compose
from gptlab.config.registry import components, load_components
from gptlab.model.transformer import Transformer, meta_model, new_model
from gptlab.runner.contract_model import VOCABULARY

load_components()


def positions() -> list[str]:
    return [component.name for component in components() if component.slot.path == "model/position"]


@pytest.mark.parametrize("position", positions())
def test_a_model_without_memory_has_the_shapes_of_one_with_it(position: str) -> None:
    config = compose(["model=nano", f"model/position={position}"]).model
    without, real = meta_model(config, VOCABULARY), new_model(config, VOCABULARY, seed=0)

    def shapes(model: Transformer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(t.shape), t.dtype) for name, t in [*model.named_parameters(), *model.named_buffers()]}

    assert shapes(without) == shapes(real)
    assert all(t.is_meta for t in [*without.parameters(), *without.buffers()])


def test_counting_a_model_imports_no_compiler() -> None:
    count = f"""
        import sys
        from gptlab.config.compose import compose
        from gptlab.model.transformer import count_parameters, meta_model
        for position in {positions()}:
            assert count_parameters(meta_model(compose(["model=nano", f"model/position={{position}}"]).model, 65))["total"]
        print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(count)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", "they take a second"
