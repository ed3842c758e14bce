"""`gptlab bench train`, against a stand-in with nanoGPT's interface."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptlab.cli import bench, bench_parts
from gptlab.config.errors import ConfigError
from tests.cli.conftest import Command

TINY = ("model.width=16", "model.depth=1", "model.heads=2", "model.context_length=16", "trainer.batch_tokens=64")

STAND_IN = """
import json
from dataclasses import asdict, dataclass
from pathlib import Path
import torch
from torch import nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        self.sizes, self.told = asdict(config), False
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, tokens, targets):
        if not self.told:
            Path(__file__).with_name("seen.json").write_text(json.dumps({"sizes": self.sizes, "batch": list(tokens.shape)}))
        self.told = True
        logits = self.table(tokens)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (bench, "ROUND_SECONDS", 0.05),
        (bench, "ALONE_SECONDS", 0.05),
        (bench, "TRACKED_STEPS", (20, 20)),
        (bench_parts, "CLOCKED_SECONDS", 0.1),
        (bench_parts, "PROFILED_SECONDS", 0.05),
        (bench_parts, "PRODUCT_SECONDS", 0.01),
        (bench_parts, "SQUARE", {"cpu": 64}),
    ):
        monkeypatch.setattr(module, name, value)


def test_both_are_timed_in_turn_and_the_ratio_is_theirs_over_ours(gptlab: Command, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(STAND_IN)
    result = gptlab("bench", "train", "model.depth=1", "--against", str(tmp_path), "--rounds", "3", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert set(report["step_ms"]) == {"gptlab fp32", "nanoGPT fp32"}
    assert report["ratio"]["lowest"] <= report["ratio"]["median"] <= report["ratio"]["highest"]
    assert report["ratio"]["median"] < 1, "a table of pairs is faster than a Transformer"
    assert report["tokens_per_step"] == 768
    assert report["tokens_per_second"]["gptlab fp32"] == pytest.approx(768 / report["step_ms"]["gptlab fp32"] * 1000)
    assert set(report["breakdown"]) >= {"phases_ms", "kinds_ms", "update_share", "limit"}


def test_what_an_override_changes_reaches_the_other_side(gptlab: Command, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(STAND_IN)
    given = ("model.dropout=0.1", "model.bias=true", "hardware.micro_batch=2", "hardware.precision=bf16", "optimizer=sgd")
    result = gptlab("bench", "train", *TINY, *given, "--against", str(tmp_path), "--rounds", "1", "--json")
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["step_ms"]) == {"gptlab bf16", "nanoGPT fp32", "nanoGPT bf16"}
    seen = json.loads((tmp_path / "seen.json").read_text())
    vocabulary = seen["sizes"].pop("vocab_size")
    assert vocabulary > 50
    assert seen["sizes"] == {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.1, "bias": True}
    assert seen["batch"] == [2, 16], "64 tokens in micro-batches of two rows"


def test_ours_alone_says_where_a_step_goes_in_100_columns(gptlab: Command) -> None:
    result = gptlab("bench", "train", "--rounds", "1", "optimizer=muon", "+callback@callbacks.ema=ema", *TINY)
    assert result.code == 0, result.err
    for words in ("tokens/s", "a step by phase", "a step by operator", "the update takes", "need at least", "GFLOP/s", "add"):
        assert words in result.out
    assert max(len(line.rstrip()) for line in result.out.splitlines()) <= 100


@pytest.mark.parametrize("mfu", [None, 0.5])
def test_the_figures_of_a_large_model_fit_100_columns(mfu: float | None, capsys: pytest.CaptureFixture[str]) -> None:
    phases = dict.fromkeys((*bench_parts.PHASES, bench_parts.REST), 12345.678)
    limit = {
        "products_gflop": 427_819.1,
        "precision": "bf16",
        "square": 8192,
        "square_gflops": {"bf16": 789_123.4, "fp32": 401_234.5},
        "own_shapes_gflops": 654_321.0,
        "least_ms": 12345.67,
        "own_shapes_least_ms": 12345.67,
        "achieved_gflops": 494_500.0,
        "mfu": mfu,
    }
    found = {"bare_step_ms": 12345.67, "clocked_step_ms": 12345.67, "clocks_add": -0.5, "phases_ms": phases, "phases_share": phases}
    found |= {"kinds_ms": phases, "kinds_share": phases, "profiled_step_ms": 12345.67, "update_ms": 12345.67, "update_share": 0.99}
    bench_parts.show(found | {"limit": limit}, 578_000.0)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100, max(lines, key=len)
    assert ("(MFU)" in lines[-1]) == (mfu is not None)
    assert any("50 % less than without clocks" in line for line in lines)


def test_the_profilers_own_lines_reach_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    with bench_parts._silent():
        os.write(2, b"profiler_start")
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


def test_the_phases_make_up_the_step_and_the_operators_the_bare_one(gptlab: Command) -> None:
    backward = torch.Tensor.backward
    result = gptlab("bench", "train", "--rounds", "1", "--json", *TINY)
    assert result.code == 0, result.err
    assert torch.Tensor.backward is backward, "what was wrapped for the clocks is as before"
    found: dict[str, Any] = json.loads(result.out)["breakdown"]
    phases = found["phases_ms"]
    assert all(phases[name] > 0 for name in ("batch", "forward", "backward", "clipping", "update", "the rest"))
    assert sum(phases.values()) == pytest.approx(found["clocked_step_ms"])
    assert sum(found["phases_share"].values()) == pytest.approx(1)
    assert found["update_ms"] == phases["update"]
    assert found["clocks_add"] == pytest.approx(found["clocked_step_ms"] / found["bare_step_ms"] - 1)
    kinds = found["kinds_ms"]
    assert sum(kinds.values()) == pytest.approx(found["bare_step_ms"], rel=1e-6)
    for kind in ("matrix products", "attention kernel", "normalisation", "loss", "embedding and gather", "optimizer and clipping"):
        assert kinds[kind] > 0, kind
    bound = found["limit"]
    assert bound["least_ms"] == pytest.approx(1000 * bound["products_gflop"] / bound["square_gflops"]["fp32"])
    assert bound["own_shapes_least_ms"] == pytest.approx(1000 * bound["products_gflop"] / bound["own_shapes_gflops"])
    assert bound["achieved_gflops"] == pytest.approx(1000 * bound["products_gflop"] / found["bare_step_ms"])
    assert bound["mfu"] is None, "no peak is known of a CPU"


def test_a_slow_phase_shows_as_that_phase(gptlab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            time.sleep(seconds)
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(torch.optim.SGD, "step", slow(torch.optim.SGD.step, 0.02))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", slow(torch.nn.utils.clip_grad_norm_, 0.01))
    result = gptlab("bench", "train", "--rounds", "1", "--json", *TINY, "optimizer=sgd")
    assert result.code == 0, result.err
    found = json.loads(result.out)["breakdown"]
    assert found["phases_ms"]["update"] > 20
    assert found["update_share"] > 0.4
    assert 10 < found["phases_ms"]["clipping"] < 20
    assert found["kinds_share"]["Python and launching"] > 0.5, "sleeping is no operator's time"


def _event(name: str, us: float = 0.0, parent: Any = None, *, kernels: tuple[float, ...] = (), device: str = "CPU") -> Any:
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        self_cpu_time_total=us,
        kernels=[SimpleNamespace(duration=k) for k in kernels],
        device_type=SimpleNamespace(name=device),
        is_user_annotation=name.startswith("phase"),
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )


def test_an_operator_within_another_is_of_the_outer_kind() -> None:
    linear, update = _event("aten::linear", 1.0), _event("phase update", 50.0)
    backward = _event("autograd::engine::evaluate_function: MmBackward0", 7.0, _event("phase backward"))
    graph = _event("## Call CompiledFxGraph fa3 ##", 30.0, _event("Torch-Compiled Region: 0/0", 9.0))
    events = [
        *(linear, _event("aten::t", 2.0, linear), _event("aten::addmm", 40.0, linear)),
        *(update, _event("aten::bmm", 5.0, update)),
        *(backward, _event("aten::mm", 60.0, backward)),
        *(graph, _event("aten::mm", 20.0, graph), _event("aten::gelu", 3.0), _event("aten::copy_", 4.0)),
    ]
    assert bench_parts.by_kind(events, on_gpu=False) == {
        "matrix products": 1 + 2 + 40 + 60 + 20,
        "optimizer and clipping": 5,
        "fused by torch.compile": 30,
        "activation and elementwise": 3,
        "copies and layout": 4,
    }


def test_on_a_gpu_kernels_count_for_what_launched_them() -> None:
    linear = _event("aten::linear", 9.0)
    kernels = {"nvjet_tst": 30.0, "splitK": 2.0, "elementwise": 5.0, "triton_poi": 11.0}
    events = [
        *(linear, _event("aten::addmm", 9.0, linear, kernels=(30.0, 2.0)), _event("aten::gelu", 9.0, kernels=(5.0,))),
        *(_event(name, us, device="CUDA") for name, us in kernels.items()),
        _event("phase forward", 48.0, device="CUDA"),
    ]
    found = bench_parts.by_kind(events, on_gpu=True)
    assert found == {"matrix products": 32, "activation and elementwise": 5, "fused by torch.compile": 11}


def test_of_a_sweep_the_first_point_is_timed() -> None:
    name, settings, note = bench._settings(["experiment=norm", "model.width=16"], None)
    assert (name, note) == ("experiment=norm", "of a sweep its first point is timed: model/norm=layernorm seed=0")
    assert {"experiment=norm", "model/norm=layernorm", "seed=0", "model.width=16"} == set(settings)
    assert bench._settings(["experiment=norm", "seed=4"], None)[2].endswith("timed: model/norm=layernorm")
    assert bench._settings(["optimizer=muon,adamw"], None)[2].endswith("timed: optimizer=muon")
    assert bench._settings(["model/ffn=swiglu"], "char") == (
        "char",
        ["model=char", "trainer.batch_tokens=16384", "model/ffn=gelu_exact", "model/ffn=swiglu"],
        "",
    )
    assert bench._settings(["model=char"], None)[1][:2] == ["model=char", "trainer.batch_tokens=16384"], "nanoGPT's setting of that recipe"
    with pytest.raises(ConfigError, match="makes up its own"):
        bench._settings(["hydra.mode=MULTIRUN", "hydra.sweeper._target_=optuna"], None)


def test_what_cannot_be_timed_is_refused_in_a_sentence(gptlab: Command, tmp_path: Path) -> None:
    result = gptlab("bench", "train", "--against", str(tmp_path), *TINY)
    assert result.code == 2
    assert "holds no model.py" in result.err
    (tmp_path / "model.py").write_text("raise RuntimeError('broken')")
    broken = gptlab("bench", "train", "--against", str(tmp_path), *TINY)
    assert broken.code == 2
    assert "could not be trained" in broken.err
    for arguments, words in (
        (["--rounds", "0"], "--rounds 0"),
        (["muon"], "'muon' is not an override"),
        (["optimizer=moun"], "did you mean muon?"),
        (["--model", "char", "model=nano"], "--model char and model=nano differ"),
        (["data=copy", "--against", str(tmp_path), *TINY], "try data=text"),
    ):
        refused = gptlab("bench", "train", *arguments)
        assert refused.code == 2, arguments
        assert words in refused.err
        assert refused.err.count("\n") == 1, refused.err


def test_generation_is_timed_at_each_batch_beside_transformers_of_the_same_shape(gptlab: Command) -> None:
    ours = ["bench", "generate", "--precision", "fp32", "--json"]
    told = json.loads(gptlab(*ours, "--model", "nano", "--tokens", "3", "--rounds", "2", "--batch", "1", "--batch", "3").out)
    assert [row["batch"] for row in told["rows"]] == [1, 3]
    assert all(row["share_of_limit"] > 0 and min(row["tokens_per_second"].values()) > 0 for row in told["rows"])
    both = importlib.util.find_spec("transformers") is not None
    assert all(any(n.startswith("transformers") for n in row["ratio"]) == both for row in told["rows"])
    assert bool(told["note"]) != both
    alone = json.loads(gptlab(*ours, "--model", "char", "--tokens", "1", "--rounds", "1", "--batch", "1").out)
    assert list(alone["rows"][0]["tokens_per_second"]) == ["gptlab fp32"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--tokens", "5000"], "at most 1008 fit the context of gpt2"),
        (["--model", "nano", "--tokens", "4", "--precision", "fp64"], "--precision fp64 is not one of fp32, bf16, int8"),
    ],
)
def test_what_cannot_be_generated_is_refused(gptlab: Command, arguments: list[str], told: str) -> None:
    found = gptlab("bench", "generate", *arguments)
    assert (found.code, found.out) == (2, "")
    assert told in " ".join(found.err.split())
