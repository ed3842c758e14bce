"""One dial: a depth makes a whole recipe by the stated rules, and whatever the user gives stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gptlab.config import codec
from gptlab.config.compose import compose
from gptlab.config.dial import LEARNING_RATE, batch_of, described, heads_of, width_of
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component, component_of
from gptlab.config.resolve import Machine, resolve
from gptlab.config.schema import Config
from gptlab.model.transformer import meta_model

CPU = Machine(devices=("cpu",))
# depth -> width, heads, tokens of a batch
RULES = {
    1: (64, 1, 2_048), 2: (128, 2, 8_192), 4: (256, 4, 32_768), 8: (512, 8, 131_072), 12: (768, 12, 262_144), 20: (1280, 20, 524_288),
}  # fmt: skip


@pytest.fixture
def dialled(composed: Callable[..., Config]) -> Callable[..., Config]:
    return lambda *overrides: resolve(composed("model=dial", *overrides), CPU)


@pytest.mark.parametrize("depth", RULES)
def test_the_depth_sets_width_heads_and_batch(depth: int, dialled: Callable[..., Config]) -> None:
    config = dialled(f"model.depth={depth}")
    assert (config.model.width, config.model.heads, config.trainer.batch_tokens) == RULES[depth]
    assert config.trainer.budget == "20x"
    assert config.optimizer.learning_rate == LEARNING_RATE  # type: ignore[attr-defined]
    assert component_of(config.model.parametrisation).name == "mup"
    assert meta_model(config.model, 256).config.width == 64 * depth


@pytest.mark.parametrize(
    ("width", "heads"), [(64, 1), (96, 2), (100, 2), (128, 2), (192, 3), (512, 8), (16, 1), (1, 1), (63, 1), (130, 1), (768, 12)]
)
def test_heads_are_near_64_wide_and_turn_pairs(width: int, heads: int) -> None:
    assert heads_of(width) == heads


@pytest.mark.parametrize(("depth", "heads", "width"), [(4, 0, 256), (4, 4, 256), (4, 3, 258), (1, 5, 60), (1, 100, 200)])
def test_given_heads_divide_the_width(depth: int, heads: int, width: int) -> None:
    assert width_of(depth, heads) == width
    assert not heads or width % (2 * heads) == 0


def test_the_batch_is_the_laws_within_a_factor_of_root_two(dialled: Callable[..., Config]) -> None:
    model = dialled("model.depth=12").model
    weights = 12 * 12 * 768**2
    law = 0.2920 * ((72 * 12 * 768**2 + 12 * 12 * 768 * 256) * 20 * weights) ** 0.3271
    assert 2**-0.5 <= batch_of(model) / law <= 2**0.5


def test_every_rank_has_whole_rows(composed: Callable[..., Config]) -> None:
    for ranks in (1, 2, 3, 8, 40):
        config = resolve(composed("model=dial"), Machine(devices=("cpu",), ranks=ranks))
        assert config.trainer.batch_tokens % (ranks * config.model.context_length) == 0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("model.width=192", lambda c: (c.model.width, c.model.heads) == (192, 3)),
        ("model.heads=4", lambda c: (c.model.width, c.model.heads) == (128, 4)),
        ("trainer.batch_tokens=512", lambda c: c.trainer.batch_tokens == 512),
        ("trainer.budget=7steps", lambda c: c.trainer.budget == "7steps"),
        ("trainer.budget=2000steps", lambda c: c.trainer.budget == "2000steps"),
        ("optimizer.learning_rate=2e-3", lambda c: c.optimizer.learning_rate == 2e-3),
        ("optimizer.learning_rate=1e-3", lambda c: c.optimizer.learning_rate == 1e-3),  # though it be AdamW's default
        ("++optimizer.learning_rate=1e-3", lambda c: c.optimizer.learning_rate == 1e-3),
        ("optimizer=adamw_gpt2", lambda c: c.optimizer.learning_rate == 6e-4),
        ("optimizer=muon", lambda c: c.optimizer.learning_rate == 0.02),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_given_stays(override: str, kept: Callable[[Config], bool], dialled: Callable[..., Config]) -> None:
    assert kept(dialled("model.context_length=128", override))


def test_without_mup_the_rate_falls_with_the_width(dialled: Callable[..., Config]) -> None:
    found = dialled("model/parametrisation=standard", "model.depth=8").optimizer.learning_rate  # type: ignore[attr-defined]
    assert found == pytest.approx(LEARNING_RATE / 8)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.depth=0"], "model.depth=0 gives a dial no size: it needs at least 1"),
        (["model.depth=-2"], "model.depth=-2 gives a dial no size"),
        (["model.dial=some"], "model.dial=some is not one of all, sizes"),
        (["model.width=-64"], "model.width=-64 must be at least 1"),
        (["model.heads=-1"], "model.heads=-1 must be at least 1"),
        (["model.context_length=0"], "model.context_length=0 must be at least 1"),
        (["trainer.batch_tokens=1000"], "trainer.batch_tokens=1000 is not a multiple of model.context_length=256"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_a_dial_that_cannot_be_is_refused(overrides: list[str], said: str, dialled: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError) as error:
        dialled(*overrides)
    assert str(error.value).startswith(said)
    assert error.value.code == 2


def test_without_a_dial_a_width_of_0_is_refused_and_the_budget_is_2000_steps(composed: Callable[..., Config]) -> None:
    assert composed().trainer.budget == "auto"
    assert resolve(composed(), CPU).trainer.budget == "2000steps"
    with pytest.raises(ConfigError, match=r"model\.width=0 must be at least 1"):
        resolve(composed("model.width=0"), CPU)


def test_turning_twice_is_turning_once(dialled: Callable[..., Config]) -> None:
    for more in ((), ("optimizer.learning_rate=1e-3",), ("model/parametrisation=standard",)):
        once = dialled(*more)
        assert resolve(once, CPU) == once


def test_a_dialled_run_is_the_run_that_is_spelt_out(dialled: Callable[..., Config]) -> None:
    mine = dialled("model.depth=3")
    spelt = compose(
        ["model=modern", "model/parametrisation=mup", "model.depth=3", "model.width=192", "model.heads=3", "model.context_length=256",
         f"trainer.batch_tokens={mine.trainer.batch_tokens}", "trainer.budget=20x", f"optimizer.learning_rate={LEARNING_RATE}"]
    )  # fmt: skip
    assert codec.identity(mine, "0" * 64, {}) == codec.identity(resolve(spelt, CPU), "0" * 64, {})


def test_a_dialled_config_survives_the_codec(dialled: Callable[..., Config]) -> None:
    config = dialled("model.depth=3")
    assert codec.from_json(codec.to_json(config), "here") == config


def test_an_older_config_has_the_standard_parametrisation(dialled: Callable[..., Config]) -> None:
    data = codec.to_json(resolve(compose([]), CPU))
    del data["config"]["model"]["parametrisation"], data["config"]["model"]["dial"]
    read = codec.from_json(data, "here").model
    assert read.parametrisation == component("model/parametrisation", "standard").options()
    assert read.dial == ""


def test_it_says_what_it_has_set(dialled: Callable[..., Config]) -> None:
    config = dialled("model.depth=4")
    assert described(config, 1234) == f"dial 4: width 256, 4 heads, batch 32,768 tokens, learning rate {LEARNING_RATE:g}, 20x = 1,234 steps"
    assert described(dialled("model.depth=1", "trainer.budget=5min"), None).endswith(", 5min")
    assert described(dialled("model.depth=1", "trainer.budget=7steps"), 7).endswith(", 7steps")
