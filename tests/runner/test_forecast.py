"""A run's memory, work and micro-batch before it begins, held against what the real thing holds and counts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component, register
from gptlab.config.resolve import Machine, resolve
from gptlab.config.schema import Config
from gptlab.data.prepare import find_prepared, prepare
from gptlab.hardware.cards import CARDS, card_named
from gptlab.model import path
from gptlab.model.transformer import PARTS, count_parameters, meta_model, parameters_by_part
from gptlab.runner import forecast as forecasting
from gptlab.runner import memory as memories
from gptlab.runner.log import memory_advice
from gptlab.runner.memory import Memory, at_most, fit_micro_batch, forecast_memory, what_fits
from tests.tiny import tiny

CPU = Machine(devices=("cpu",))
GPU = Machine(devices=("cuda", "cpu"), gpu_bf16=True)
SMALL = ("data=copy", "model=nano", "model.depth=1", "trainer.batch_tokens=2048")
TRAINED = "~callbacks.evaluation"  # so that training is what holds most


def _config(*overrides: str, machine: Machine = CPU) -> Config:
    return resolve(compose([*SMALL, *overrides]), machine)


def _memory(*overrides: str, vocabulary: int = 4000, machine: Machine = CPU) -> Memory:
    return forecast_memory(_config(*overrides, machine=machine), vocabulary, process=0)


def test_weights_gradients_and_state_are_those_of_the_real_optimizer() -> None:
    made = _memory("hardware.micro_batch=8", TRAINED)
    parameters = count_parameters(meta_model(_config().model, 4000))["total"]
    for held, times in ((made.weights, 1), (made.gradients, 1), (made.optimizer, 2)):
        assert held == pytest.approx(4 * times * parameters, rel=0.01)
    assert _memory("optimizer=sgd", "hardware.micro_batch=8").optimizer == pytest.approx(4 * parameters, rel=0.01)
    assert _memory("optimizer=adafactor", "hardware.micro_batch=8").optimizer < 0.2 * parameters


def test_the_parts_add_up_to_the_total() -> None:
    for overrides in ((), ("hardware.micro_batch=1", TRAINED), ("+callback@callbacks.ema=ema",)):
        made = _memory(*overrides)
        parts = (made.weights, made.gradients, made.optimizer, made.activations, made.logits, made.copies, made.process, made.gaps)
        assert sum(parts) == made.total
        assert min(parts) >= 0


def test_nothing_is_allocated_and_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    made = _memory("model=gpt2_xl", "trainer.batch_tokens=8192", "model.depth=2", vocabulary=50257)
    assert made.total > 4e9
    assert memories.resident_memory() < 3e9
    assert torch.equal(before, torch.get_rng_state())


def test_an_evaluation_counts_where_it_holds_most() -> None:
    made = _memory("hardware.micro_batch=1")
    assert made.moment == "evaluation"
    assert made.total > _memory("hardware.micro_batch=1", TRAINED).total
    assert made.logits >= 8192 * 4000 * 4


def test_the_naive_kernel_holds_its_scores_and_the_fused_one_does_not() -> None:
    plain, fused = (_memory(f"model/kernel={k}", "hardware.micro_batch=8", "model.context_length=256", TRAINED) for k in ("naive", "sdpa"))
    scores = 4 * 4 * 8 * 256 * 256  # a map of fp32 for each head
    assert plain.activations - fused.activations > scores


@pytest.mark.parametrize("option", ["objective.chunk=64", "hardware/checkpointing=selective", "hardware/checkpointing=block"])
def test_what_saves_memory_is_forecast_to_save_it(option: str) -> None:
    base = ("hardware.micro_batch=32", "model.context_length=64", TRAINED)
    saving, plain = _memory(option, *base), _memory(*base)
    assert saving.activations + saving.logits < 0.96 * (plain.activations + plain.logits)


def test_dropout_and_every_precision_of_the_cpu_can_be_forecast() -> None:
    assert _memory("model.dropout=0.1", TRAINED).activations > _memory(TRAINED).activations  # the masks
    assert _memory("hardware.precision=bf16_pure", "hardware.micro_batch=8").weights < 0.6 * _memory("hardware.micro_batch=8").weights
    assert _memory("hardware.precision=bf16").total > 0


def test_a_gpu_is_forecast_without_one_by_its_own_paths() -> None:
    made = _memory("hardware.device=cuda", "model.dropout=0.1", "model.context_length=256", "hardware.micro_batch=8", TRAINED, machine=GPU)
    assert made.copies == made.gaps == 0  # a checkpoint's copy lies elsewhere
    written_out = _memory("model.dropout=0.1", "model.context_length=256", "hardware.micro_batch=8", "hardware.precision=bf16", TRAINED)
    assert made.activations < written_out.activations  # the CPU writes the pattern out for dropout
    assert not path._elsewhere


def test_a_part_that_asks_for_values_is_refused_in_one_sentence() -> None:
    class Asking(torch.nn.Module):
        def forward(self, x: torch.Tensor, context: Any) -> torch.Tensor:
            return x[torch.nonzero(x > 0)[:, 0]].sum() + x

    @register("model/ffn", "asking_values")
    def asking(width: int) -> torch.nn.Module:
        return Asking()

    config = _config()
    asked = replace(config, model=replace(config.model, ffn=component("model/ffn", "asking_values").options()))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be forecast"):
        forecast_memory(asked, 100, process=0)


def test_what_fits_takes_the_mildest_change_that_fits() -> None:
    config = _config("hardware.micro_batch=32", TRAINED, "~callbacks.checkpoint")
    whole = forecast_memory(config, 4000, process=0)
    fit = what_fits(config, 4000, int(0.8 * whole.total), process=0)
    assert fit is not None
    assert len(fit.overrides) == 1
    assert fit.overrides[0].startswith("hardware.micro_batch=")
    assert fit.memory.total <= 0.8 * whole.total
    assert forecast_memory(fit.config, 4000, process=0) == fit.memory
    assert what_fits(config, 4000, 1000, process=0) is None


def test_what_fits_goes_on_to_chunks_and_checkpoints_where_one_row_is_too_much() -> None:
    config = _config("hardware.micro_batch=1", "model.context_length=2048", TRAINED, "~callbacks.checkpoint")
    room = forecast_memory(config, 4000, process=0).total - 1
    fit = what_fits(config, 4000, room, process=0)
    assert fit is not None
    assert not any("micro_batch" in o for o in fit.overrides)
    for override in fit.overrides:
        assert override in ("objective.chunk=1024", "hardware/checkpointing=selective", "hardware/checkpointing=block")


def test_auto_micro_batch_on_a_gpu_is_the_largest_divisor_that_fits() -> None:
    config = _config("hardware.device=cuda", TRAINED, machine=GPU)
    sizes = {n: _fixed(config, n) for n in (8, 16, 32)}
    chosen = fit_micro_batch(config, 4000, int(1.001 * sizes[8] / memories.USABLE["cuda"]))
    assert chosen.hardware.micro_batch == 8
    assert fit_micro_batch(config, 4000, 10 * sizes[32]).hardware.micro_batch == 32
    assert fit_micro_batch(config, 4000, 0) is config  # nobody knows the memory


def _fixed(config: Config, rows: int) -> int:
    return forecast_memory(replace(config, hardware=replace(config.hardware, micro_batch=rows)), 4000).total


def test_auto_micro_batch_on_the_cpu_shrinks_only_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(TRAINED)
    monkeypatch.setattr(memories, "forecast_memory", _never)
    assert fit_micro_batch(config, 100, 64 << 30) is config  # a small model costs no forecast
    monkeypatch.undo()
    room = _fixed(config, 8)
    assert int(fit_micro_batch(config, 4000, int(1.02 * room / memories.USABLE["cpu"])).hardware.micro_batch) <= 16


def _never(*given: object, **options: object) -> None:
    raise AssertionError("a forecast was made")


@pytest.mark.parametrize("overrides", [(), ("model/kernel=naive", "optimizer=muon"), ("model=char", "model.depth=1")])
def test_the_bound_that_saves_a_forecast_lies_above_it(overrides: tuple[str, ...]) -> None:
    config = _config(*overrides)
    assert at_most(config, 100, int(config.hardware.micro_batch)) > forecast_memory(config, 100).total


def test_parameters_by_part_are_all_the_parameters() -> None:
    for recipe in ("nano", "llama", "speedrun", "bigram"):
        model = meta_model(compose([f"model={recipe}"]).model, 300)
        found = parameters_by_part(model)
        assert sum(found.get(part, 0) for part in PARTS) == found["total"] == sum(p.numel() for p in model.parameters())
    found = parameters_by_part(meta_model(compose(["model=gpt2"]).model, 50257))
    assert found["total"] == 124_439_808
    assert found["token embedding"] == 50257 * 768
    assert "head" not in found  # tied
    experts = meta_model(compose(["model=nano"]).model, 300)
    experts.blocks[0].ffn.up.active_share = 0.5  # type: ignore[union-attr, assignment]
    cut = parameters_by_part(experts)
    assert cut["total"] - cut["active"] == pytest.approx(sum(p.numel() for p in experts.blocks[0].ffn.up.parameters()) / 2, abs=2)  # type: ignore[union-attr]


def test_prepared_data_are_found_and_never_made(corpus_file: Path, empty_home: Path) -> None:
    config = compose(tiny(corpus_file))
    assert find_prepared(config.data) is None
    assert not (empty_home / "data").exists()
    made = prepare(config.data)
    found = find_prepared(config.data)
    assert found is not None
    assert found.hash == made.hash


def test_steps_tokens_and_epochs_are_those_of_the_run(corpus_file: Path) -> None:
    config = compose(tiny(corpus_file, "trainer.budget=3epochs"))
    data = prepare(config.data)
    made = forecasting.forecast(config, data, seconds=0)
    assert made.seconds is None
    assert made.epochs == pytest.approx(3, abs=0.05)
    assert made.tokens == (made.steps or 0) * 64
    assert made.parameters["total"] == count_parameters(meta_model(made.config.model, data.vocabulary))["total"]


def test_a_forecast_leaves_the_process_as_it_was(corpus_file: Path) -> None:
    config = compose(tiny(corpus_file))
    data = prepare(config.data)
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    made = forecasting.forecast(config, data, seconds=0.3)
    assert made.seconds is not None
    assert made.seconds.total > made.seconds.training > 0
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_a_card_takes_its_flops_at_the_assumed_share(corpus_file: Path) -> None:
    config = compose(tiny(corpus_file))
    data = prepare(config.data)
    made = forecasting.forecast(config, data, card=card_named("h100"), mfu=0.5)
    assert made.seconds is not None
    assert made.seconds.training == pytest.approx((made.tokens or 0) * made.flops_per_token / (0.5 * 989e12))
    assert made.config.hardware.precision == "bf16"


def test_a_card_is_found_by_the_name_a_user_gives() -> None:
    assert {card_named(card.name) for card in CARDS} == set(CARDS)
    assert card_named("rtx4090").name == "RTX 4090"
    assert card_named("NVIDIA A100-SXM4-40GB").name == "A100 40GB"
    with pytest.raises(ConfigError, match="A100 40GB and A100 80GB"):
        card_named("A100")


def test_memory_advice_names_overrides_that_fit_by_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config()
    said = memory_advice(config, 4000, "step 3")
    assert "by forecast" in said
    assert "hardware.micro_batch=" in said
    monkeypatch.setattr(forecasting, "forecast_memory", _never)
    assert "hardware.micro_batch=16 (now 32" in memory_advice(config, 4000, "step 3")


MEASURE = """
import sys
from pathlib import Path
import torch
from gptlab.config.compose import compose
from gptlab.config.resolve import Machine, resolve
from gptlab.data.prepare import prepare
from gptlab.hardware.device import peak_memory, resident_memory
from gptlab.runner.memory import forecast_memory
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
config = resolve(compose(sys.argv[2:]), Machine(devices=("cpu",)))
data = prepare(config.data)
process = resident_memory()
trainer = Trainer(config, data, Run(Path(sys.argv[1])))
trainer.model.train()
for step in range(3):
    trainer.train_step(trainer.loader.batch(step))
    trainer.state.step += 1
found = peak_memory(torch.device("cpu"))
print(found, forecast_memory(config, data.vocabulary, process=process).total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["naive", "sdpa"])
def test_the_forecast_is_within_15_percent_of_what_a_process_holds(kernel: str, corpus_file: Path, tmp_path: Path) -> None:
    overrides = ["data=text", f"data.corpus.path={corpus_file}", "data/tokenizer=byte", "model=char", "trainer.batch_tokens=4096",
                 f"model/kernel={kernel}", TRAINED, "~callbacks.checkpoint", "tracker=none"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), *overrides], env=dict(os.environ), capture_output=True, text=True)
    measured, predicted = (int(n) for n in done.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.15)
