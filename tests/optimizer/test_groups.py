"""Optimizers: what is decayed, and what one update is."""

import math

import pytest
import torch
import torch.nn.functional as F

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, components, load_components
from gptlab.config.schema import ModelConfig
from gptlab.model.transformer import Transformer, new_model
from gptlab.optimizer.groups import parameter_groups

load_components()
CPU = torch.device("cpu")


def model(**parts: str) -> Transformer:
    names = {"norm": "layernorm", "position": "learned", "attention": "multihead", "kernel": "sdpa", "ffn": "gelu",
             "block": "prenorm", "input": "plain", "stream": "plain", "value": "none", "gate": "none",
             "head": "untied", "init": "gpt2"} | parts  # fmt: skip
    options = {slot: component(f"model/{slot}", name).options() for slot, name in names.items()}
    return new_model(ModelConfig(width=16, depth=1, heads=2, context_length=8, **options), vocabulary=11, seed=0)


def groups(made: Transformer) -> list:
    return parameter_groups(made, made.roles())


def decay_of(made: Transformer, name: str) -> dict[str, float]:
    """Parameter path -> the weight decay its group has."""
    optimizer = build(component("optimizer", name).options(weight_decay=0.1), groups=groups(made), device=CPU)
    paths = {id(parameter): path for path, parameter in made.named_parameters()}
    return {paths[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", [c.name for c in components("optimizer")])
def test_matrices_embeddings_and_head_decay_and_gains_and_biases_do_not(name: str) -> None:
    decay = decay_of(model(position="t5"), name)
    decayed = {path for path, value in decay.items() if value == 0.1}
    assert decayed == {
        "embedding.weight", "head.weight", "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight",
        "blocks.0.ffn.up.weight", "blocks.0.ffn.down.weight",
    }  # fmt: skip
    assert {"position.table", "norm.weight", "norm.bias", "blocks.0.attention.qkv.bias"} <= {p for p, v in decay.items() if v == 0.0}


def test_learned_positions_decay_as_embeddings() -> None:
    assert decay_of(model(), "adamw")["position.table.weight"] == 0.1


def test_every_parameter_is_in_one_group() -> None:
    for made in (model(), model(head="tied", position="t5")):
        held = [id(p) for group in groups(made) for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in made.parameters())


def test_a_tied_head_is_an_embedding() -> None:
    assert "head" not in {group["role"] for group in groups(model(head="tied"))}


def test_groups_come_in_one_order() -> None:
    assert [g["role"] for g in groups(model())] == ["bias", "embedding", "gain", "head", "matrix"]


def test_adamw_is_its_formula() -> None:
    rate, beta1, beta2, eps, decay = 0.01, 0.8, 0.9, 1e-6, 0.3
    made = model().double()
    x = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    options = component("optimizer", "adamw").options(learning_rate=rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)
    optimizer = build(options, groups=groups(made), device=CPU)
    roles = made.roles()
    weight = {path: p.detach().clone() for path, p in made.named_parameters()}
    first, second = ({path: torch.zeros_like(p) for path, p in weight.items()} for _ in range(2))
    for step in range(1, 4):
        optimizer.zero_grad()
        F.cross_entropy(made(x).flatten(0, 1), x.roll(-1, 1).flatten()).backward()
        for path, parameter in made.named_parameters():
            gradient = parameter.grad
            first[path] = beta1 * first[path] + (1 - beta1) * gradient
            second[path] = beta2 * second[path] + (1 - beta2) * gradient**2
            if roles[path] in ("matrix", "embedding", "head"):
                weight[path] = weight[path] * (1 - rate * decay)
            mean, size = first[path] / (1 - beta1**step), second[path] / (1 - beta2**step)
            weight[path] = weight[path] - rate * mean / (size.sqrt() + eps)
        optimizer.step()
        for path, parameter in made.named_parameters():
            torch.testing.assert_close(parameter, weight[path], rtol=0, atol=1e-12, msg=path)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("adamw", {"learning_rate": -1.0}, "optimizer.learning_rate=-1.0"),
        ("adamw", {"weight_decay": math.inf}, "optimizer.weight_decay=inf"),
        ("adamw", {"beta2": 1.0}, "optimizer.beta2=1.0"),
        ("sgd", {"learning_rate": math.nan}, "optimizer.learning_rate=nan"),
        ("sgd", {"momentum": 1.0}, "optimizer.momentum=1.0"),
    ],
)
def test_an_impossible_rate_is_refused(name: str, options: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build(component("optimizer", name).options(**options), groups=groups(model()), device=CPU)
