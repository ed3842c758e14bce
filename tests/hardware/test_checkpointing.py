"""Checkpointing changes what is held, and no number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptlab import compose, train
from gptlab.config import codec
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, register
from gptlab.config.resolve import Machine, resolve
from gptlab.data.loader import Batch
from gptlab.hardware.precision import autocast
from gptlab.model.ffn import GELU
from gptlab.model.transformer import Transformer, new_model
from gptlab.objective.lm import next_token_loss
from tests.tiny import tiny

CPU = torch.device("cpu")


def model(*overrides: str, recompute: str = "none") -> Transformer:
    small = ["model.width=32", "model.heads=4", "model.depth=2", "model.context_length=32"]
    made = new_model(compose([*overrides, *small]).model, 301, seed=0).train()
    made.recompute = build(component("hardware/checkpointing", recompute).options())
    return made


def batch() -> Batch:
    rows = torch.randint(0, 301, (4, 33), generator=torch.Generator().manual_seed(0))
    return Batch(rows[:, :-1], rows[:, 1:])


def step(made: Transformer, precision: str = "fp32") -> tuple[float, Tensor]:
    torch.manual_seed(1)
    with autocast(CPU, precision):
        loss = next_token_loss(made, batch()) / 128
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


class Products(TorchDispatchMode):
    """Counts matrix products and element-wise functions."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = self.activation = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.matrix += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.activation += func is torch.ops.aten.gelu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["nano", "speedrun", "llama"])
@pytest.mark.parametrize("recompute", ["block", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_gradients_are_those_without_it_dropout_and_all(recipe: str, recompute: str, precision: str) -> None:
    expected = step(model(f"model={recipe}", "model.dropout=0.1"), precision)
    found = step(model(f"model={recipe}", "model.dropout=0.1", recompute=recompute), precision)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_a_block_runs_twice_and_selective_repeats_no_product() -> None:
    counted = {}
    for recompute in ("none", "selective", "block"):
        made = model("model=nano", recompute=recompute)
        with Products() as counted[recompute]:
            step(made)
    assert [counted[r].activation for r in ("none", "selective", "block")] == [2, 4, 4]
    assert counted["none"].matrix == counted["selective"].matrix < counted["block"].matrix


def test_evaluation_is_left_alone() -> None:
    made, calls = model("model=nano"), []
    made.recompute = lambda layer, x: (calls.append(1), layer(x))[1]
    with torch.no_grad():
        made(batch().inputs)
    made.eval()
    made(batch().inputs)
    assert not calls
    made.train()(batch().inputs)
    assert len(calls) == 2


def test_compiled_it_equals_eager() -> None:
    made = model("model=nano", recompute="block")
    expected = step(made)
    made.zero_grad()
    loss = torch.compile(lambda: next_token_loss(made, batch()), backend="aot_eager")() / 128
    loss.backward()
    assert loss.item() == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None]), expected[1])


def test_a_run_with_it_is_the_same_run(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for recompute in ("none", "block", "selective"):
        monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / recompute))
        run = train(compose(tiny(corpus_file, f"hardware/checkpointing={recompute}", "model.dropout=0.1"))).run
        assert run is not None
        found.append((run.identity, [line.get("train/loss") for line in run.metrics()]))
    assert found[0] == found[1] == found[2]


def test_a_config_from_before_the_slot_reads_as_without() -> None:
    text = codec.to_json(compose([]))
    del text["config"]["hardware"]["checkpointing"]
    assert codec.from_json(json.loads(json.dumps(text)), "config.json") == compose([])


@register("model/ffn", "runs_once")
class RunsOnce(GELU):
    """A feed-forward that may not run twice."""

    forbids_checkpointing = True

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__(width, bias, dropout)


def test_a_component_that_forbids_it_is_named() -> None:
    config = compose(["hardware/checkpointing=block"])
    config = replace(config, model=replace(config.model, ffn=component("model/ffn", "runs_once").options()))
    with pytest.raises(ConfigError, match=r"hardware/checkpointing=block runs a block twice, which model/ffn=runs_once forbids"):
        resolve(config, Machine(devices=("cpu",)))
    resolve(replace(config, hardware=compose([]).hardware), Machine(devices=("cpu",)))
