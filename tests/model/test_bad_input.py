"""Parts that do not fit are refused with one sentence that names the key, before anything is trained."""

import re

import pytest
import torch

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component, load_components
from gptlab.model.transformer import meta_model, new_model

load_components()
VOCABULARY = 65


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.heads=3"], r"model\.heads=3 does not divide model\.width=128; try heads=\d+"),
        (["model.width=36", "model/position=rotary"], r"model/position=rotary .* head width 9 \(.*\) must be even"),
        (["model.attention.kv_heads=3"], r"model\.attention\.kv_heads=3 must divide model\.heads=4"),
        (["model.attention.kv_heads=0"], r"model\.attention\.kv_heads=0 must divide"),
        (["model.attention.kv_heads=-2"], r"model\.attention\.kv_heads=-2 must divide"),
        (["model.attention.window=-1"], r"model\.attention\.window=-1 must be at least 1"),
        (["model.attention.window=0"], r"model\.attention\.window=0 must be at least 1"),
        (["model.ffn.expansion=0"], r"model\.ffn\.expansion=0\.0 leaves no hidden units"),
        (["model/ffn=swiglu", "model.ffn.multiple_of=0"], r"model\.ffn\.multiple_of=0 must be at least 1"),
        (["model/ffn=swiglu", "model.ffn.expansion=-1"], r"model\.ffn\.expansion=-1\.0 leaves no hidden units"),
        (["model.head.soft_cap=0"], r"model\.head\.soft_cap=0\.0 must be positive"),
        (["model/position=t5", "model.position.buckets=1"], r"model/position=t5 needs buckets >= 2"),
        (["model/position=t5", "model.position.max_distance=4"], r"max_distance > buckets / 2"),
        (["model/position=rotary", "model.position.base=0"], r"model\.position\.base=0\.0 must be positive"),
        (["model/position=sinusoidal", "model.position.base=-1"], r"model\.position\.base=-1\.0 must be positive"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_parts_that_do_not_fit_are_refused_on_the_meta_device(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        meta_model(compose(["model=nano", *overrides]).model, VOCABULARY)
    assert "\n" not in str(refused.value)


def test_the_suggested_heads_fit() -> None:
    with pytest.raises(ConfigError) as refused:
        meta_model(compose(["model=nano", "model.heads=5"]).model, VOCABULARY)
    match = re.search(r"try heads=(\d+)", str(refused.value))
    assert match
    meta_model(compose(["model=nano", f"model.heads={match[1]}"]).model, VOCABULARY)


@pytest.mark.parametrize("given", [False, True], ids=["own positions", "given positions"])
def test_more_tokens_than_learned_positions_are_refused(given: bool) -> None:
    model = new_model(compose(["model=nano", "model.context_length=8"]).model, VOCABULARY, seed=0)
    tokens = torch.zeros(1, 9, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"9 tokens are longer than the 8 learned positions \(model\.context_length\).*rotary"):
        model(tokens, positions=torch.arange(9)[None] if given else None)


def test_more_tokens_than_learned_positions_are_refused_while_decoding() -> None:
    model = new_model(compose(["model=nano", "model.context_length=8"]).model, VOCABULARY, seed=0)
    cache = model.new_cache(1, 20)
    with torch.inference_mode():
        model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
        with pytest.raises(ConfigError, match=r"model\.context_length"):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_a_full_cache_refuses_another_token() -> None:
    model = new_model(compose(["model=nano", "model/position=rotary"]).model, VOCABULARY, seed=0)
    cache = model.new_cache(1, 4)
    with torch.inference_mode(), pytest.raises(ValueError, match="holds 4 tokens, not 5"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_with_dropout_is_refused() -> None:
    config = compose(["model=nano", "model/kernel=flex", "model.dropout=0.1"]).model
    model = new_model(config, VOCABULARY, seed=0).train()
    with torch.no_grad(), pytest.raises(ConfigError, match=r"model/kernel=flex has no dropout; use model\.dropout=0, or .*sdpa or naive"):
        model(torch.zeros(1, 4, dtype=torch.long))
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 4, dtype=torch.long))  # there is none to apply in evaluation


def test_a_literal_option_names_its_values() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention\.form=sum is not one of loop, matmul, softmax"):
        compose(["model=average", "model.attention.form=sum"])


def test_an_unknown_component_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean rmsnorm"):
        component("model/norm", "rmsnrm")
