"""muP: at its base width nothing changes; beyond it weights, logits, scores and updates follow the width, and parts move alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.cli.bench_coordinates import _widths, changes, coordinates, outputs, slopes_of
from gptlab.config import codec
from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, load_components
from gptlab.config.resolve import Machine, resolve
from gptlab.config.schema import Config, ModelConfig
from gptlab.data.loader import Batch
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.model.transformer import Transformer, new_model
from gptlab.optimizer.groups import parameter_groups
from tests.tiny import tiny

load_components()
CPU = torch.device("cpu")
VOCABULARY = 17


def made(recipe: str = "nano", width: int = 128, parametrisation: str = "mup", **options: Any) -> Transformer:
    """A recipe in a small size, 16 wide heads and all."""
    model = compose([f"model={recipe}", "model.depth=2", "model.context_length=16"]).model
    chosen: Any = component("model/parametrisation", parametrisation).options(**options)
    return new_model(replace(model, width=width, heads=max(4, width // 16), parametrisation=chosen), VOCABULARY, seed=0)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


def trained(model: Transformer, optimizer: str, steps: int = 3) -> list[float]:
    stepper = build(component("optimizer", optimizer).options(), groups=groups(model), device=CPU)
    losses = []
    for _ in range(steps):
        stepper.zero_grad()
        loss = F.cross_entropy(model(tokens()).flatten(0, 1), tokens().roll(-1, 1).flatten())
        loss.backward()
        stepper.step()
        losses.append(float(loss.detach()))
    return losses


def groups(model: Transformer) -> list[dict[str, Any]]:
    return parameter_groups(model, model.roles(), model.widening())


@pytest.mark.parametrize("recipe", ["nano", "llama", "speedrun"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_at_its_base_width_mup_is_standard_bit_for_bit(recipe: str, optimizer: str) -> None:
    mine, plain = made(recipe, 64), made(recipe, 64, "standard")
    for name, value in mine.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert trained(mine, optimizer) == trained(plain, optimizer)


@pytest.mark.parametrize("recipe", ["nano", "llama", "speedrun", "modern"])
@pytest.mark.parametrize("width", [32, 256])
def test_matrices_have_variance_by_their_inputs_and_the_rest_that_of_the_base(recipe: str, width: int) -> None:
    base, wider = made(recipe, 64), made(recipe, width)
    at_base, roles = dict(base.named_parameters()), base.roles()
    for name, parameter in wider.named_parameters():
        if not at_base[name].any() or at_base[name].numel() < 500:
            continue
        expected = (64 / width) ** 0.5 if roles[name] == "matrix" else 1.0
        assert float((parameter.std() / at_base[name].std()).detach()) == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("head", ["tied", "untied", "untied_softcap"])
def test_the_head_reads_features_over_the_width(head: str) -> None:
    model = compose(["model=nano", f"model/head={head}", "model/parametrisation=mup"]).model
    wide = new_model(replace(model, width=256), VOCABULARY, seed=0)
    features = torch.randn(2, 3, 256)
    assert torch.equal(wide.logits(features), wide.head(features / 4)[..., :VOCABULARY])


def test_wider_heads_have_scores_over_their_width_and_more_heads_the_same_scores() -> None:
    def scale(heads: int, **options: int) -> float:
        chosen: Any = component("model/parametrisation", "mup").options(**options)
        model = compose(["model=nano"]).model
        block: Any = Transformer(replace(model, width=256, heads=heads, parametrisation=chosen), VOCABULARY).blocks[0]
        return float(block.attention.scale)

    assert scale(16) == 16**-0.5
    assert scale(4) == 64**-0.5
    assert scale(4, base_head_width=16) == pytest.approx(64**-0.5 * 0.5)
    assert scale(1, base_head_width=16) / scale(4, base_head_width=16) == pytest.approx(1 / 4)


def rates(model: Transformer, name: str, **options: Any) -> dict[str, tuple[float, float]]:
    """Parameter path -> the rate and the weight decay that its group has."""
    optimizer = build(component("optimizer", name).options(**options), groups=groups(model), device=CPU)
    path = {id(parameter): path for path, parameter in model.named_parameters()}
    return {path[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("recipe", ["nano", "llama", "speedrun"])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_each_roles_rate_reaches_the_optimizer(recipe: str, name: str) -> None:
    model = made(recipe, 256)
    roles = model.roles()
    for path, (rate, decay) in rates(model, name, learning_rate=0.8, weight_decay=0.5, rates={"head": 0.5}).items():
        decayed = 0.5 if roles[path] in ("matrix", "embedding", "head") else 0.0
        if roles[path] == "matrix" or path == "input.gate":  # which sums over the width
            assert (rate, decay) == (0.2, 4 * decayed), path
        else:
            assert (rate, decay) == (0.4 if roles[path] == "head" else 0.8, decayed), path


def test_muons_matrices_keep_their_rate_and_the_rest_has_adams_rule() -> None:
    model = made("speedrun", 256)
    options = {"learning_rate": 0.8, "adam_learning_rate": 0.4, "weight_decay": 0.5}
    found = rates(model, "muon", **options)
    assert found["blocks.0.ffn.up.weight"] == (0.8, 0.5)
    assert found["embedding.weight"] == (0.4, 0.5)
    assert found["input.gate"] == (0.1, 0.0)
    assert rates(model, "muon", scale="rms", **options)["blocks.0.ffn.up.weight"] == (0.4, 1.0)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_an_optimizer_without_a_rule_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model/parametrisation=mup has no rule for this optimizer's rates; use optimizer=adamw"):
        build(component("optimizer", name).options(), groups=groups(made(width=128)), device=CPU)
    build(component("optimizer", name).options(), groups=groups(made(width=128, parametrisation="standard")), device=CPU)


def test_a_base_below_1_is_refused() -> None:
    for name in ("base_width", "base_head_width"):
        with pytest.raises(ConfigError, match=rf"model\.parametrisation\.{name}=0 must be at least 1"):
            made(**{name: 0})


def test_mup_survives_the_codec_and_changes_the_identity() -> None:
    def resolved(*overrides: str) -> Config:
        return resolve(compose(overrides), Machine(devices=("cpu",)))

    mine = resolved("model/parametrisation=mup", "model.parametrisation.base_head_width=16")
    assert codec.from_json(codec.to_json(mine), "here") == mine
    assert codec.identity(mine, "0", {}) != codec.identity(resolved(), "0", {})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, home_folder: object) -> Any:
    from tests.conftest import sentences

    file = tmp_path_factory.mktemp("text") / "small.txt"
    file.write_text(sentences(400), encoding="utf-8")
    return file


@pytest.fixture
def small(text: Any) -> tuple[Config, Prepared]:
    sizes = ("model=dial", "model.width=64", "model.heads=1", "model.depth=1", "model.context_length=32", "hardware.precision=fp32")
    config = resolve(compose([*tiny(text), *sizes]), Machine(devices=("cpu",)))
    return config, prepare(config.data)


def parametrisation(name: str) -> Any:
    return component("model/parametrisation", name).options()


def test_parts_move_alike_at_every_width_by_mup_and_not_by_standard(small: tuple[Config, Prepared]) -> None:
    config, data = small
    by_mup, by_standard = (slopes_of(config, data, parametrisation(n), (64, 128, 256), 3, range(3)) for n in ("mup", "standard"))
    assert set(by_mup) == {"embedded", "attention 0", "ffn 0", "logits"}
    assert max(slope for part in by_mup.values() for slope in part) < 0.15  # 64 is narrow; the slow check asks for less
    assert min(max(by_standard[part]) for part in ("attention 0", "ffn 0", "logits")) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dial", "llama"])
def test_no_slope_is_above_a_tenth_from_64_to_512(recipe: str) -> None:
    given = [f"model={recipe}", "model.depth=2", "model.context_length=64", "optimizer.learning_rate=0.01", "hardware.precision=fp32"]
    sizes = [] if recipe == "dial" else ["model.width=128", "model.heads=2", "model/attention=multihead"]
    config = resolve(compose([*given, *sizes]), Machine(devices=("cpu",)))
    data = prepare(config.data)
    widths = (64, 128, 256, 512)
    by_mup = slopes_of(config, data, parametrisation("mup"), widths, 5, range(3))
    assert len(by_mup) == 6
    assert max(slope for part in by_mup.values() for slope in part) < 0.1
    by_standard = slopes_of(config, data, parametrisation("standard"), widths, 3, range(1))
    assert max(slope for part in by_standard.values() for slope in part) > 0.5


def test_the_command_tells_both_parametrisations(text: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*tiny(text), "model=nano", "hardware.precision=fp32"]
    coordinates(given, widths="32,16", steps=2, seeds=1, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["widths"] == [16, 32]
    assert set(found["slopes"]) == {"mup", "standard"}
    assert all(len(of) == 2 for slopes in found["slopes"].values() for of in slopes.values())
    coordinates(given, widths="16,32", steps=1, seeds=1, as_json=False)
    assert "standard: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--steps 0 and --seeds 1 must be at least 1"):
        coordinates(given, widths="16,32", steps=0, seeds=1, as_json=False)


def test_a_check_measures_what_moved(small: tuple[Config, Prepared]) -> None:
    config, data = small
    moved = changes(config, data, 2, 0)
    assert all(len(of) == 2 for of in moved.values())
    assert moved["ffn 0"][0] < 1e-3 < moved["ffn 0"][1], "the head begins at 0: what is behind it moves from the second step on"
    still = changes(replace(config, optimizer=replace(config.optimizer, learning_rate=0.0)), data, 2, 0)  # type: ignore[call-arg]
    assert set(map(tuple, still.values())) == {(0.0, 0.0)}


def test_a_look_leaves_no_hooks(small: tuple[Config, Prepared]) -> None:
    config, data = small
    model = new_model(config.model, data.vocabulary, 0)
    seen = outputs(model, Batch(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)))
    assert seen["logits"].shape == (1, 4, data.vocabulary)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("widths", ["64", "a,b", "0,64", "64,64", ""])
def test_widths_that_make_no_line_are_refused(widths: str) -> None:
    with pytest.raises(ConfigError, match=r"^--widths .* must be at least two whole numbers"):
        _widths(widths)


def test_a_width_that_the_heads_do_not_divide_is_refused(small: tuple[Config, Prepared]) -> None:
    config, data = small
    with pytest.raises(ConfigError, match=r"--widths: heads of 64 .* do not divide 100"):
        slopes_of(config, data, parametrisation("mup"), (64, 100), 1, range(1))


def test_every_draw_is_of_the_configs_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an init makes of a width, it makes of the base width."""
    seen: list[int] = []
    options: Any = component("model/init", "zero_output").options()
    from gptlab.model import transformer

    real: Callable[..., Any] = transformer.build
    monkeypatch.setattr(transformer, "build", lambda o, **w: (seen.append(w["width"]) if o == options else None, real(o, **w))[1])
    model: ModelConfig = compose(["model=nano", "model/init=zero_output", "model/parametrisation=mup"]).model
    new_model(model, VOCABULARY, 0)
    assert seen == [64]
