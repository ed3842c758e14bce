"""`gptlab plan`: what it prints, what it refuses, and that nothing is trained or kept."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.resolve import resolve
from gptlab.data.prepare import prepare
from gptlab.hardware.device import machine
from gptlab.runner import forecast as forecasting
from gptlab.runner.memory import forecast_memory
from tests.cli.conftest import Command
from tests.tiny import tiny

plan = importlib.import_module("gptlab.cli.plan")  # the package's own `plan` is the command


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TIMED_SECONDS", 1.0)
    monkeypatch.setattr(plan, "MEASURED_STEPS", (4, 4))
    monkeypatch.setattr(forecasting, "MOST_STEPS", 5)


@pytest.fixture
def prepared(corpus_file: Path) -> list[str]:
    """Overrides of a tiny run whose data are there."""
    overrides = tiny(corpus_file)
    prepare(compose(overrides).data)
    return overrides


def test_a_plan_says_parameters_memory_time_and_cost_and_makes_no_run(gptlab: Command, prepared: list[str], tmp_path: Path) -> None:
    result = gptlab("plan", *prepared, "--price", "$2/h")
    assert result.code == 0, result.err
    for part in ("token embedding", "attention", "feed-forward", "weights", "optimizer state", "fits: ", "12 steps of", "cost: $0.00"):
        assert part in result.out
    assert not (tmp_path / "runs").exists()


def test_a_plan_as_json_adds_up(gptlab: Command, prepared: list[str]) -> None:
    (made,) = json.loads(gptlab("plan", *prepared, "--json", "--price", "36 EUR/h").out)
    assert made["steps"] == 12
    assert made["tokens"] == 12 * 64
    assert made["flops"] == made["tokens"] * made["flops_per_token"]
    memory = made["memory"]
    assert sum(v for k, v in memory.items() if k not in ("moment", "total")) == memory["total"]
    assert made["cost"] == pytest.approx(made["seconds"]["total"] * 0.01)
    assert made["fits"] is True


def test_a_sweep_names_every_number_format(gptlab: Command, prepared: list[str]) -> None:
    result = gptlab("plan", "-m", *prepared, "hardware.precision=fp32,bf16")
    assert "2 runs: cpu, fp32 and bf16" in result.out


def test_a_run_that_diverges_is_planned_all_the_same(gptlab: Command, prepared: list[str]) -> None:
    assert gptlab("plan", *prepared, "optimizer.learning_rate=1e30").code == 0


def test_a_sweep_has_a_row_a_point_and_seeds_are_forecast_once(
    gptlab: Command, prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = plan.forecast
    monkeypatch.setattr(plan, "forecast", lambda config, *a, **k: calls.append(config.model.width) or real(config, *a, **k))
    result = gptlab("plan", "-m", *prepared, "model.width=16,32", "seed=0,1", "--card", "H100", "--price", "3/h")
    assert result.code == 0, result.err
    assert sorted(calls) == [16, 32]
    assert result.out.count("width=16") == result.out.count("width=32") == 2
    assert "together" in result.out
    assert "at most" in result.out


def test_a_stream_is_planned_for_a_card_without_its_data(gptlab: Command, empty_home: Path, tiktoken_cache: Path) -> None:
    result = gptlab("plan", "data=fineweb_edu", "model=gpt2", "model.depth=1", "trainer.budget=1Btokens", "--card", "a100 40gb", "--json")
    assert result.code == 0, result.err
    (made,) = json.loads(result.out)
    assert made["epochs"] is None
    assert made["device"] == "A100 40GB"
    assert not (empty_home / "data").exists()


def test_a_stream_is_timed_on_random_tokens(gptlab: Command, empty_home: Path) -> None:
    small = ["model.width=16", "model.depth=1", "model.heads=2", "model.context_length=16", "trainer.batch_tokens=64"]
    result = gptlab("plan", "data=fineweb_edu", "data/tokenizer=byte", *small)
    assert result.code == 0, result.err
    assert "on random tokens" in result.out


def test_what_will_not_fit_says_what_would(gptlab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = ["data=copy", "model.depth=1", "trainer.batch_tokens=65536", "hardware.micro_batch=1024", "~callbacks.evaluation"]
    monkeypatch.setattr(plan, "resident_memory", lambda: 300 << 20)
    total = forecast_memory(resolve(compose(wide), machine()), 64, process=300 << 20).total
    monkeypatch.setattr(forecasting, "device_memory", lambda device: total)  # of which four fifths may be used
    result = gptlab("plan", *wide)
    assert result.code == 0, result.err
    assert "does not fit" in result.out
    assert "would fit, with" in result.out
    assert "hardware.micro_batch=" in result.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--price", "1.29"), "--price 1.29 has no unit"),
        (("--price", "cheap/h"), "--price cheap/h has no unit"),
        (("--card", "H999"), "there are H200, H100 PCIe, H100"),
        (("--mfu", "0"), "--mfu 0.0 is a share"),
        (("--mfu", "1.5"), "--mfu 1.5 is a share"),
        (("--measure", "--card", "H100"), "give one of them"),
        (("--measure", "seed=0,1"), "--measure trains one run"),
        (("hydra/sweeper=nothing",), "hydra/sweeper"),
        (("model.detph=3",), "depth"),
    ],
)
def test_a_wrong_argument_is_exit_2_and_one_sentence(gptlab: Command, prepared: list[str], arguments: tuple[str, ...], said: str) -> None:
    result = gptlab("plan", *prepared, *arguments)
    assert result.code == 2
    assert said in result.err
    assert result.err.count("\n") == 1


def test_data_that_are_not_prepared_are_exit_2_and_say_how(gptlab: Command, corpus_file: Path, empty_home: Path) -> None:
    result = gptlab("plan", *tiny(corpus_file))
    assert result.code == 2
    assert "not prepared" in result.err
    assert "gptlab data prepare" in result.err
    result = gptlab("plan", "data=fineweb_edu", "data/tokenizer=byte", "trainer.budget=2epochs")
    assert result.code == 2
    assert "gptlab data prepare" in result.err
    assert not (empty_home / "data").exists()


def test_a_price_is_read_however_it_is_written() -> None:
    assert plan.parse_price("1.29/h").of(3600) == "1.29"
    assert plan.parse_price("$1.29/h").of(7200) == "$2.58"
    assert plan.parse_price("2 EUR / hour").of(1800) == "1.00 EUR"
    assert plan.parse_price("€24/day").of(3600) == "€1.00"
    with pytest.raises(ConfigError, match="no unit"):
        plan.parse_price("-1/h")


@pytest.mark.slow
def test_measure_shows_the_forecast_beside_what_a_process_took(gptlab: Command, prepared: list[str]) -> None:
    result = gptlab("plan", *prepared, "--measure", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["predicted"]["memory"] == pytest.approx(found["measured"]["memory"], rel=0.25)
    assert found["measured"]["step"] > 0
    assert not os.path.exists("runs")
