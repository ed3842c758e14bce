"""Composition: every recipe and every swap composes, and what a user gets wrong is told in one sentence that says what would work."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptlab.config.compose import compose, name_of, settings
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of, components, has_default, load_components
from gptlab.config.schema import Config
from gptlab.config.slots import SLOTS
from gptlab.config.sources import config_dir, experiment_dirs

load_components()
CONF = config_dir()
RECIPES = sorted(
    f.relative_to(CONF).with_suffix("").as_posix() for f in CONF.rglob("*.yaml") if f.name != "config.yaml" and "dashboard" not in f.parts
)  # of runs
EXPERIMENTS = sorted(f for folder in experiment_dirs() for f in folder.glob("*.yaml"))


def _choose(group: str, name: str) -> list[str]:
    files = {name: ["data.corpus.path=x.txt"] for name in ("text", "chat", "preferences")}
    sets = {name: ["data.corpus.dataset=owner/name"] for name in ("hub", "chat_hub")}
    corpora = {**files, **sets}
    needed = {"data": corpora, "data/corpus": corpora, "data/tokenizer": {"file": ["data.tokenizer.path=x.json"]}}
    extra = list(needed.get(group, {}).get(name, []))
    if group == "objective/reward":
        return ["objective=grpo", f"+objective/reward@objective.rewards.more={name}"]
    extra += ["callbacks.more.curve=nanogpt_shakespeare_cpu"] if (group, name) == ("callback", "reference") else []
    return [f"+callback@callbacks.more={name}" if group == "callback" else f"{group}={name}", *extra]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(recipe: str, composed: Callable[..., Config]) -> None:
    group, _, name = recipe.rpartition("/")
    composed(*_choose(group, name))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: f.stem)
def test_every_experiment_composes_with_every_value_of_its_axes(file: Path) -> None:
    sweeper = (yaml.safe_load(file.read_text("utf-8")).get("hydra") or {}).get("sweeper") or {}
    axes = {key: str(values).split(",") for key, values in (sweeper.get("params") or {}).items() if key != "seed"}
    for i in range(max((len(values) for values in axes.values()), default=1)):
        compose([f"experiment={file.stem}", *(f"{key}={values[i % len(values)].strip()}" for key, values in axes.items())])
    for stage in (sweeper.get("stages") or {}).values():
        compose([f"experiment={file.stem}", *shlex.split(stage)])


@pytest.mark.parametrize("found", [pytest.param(c, id=f"{c.slot.path}={c.name}") for c in components() if c.outside is None])
def test_every_single_swap_composes(found: Any) -> None:
    config = compose(_choose(found.slot.path, found.name))
    part: Any = config
    for name in found.slot.path.split("/"):
        part = config.callbacks["more"] if name == "callback" else part.rewards["more"] if name == "reward" else getattr(part, name)
    assert component_of(part) is found


def _set_in_slots(data: Any, path: str) -> Iterator[str]:
    """The dotted keys of a YAML tree that lie inside a slot."""
    if isinstance(data, dict):
        for key, value in data.items():
            here = f"{path}.{key}" if path else str(key)
            inside = next((s for s in SLOTS if here.startswith(s.replace("/", ".") + ".")), None)
            if inside or here.startswith("callbacks."):
                yield here
            else:
                yield from _set_in_slots(value, here)


@pytest.mark.parametrize("file", [*sorted(CONF.rglob("*.yaml")), *EXPERIMENTS], ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_no_recipe_sets_a_field_of_a_slots_component(file: Path) -> None:
    data = yaml.safe_load(file.read_text("utf-8"))
    defaults = data.pop("defaults", [])
    data.pop("hydra", None)
    group = "" if file in EXPERIMENTS else file.relative_to(CONF).parent.as_posix().removeprefix(".")
    if group in SLOTS:  # a preset of one component
        names = {c.name for c in components(group)} | {f.stem for f in file.parent.glob("*.yaml")}
        assert defaults[-1] == "_self_", "a preset is defaults: [component, _self_]"
        assert defaults[0] in names - {file.stem}
        for part in defaults[1:-1]:  # of a mix: its sources
            assert defaults[0] == "mix"
            assert part.partition("@")[0] in names
            assert part.partition("@")[2].startswith("sources.")
        assert file.stem not in {c.name for c in components(group)}, "a preset hides a component of the same name"
        return
    assert list(_set_in_slots(data, group.replace("/", "."))) == [], "it would leak into, or break, whatever replaces the component"


SENTENCES = [
    (["model.widht=3"], "model.widht is not a key of the config (did you mean model.width?)"),
    (["widht=3"], "widht is not a key of the config (did you mean model.width?)"),
    (["norm=rmsnorm"], "norm is not a key of the config (did you mean model/norm?)"),
    (["learning_rate=3"], "learning_rate is not a key of the config (did you mean optimizer.learning_rate?)"),
    (["modle=nano"], "modle is not a key of the config (did you mean model?)"),
    (["model/norms=rmsnorm"], "model/norms is not a key of the config (did you mean model/norm?)"),
    (["seeds.model=3"], "seeds.model is not a key of the config; there are seeds.data, seeds.dropout, seeds.init"),
    (["optimizer.betta1=.3"], "optimizer.betta1 is not an option of optimizer=adamw (did you mean optimizer.beta1?)"),
    (["callbacks.samples.evry=3"], "callbacks.samples.evry is not an option of callback=samples (did you mean callbacks.samples.every?)"),
    (["model/norm=rmsnorm", "model.norm.epps=1"], "model.norm.epps is not an option of model/norm=rmsnorm (did you mean model.norm.eps?)"),
    (
        ["model/norm=none", "model.norm.eps=1e-3"],
        "model.norm.eps is not an option of model/norm=none, which has none; model/norm=layernorm, rmsnorm, rmsnorm_nonparametric or "
        "layernorm_nonparametric has it",
    ),
    (
        ["model/ffn=swiglu", "model.ffn.approximate=none"],
        "model.ffn.approximate is not an option of model/ffn=swiglu, which has expansion, multiple_of; model/ffn=gelu has it",
    ),
    (["++model.norm.zzz=3"], "model.norm.zzz is not an option of model/norm=layernorm, which has eps"),
    (["model/norm=rmsnrm"], "model/norm=rmsnrm: no such option (did you mean rmsnorm?); there are layernorm, layernorm_nonparametric,"),
    (["data=shakspeare"], "data=shakspeare: no such option (did you mean shakespeare?); there are "),
    (["experiment=quickstat"], "experiment=quickstat: no such option (did you mean quickstart?); there "),
    (["model/norm=null"], "model/norm=null: model/norm takes the name of an option: layernorm, rmsnorm, rmsnorm_nonparametric,"),
    (["model=1"], "model=1: model takes the name of an option"),
    (["model.width=abc"], "model.width=abc must be a whole number"),
    (["model.width=1.5"], "model.width=1.5 must be a whole number"),
    (["model.width=null"], "model.width=null: it needs a value"),
    (["model.dropout=much"], "model.dropout=much must be a number"),
    (["model.bias=maybe"], "model.bias=maybe must be true or false"),
    (["study=[a]"], "study=['a'] must be text, not a list"),
    (["model.ffn.approximate=tan"], "model.ffn.approximate=tan is not one of tanh, none (did you mean tanh?)"),
    (["model.norm=rmsnorm"], "model.norm=rmsnorm: components are chosen with a slash, model/norm=layernorm, rmsnorm,"),
    (["model.depth=${model.wdth}"], "model.depth: ${model.wdth} names a key that is not there (did you mean model.width?)"),
    (["data=text"], "data.corpus.path has no value: give it on the command line with data.corpus.path=…"),
    (["data/corpus=text"], "data.corpus.path has no value: give it on the command line with data.corpus.path=…"),
    (["~tracker"], "tracker has no component: choose one with tracker=none, offline, wandb or tensorboard"),
    (["data.validation.x=f"], "data.validation.x is a new set, which takes a plus: +data.validation.NAME=FILE"),
    (["name=${oc.env:HOME}"], "name: ${oc.env:…} would write the environment into the run; give the value itself"),
    (["model.width"], "'model.width' is not an override (missing EQUAL at '<EOF>'); write key=value"),
    (["model.width=[1,2"], "'model.width=[1,2' is not an override (no viable alternative at input '[1,2'); write key=value"),
]


@pytest.mark.parametrize(("overrides", "sentence"), SENTENCES, ids=[" ".join(o) for o, _ in SENTENCES])
def test_a_mistake_is_told_in_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    said = str(error.value)
    assert said.startswith(sentence)
    assert "\n" not in said
    assert "hydra.cc" not in said
    assert error.value.code == 2


@pytest.mark.parametrize("override", ["+model.zzz=3", "+data.corpus.foo=1", "+zzz=3", "++optimizer.learning_rte=3", "+trainer.a.b=1"])
def test_a_plus_does_not_slip_an_unknown_key_in(override: str) -> None:
    key = override.lstrip("+").partition("=")[0]
    with pytest.raises(ConfigError) as error:
        compose([override])
    assert key.startswith(str(error.value).split(" ")[0]), error.value


def test_what_has_no_default_is_only_the_users_own() -> None:
    bare = [c for c in components() if not all(has_default(c.options, f) for f in c.options.__dataclass_fields__)]
    assert {f"{c.slot.path}={c.name}" for c in bare} == {
        "data/corpus=text", "data/corpus=hub", "data/corpus=chat", "data/corpus=preferences", "data/corpus=chat_hub",
        "data/tokenizer=file", "callback=reference",
    }  # fmt: skip


def test_a_run_is_named_after_what_sets_it_apart() -> None:
    overrides = ["seed=1", "model/norm=rmsnorm", "optimizer.learning_rate=3e-4", "tracker=none", "study=x", "hardware.threads=2"]
    assert name_of(overrides) == "norm=rmsnorm,learning_rate=3e-4,seed=1"
    assert settings(["+data.validation.x=a/b", "data.corpus.path=/a"]) == {"data.validation.x": "a/b"}
    assert compose(["model/norm=rmsnorm"]).name == "norm=rmsnorm"
    assert compose(["model/norm=rmsnorm"], name="mine").name == "mine"
    assert compose([]).name == ""


def test_composing_twice_gives_equal_configs_and_shares_nothing() -> None:
    one, two = compose(["seed=3"]), compose(["seed=3"])
    assert one == two
    one.callbacks.clear()
    one.model.width = 1
    assert two.callbacks
    assert two.model.width != 1
