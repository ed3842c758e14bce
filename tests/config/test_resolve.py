"""`resolve`: every auto becomes a value, and what this machine cannot do is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import yaml

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.resolve import Budget, Machine, parse_budget, resolve
from gptlab.config.schema import Config
from tests.change import transform

CPU = Machine(devices=("cpu",))
SIZES = {"batch_tokens": 1000, "epoch_tokens": 10_000, "parameters": 5_000, "flops_per_token": 100.0}


@functools.cache
def _base() -> Config:
    return compose([])


def _resolved(*settings: str, machine: Machine = CPU) -> Config:
    """The default run with these values, resolved."""
    config = _base()
    for setting in settings:
        key, _, value = setting.partition("=")
        config = transform(config, key, lambda _, value=value: yaml.safe_load(value))
    return resolve(config, machine)


@pytest.mark.parametrize(
    ("text", "budget", "steps"),
    [
        ("2000steps", Budget(2000, "steps"), 2000),
        ("1step", Budget(1, "steps"), 1),
        ("2ksteps", Budget(2000, "steps"), 2000),
        ("50Mtokens", Budget(50e6, "tokens"), 50_000),
        ("1500 tokens", Budget(1500, "tokens"), 2),
        ("1token", Budget(1, "tokens"), 1),
        ("3epochs", Budget(3, "epochs"), 30),
        ("0.5epochs", Budget(0.5, "epochs"), 5),
        (".5epoch", Budget(0.5, "epochs"), 5),
        ("10min", Budget(10, "min"), None),
        ("1e6flops", Budget(1e6, "flops"), 10),
        ("2Tflops", Budget(2e12, "flops"), 20_000_000),
        ("20x", Budget(20, "x"), 100),
        ("1Btokens", Budget(1e9, "tokens"), 1_000_000),
    ],
)
def test_a_budget_is_a_number_with_its_unit(text: str, budget: Budget, steps: int | None) -> None:
    assert parse_budget(text) == budget
    assert budget.steps(**SIZES) == steps


BAD = ["2000", "steps", "-3steps", "0steps", "0.5steps", "10hours", "1e3", "", "2 000steps", "nansteps", "infsteps", "1e999tokens"]


@pytest.mark.parametrize("text", BAD)
def test_a_bad_budget_is_refused_with_what_would_do(text: str) -> None:
    config = transform(_base(), "trainer.budget", lambda _: text)
    with pytest.raises(ConfigError, match=r"^trainer\.budget=.*(2000steps, 50Mtokens|must be a positive)"):
        resolve(config, CPU)


def test_auto_batch_is_twelve_contexts_and_divides() -> None:
    config = _resolved("model.context_length=64")
    assert config.trainer.batch_tokens == 12 * 64
    assert config.hardware.micro_batch == 12


def test_auto_micro_batch_divides_the_batch_within_the_devices_limit() -> None:
    config = _resolved("model.context_length=1024", "trainer.batch_tokens=491520")
    assert config.hardware.micro_batch == 16, "16,384 tokens on a CPU; 480 sequences"
    config = _resolved("model.context_length=1024", "trainer.batch_tokens=491520", machine=Machine(devices=("cuda", "cpu")))
    assert config.hardware.micro_batch == 60
    assert _resolved("model.context_length=1024", "trainer.batch_tokens=17408").hardware.micro_batch == 1, "17 sequences: a prime"
    assert _resolved("model.context_length=32768", "trainer.batch_tokens=65536").hardware.micro_batch == 1, "one context is above the limit"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.batch_tokens=1000"], "trainer.batch_tokens=1000 is not a multiple of model.context_length=64; try 1024"),
        (["trainer.batch_tokens=10"], "is not a multiple of model.context_length=64; try 64"),
        (["trainer.batch_tokens=abc"], "trainer.batch_tokens=abc must be auto or a whole number"),
        (["trainer.batch_tokens=0"], "trainer.batch_tokens=0 must be auto or a whole number of at least 1"),
        (["hardware.micro_batch=5"], "hardware.micro_batch=5 does not divide the 12 sequences of a batch"),
        (["hardware.micro_batch=-1"], "hardware.micro_batch=-1 must be auto or a whole number"),
        (["hardware.device=cuda"], "hardware.device=cuda: this machine has cpu"),
        (["hardware.device=cuda:1"], "hardware.device=cuda:1: this machine has cpu"),
        (["hardware.device=tpu"], "hardware.device=tpu is not one of auto, cpu, cuda"),
        (["hardware.precision=fp4"], "hardware.precision=fp4 is not one of auto, fp32, bf16, bf16_pure, fp16, fp8"),
        (["hardware.precision=fp16"], "hardware.precision=fp16 needs a GPU; on the CPU use bf16 or fp32"),
        (["model.width=0"], "model.width=0 must be at least 1"),
        (["model.depth=-1"], "model.depth=-1 must be at least 0"),
        (["model.dropout=1.0"], "model.dropout=1.0 must be in [0, 1)"),
        (["data.validation_fraction=1.5"], "data.validation_fraction=1.5 must be between 0 and 1"),
        (["data.validation_tokens=-1"], "data.validation_tokens=-1 must be at least 0"),
        (["trainer.log_every=0"], "trainer.log_every=0 must be at least 1"),
        (["trainer.gradient_clip=-1.0"], "trainer.gradient_clip=-1.0 must be at least 0"),
        (["hardware.threads=-2"], "hardware.threads=-2 must be at least 0"),
        (["study=a/b"], "study='a/b' is the name of a folder"),
        (["study=''"], "study='' is the name of a folder"),
        (["name=.."], "name='..' is the name of a folder"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_what_cannot_be_is_refused_with_its_key(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        _resolved(*overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("machine", "width", "device", "precision"),
    [
        (CPU, 768, "cpu", "fp32"),
        (Machine(("cpu",), cpu_bf16=True), 128, "cpu", "fp32"),
        (Machine(("cpu",), cpu_bf16=True), 256, "cpu", "bf16"),
        (Machine(("cuda", "cpu"), gpu_bf16=True), 128, "cuda", "bf16"),
        (Machine(("cuda", "cpu"), cpu_bf16=True), 768, "cuda", "fp32"),
        (Machine(("mps", "cpu"), cpu_bf16=True), 768, "mps", "fp32"),
    ],
)
def test_auto_device_and_precision_come_from_the_table(machine: Machine, width: int, device: str, precision: str) -> None:
    config = _resolved(f"model.width={width}", machine=machine)
    assert (config.hardware.device, config.hardware.precision) == (device, precision)


def test_what_is_asked_for_is_kept() -> None:
    machine = Machine(("cuda", "cpu"), gpu_bf16=True)
    config = _resolved("hardware.device=cuda:1", "hardware.precision=fp16", "hardware.micro_batch=3", machine=machine)
    assert (config.hardware.device, config.hardware.precision, config.hardware.micro_batch) == ("cuda:1", "fp16", 3)


def test_each_seed_defaults_to_the_seed() -> None:
    seeds = _resolved("seed=4", "seeds.data=9").seeds
    assert (seeds.init, seeds.data, seeds.dropout) == (4, 9, 4)
    seeds = _resolved("seed=4", "seeds.data=0").seeds
    assert (seeds.init, seeds.data, seeds.dropout) == (4, 0, 4)


def test_resolve_is_pure_and_settles_everything() -> None:
    config = compose(["seed=2"])
    before = copy.deepcopy(config)
    once = resolve(config, CPU)
    assert config == before
    assert resolve(once, CPU) == once
    assert "auto" not in (once.hardware.device, once.hardware.precision, once.hardware.micro_batch, once.trainer.batch_tokens)


def test_a_bpe_of_ones_own_pads_the_vocabulary_to_a_multiple_of_64_unless_told_otherwise() -> None:
    def padding(*overrides: str) -> int:
        return resolve(compose(overrides), Machine(devices=("cpu",))).model.pad_vocab_to

    assert padding("data/tokenizer=bpe") == 64
    assert padding("data/tokenizer=bpe", "model.pad_vocab_to=128") == 128
    assert padding("data/tokenizer=gpt2") == padding("data/tokenizer=char") == 1
