"""The parts from speed runs are the formulas they name, start where they say, and cost what they save."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.config import codec
from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, load_components
from gptlab.config.resolve import Machine, resolve
from gptlab.data.loader import Batch
from gptlab.model.cache import KVCache
from gptlab.model.ffn import ReLU2
from gptlab.model.linear import Linear, linear
from gptlab.model.norm import rms_normalised
from gptlab.model.transformer import Transformer, meta_model, new_model
from gptlab.runner.contract_model import VOCABULARY, stirred, tiny, tokens

load_components()
BEGINS_WITHOUT = {"stream": "input_skip", "gate": "per_head"}


def options(slot: str, name: str, **values: object) -> Any:
    return component(f"model/{slot}", name).options(**values)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rms_normalised_is_torchs_rms_norm_and_so_is_its_gradient() -> None:
    x, weight = random(3, 5, 8).requires_grad_(), random(3, 5, 8, seed=1)
    (mine,) = torch.autograd.grad((rms_normalised(x, 1e-6) * weight).sum(), x)
    (torchs,) = torch.autograd.grad((F.rms_norm(x, (8,), eps=1e-6) * weight).sum(), x)
    assert torch.allclose(rms_normalised(x, 1e-6), F.rms_norm(x, (8,), eps=1e-6), atol=1e-14)
    assert torch.allclose(mine, torchs, atol=1e-13)
    assert torch.autograd.gradcheck(lambda v: rms_normalised(v, 1e-6), (x,))
    assert rms_normalised(torch.zeros(2, 4), 1e-6).isfinite().all()


def test_rms_normalised_of_bf16_sums_in_fp32() -> None:
    x = random(4, 512).to(torch.bfloat16) * 100
    found = rms_normalised(x, 1e-6)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), F.rms_norm(x.float(), (512,), eps=1e-6), rtol=1e-2)


def test_squared_relu_has_autograds_gradient() -> None:
    x = random(4, 6).requires_grad_()
    act = ReLU2(6, False, 0.0).activate
    (mine,) = torch.autograd.grad(act(x).sin().sum(), x)
    (plain,) = torch.autograd.grad(F.relu(x).square().sin().sum(), x)
    assert torch.equal(act(x), F.relu(x).square())
    assert torch.allclose(mine, plain, atol=1e-15)


def test_bf16_products_take_and_give_fp32_on_the_cpu() -> None:
    layer = Linear(64, 32, bias=True)
    x = random(5, 7, 64).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.square().sum().backward()
    narrow = x.detach().to(torch.bfloat16).float(), layer.weight.detach().to(torch.bfloat16).float()
    assert out.dtype == torch.float32
    assert torch.allclose(out, F.linear(*narrow, layer.bias), atol=2e-2)
    gradients = [p.grad for p in (x, layer.weight, layer.bias)]
    exact = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), (x, layer.weight, layer.bias))
    for found, expected in zip(gradients, exact, strict=True):
        assert found is not None
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_without_autocast_a_linear_layer_is_torchs_own() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    assert torch.equal(linear(x, layer.weight, layer.bias), layer(x))


def logits(seed: int = 0, **parts: Any) -> Tensor:
    with torch.inference_mode():
        return new_model(tiny(init=options("init", "gpt2", std=0.2), **parts), VOCABULARY, seed).eval()(tokens())


@pytest.mark.parametrize(("slot", "name"), BEGINS_WITHOUT.items())
def test_a_fresh_model_with_the_part_is_the_model_without(slot: str, name: str) -> None:
    assert torch.allclose(logits(**{slot: options(slot, name)}), logits(), atol=1e-6)


def test_a_fresh_smear_is_the_normalised_input() -> None:
    smeared, normalised = logits(input=options("input", "smear")), logits(input=options("input", "normalised"))
    assert torch.allclose(smeared, normalised, atol=1e-6)
    assert not torch.allclose(normalised, logits(), atol=1e-3)


def test_smear_adds_a_gated_share_of_the_token_before() -> None:
    model = stirred(tiny(input=options("input", "smear")))
    part: Any = model.input
    x = random(2, 6, 32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    n = F.rms_norm(x, (32,), eps=1e-6)
    found = part(x, positions, None)
    gate = torch.sigmoid(n @ part.gate) * part.strength
    assert torch.allclose(found[:, [0, 3]], n[:, [0, 3]], atol=1e-12), "the first token of a document has nothing before it"
    for t in (1, 2, 4, 5):
        assert torch.allclose(found[:, t], n[:, t] + gate[:, t, None] * n[:, t - 1], atol=1e-12)


def test_smear_keeps_the_last_token_for_the_next_call() -> None:
    model = stirred(tiny(input=options("input", "smear")))
    x, place = tokens(2), torch.arange(16)[None]
    embedded, cache = model.embedding(x), KVCache(2, 16, layers=0, kv_heads=1, head_width=1)
    parts = []
    for start, end in ((0, 4), (4, 5), (5, 16)):
        parts.append(model.input(embedded[:, start:end], place[:, start:end], cache))
        cache.advance(end - start)
    assert torch.allclose(torch.cat(parts, 1), model.input(embedded, place, None), atol=1e-12)


def test_input_skip_scales_the_stream_and_adds_the_embedding() -> None:
    model = stirred(tiny(stream=options("stream", "input_skip")))
    first, second = (block.stream for block in model.blocks)
    context: Any = type("Seen", (), {"embedded": random(2, 4, 32)})
    x = random(2, 4, 32, seed=1)
    assert not any("skip" in name for name, _ in first.named_parameters()), "into the first block the two are one"
    assert torch.allclose(second(x, context), second.keep * x + second.skip * context.embedded)


def test_value_embeddings_are_added_to_the_values_of_their_layers() -> None:
    value = options("value", "embedding")
    model = stirred(tiny(value=value, attention=options("attention", "multihead", kv_heads=2)))
    part: Any = model.blocks[0].attention.value
    seen: dict[str, Tensor] = {}
    model.blocks[0].attention.v.register_forward_hook(lambda module, inputs, output: seen.update(v=output))
    part.register_forward_hook(lambda module, inputs, output: seen.update(before=inputs[0]))
    with torch.inference_mode():
        model(tokens())
    table = part.table(tokens()).view(3, 16, 2, 8).transpose(1, 2)
    assert torch.allclose(seen["v"], seen["before"] + part.scale * table)
    assert part.table.weight.shape == (24, 16), "the padded vocabulary by the width of the key/value heads"
    assert model.roles()["blocks.0.attention.value.table.weight"] == "embedding"


def test_value_embeddings_every_second_layer_count_from_the_last() -> None:
    model = meta_model(tiny(value=options("value", "embedding", every=2)), VOCABULARY)
    assert [hasattr(block.attention.value, "table") for block in model.blocks] == [False, True]
    with pytest.raises(ConfigError, match=r"model\.value\.every=0 must be at least 1"):
        meta_model(tiny(value=options("value", "embedding", every=0)), VOCABULARY)


def test_a_gate_weighs_each_head_by_what_the_token_is() -> None:
    gate: Any = build(options("gate", "per_head", inputs=5), width=6, heads=2)
    nn.init.normal_(gate.weight)
    z, x = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 6)
    found = gate(z, x)
    for h in range(2):
        assert torch.allclose(found[:, :, h], z[:, :, h] * 2 * torch.sigmoid(x[..., :5] @ gate.weight[h])[..., None])


def test_sandwich_normalises_what_a_part_writes() -> None:
    model = stirred(tiny(block=options("block", "sandwich")))
    block: Any = model.blocks[0]
    wrote: list[Tensor] = []
    block.attention.register_forward_hook(lambda module, inputs, output: wrote.append(output))
    block.residual_mid.register_forward_hook(lambda module, inputs, output: wrote.append(output))
    block.register_forward_pre_hook(lambda module, inputs: wrote.append(inputs[0]))
    with torch.no_grad():
        model(tokens())
        x, attended, mid = wrote[:3]
        wrote.append(x + block.attention_out_norm(attended))
    assert torch.allclose(mid, wrote[-1])


def test_norms_without_parameters_are_the_norms_whose_gain_is_one() -> None:
    x = random(2, 3, 32)
    for name, plain in (("rmsnorm_nonparametric", "rmsnorm"), ("layernorm_nonparametric", "layernorm")):
        bare, with_gain = (build(options("norm", n), width=32, bias=True).double() for n in (name, plain))
        assert not list(bare.parameters())
        assert torch.allclose(bare(x), with_gain(x), atol=1e-12)


def test_z_loss_adds_the_square_of_the_log_partition() -> None:
    model = new_model(tiny(), VOCABULARY, 0)
    inputs = tokens()
    model.requires_grad_(False)
    for weight in (None, (torch.arange(48).view(3, 16) % 3).float()):
        batch = Batch(inputs, inputs.roll(-1, 1), weight)
        plain = build(component("objective", "lm").options())(model, batch)
        found = build(component("objective", "lm").options(z_loss=0.5))(model, batch)
        z = model(inputs).logsumexp(-1).square() * (1.0 if weight is None else weight)
        assert float(found) == pytest.approx(float(plain) + 0.5 * float(z.sum()), rel=1e-5)
    with pytest.raises(ConfigError, match=r"objective\.z_loss=-1\.0 must be at least 0"):
        build(component("objective", "lm").options(z_loss=-1.0))


def test_an_attention_without_a_place_for_a_part_refuses_it() -> None:
    for part in ("model/value=embedding", "model/gate=per_head"):
        with pytest.raises(ConfigError, match=f"model/attention=average has no place for {part}; use model/attention=multihead"):
            meta_model(compose(["model=average", part]).model, VOCABULARY)


def test_a_config_from_before_a_slot_means_the_part_that_does_nothing() -> None:
    config = resolve(compose(["model=nano"]), Machine(devices=("cpu",)))
    data = json.loads(json.dumps(codec.to_json(config)))
    for slot in ("input", "stream", "value", "gate"):
        del data["config"]["model"][slot]
    assert codec.from_json(data, "old") == config
    assert not {"input", "stream", "value", "gate"} & codec.canonical(config)["model"].keys()
    changed = resolve(compose(["model=nano", "model/gate=per_head"]), Machine(devices=("cpu",)))
    assert codec.canonical(changed)["model"]["gate"] == {"name": "per_head"}


def test_a_recipe_of_ones_own_need_not_name_the_newer_slots() -> None:
    config = compose(["model=nano", "~model/value", "~model/gate", "~model/input", "~model/stream"])
    assert config == compose(["model=nano"], name=config.name)
    assert isinstance(meta_model(config.model, VOCABULARY), Transformer)
