"""The codec: what a run writes is read back the same, through the registry alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from gptlab.config import codec
from gptlab.config.compose import compose
from gptlab.config.errors import CheckpointError, ConfigError
from gptlab.config.schema import Config
from gptlab.config.sources import config_dir
from tests.change import transform

CONF = config_dir()
RECIPES = sorted(
    f.relative_to(CONF).with_suffix("").as_posix() for f in CONF.rglob("*.yaml") if f.name != "config.yaml" and "dashboard" not in f.parts
)  # of runs


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_survives_the_round_trip(recipe: str, composed: Callable[..., Config]) -> None:
    group, _, name = recipe.rpartition("/")
    needed = {f"data/{name}": ["data.corpus.path=x.txt"] for name in ("text", "chat", "preferences")}
    needed["data/hub"] = ["data.corpus.dataset=owner/name"]
    place = f"+{group}@callbacks.mine" if group == "callback" else group
    config = composed(f"{place}={name}", *needed.get(recipe, []))
    written = json.dumps(codec.to_json(config))
    again = codec.from_json(json.loads(written), "config.json")
    assert again == config
    assert json.dumps(codec.to_json(again)) == written
    assert codec.identity(again, "0" * 64, {}) == codec.identity(config, "0" * 64, {})
    assert "gptlab." not in written, "an import path stands in the artifact"


@pytest.fixture
def data(composed: Callable[..., Config]) -> Any:
    return json.loads(json.dumps(codec.to_json(composed("model/norm=rmsnorm", "+data.validation.books=b.txt"))))


def test_an_unknown_component_says_which_and_how_to_supply_it(data: dict[str, Any]) -> None:
    data["config"]["model"]["norm"]["name"] = "my_norm"
    with pytest.raises(ConfigError, match=r"model/norm=my_norm is not registered.*gptlab --plugin FILE\.py"):
        codec.from_json(data, "config.json")


def test_another_version_is_refused(data: dict[str, Any]) -> None:
    data["version"] = 7
    with pytest.raises(CheckpointError, match=r"config\.json: config version 7; this gptlab reads version 1"):
        codec.from_json(data, "config.json")


def test_a_field_that_is_not_there_any_more_names_its_place(data: dict[str, Any]) -> None:
    data["config"]["model"]["widht"] = 3
    with pytest.raises(ConfigError, match=r"config\.json\.model: ModelConfig has no 'widht' \(did you mean width\?\)"):
        codec.from_json(data, "config.json")


def test_damage_is_an_error_of_ours(data: dict[str, Any]) -> None:
    for broken in ({"version": 1}, {"version": 1, "config": []}, {**data, "config": {**data["config"], "model": {"norm": "rmsnorm"}}}):
        with pytest.raises((CheckpointError, ConfigError), match=r"config\.json"):
            codec.from_json(broken, "config.json")


def test_a_value_a_literal_does_not_allow_is_refused(data: dict[str, Any]) -> None:
    data["config"]["model"]["ffn"]["approximate"] = "no"
    with pytest.raises(ConfigError, match=r"config\.json\.model\.ffn\.approximate=no is not one of tanh, none"):
        codec.from_json(data, "config.json")


def test_a_field_that_was_added_later_takes_its_default(data: dict[str, Any]) -> None:
    del data["config"]["model"]["pad_vocab_to"], data["config"]["model"]["norm"]["eps"]
    again = codec.from_json(data, "config.json")
    assert again.model.pad_vocab_to == 1
    assert again.model.norm.eps == 1e-6  # type: ignore[attr-defined]


def test_flatten_shows_components_with_slashes_and_values_with_dots() -> None:
    flat = codec.flatten(compose(["model/norm=rmsnorm"], name="arm"))
    assert flat["model/norm"] == "rmsnorm"
    assert flat["model.norm.eps"] == 1e-6
    assert flat["optimizer"] == "adamw"
    assert flat["name"] == "arm"
    assert all(not isinstance(v, dict) for v in flat.values())


def test_transform_changes_a_copy(composed: Callable[..., Config]) -> None:
    config = composed()
    changed = transform(config, "model.width", lambda w: w * 2)
    assert changed.model.width == 2 * config.model.width
    assert changed.model.depth == config.model.depth
