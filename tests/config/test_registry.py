"""The registry: a signature becomes options, and what cannot is refused when it is registered."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest

from gptlab.config import registry
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, check_choices, component, components, load_components, register
from gptlab.config.slots import Norm, Options


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Forget what a test registered."""
    load_components()
    before = dict(registry._COMPONENTS), dict(registry._BY_OPTIONS), set(sys.modules), list(sys.path)
    yield
    for mapping, was in zip((registry._COMPONENTS, registry._BY_OPTIONS), before[:2], strict=True):
        mapping.clear()
        mapping.update(was)
    for name in set(sys.modules) - before[2]:
        if getattr(sys.modules[name], "__file__", None) and "plugin" in name:
            del sys.modules[name]
    sys.path[:] = before[3]


def test_signature_becomes_typed_options() -> None:
    def made(width: int, *, eps: float = 1e-6, label: str = "x", deep: bool = False, size: int | None = None, must: int) -> Any:
        return width, eps, label, deep, size, must

    register("model/norm", "made")(made)
    found = component("model/norm", "made")
    assert [f.name for f in fields(found.options)] == ["eps", "label", "deep", "size", "must"]
    assert issubclass(found.options, Norm)
    assert found.wiring == ("width",)
    options = found.options(must=3)  # type: ignore[call-arg]
    assert build(options, width=8, bias=True) == (8, 1e-6, "x", False, None, 3)
    with pytest.raises(AttributeError):
        options.zzz = 1  # type: ignore[attr-defined]


def test_wiring_the_slot_does_not_supply_is_refused() -> None:
    def made(width: int, heads: int) -> Any: ...

    with pytest.raises(ConfigError, match=r"model/norm=made .*the slot supplies width, bias, not 'heads'; options must be keyword-only"):
        register("model/norm", "made")(made)


def test_unknown_slot_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no such slot \(did you mean model/norm\?\)"):
        register("model/nrom", "made")


def test_literal_becomes_a_checked_str() -> None:
    def made(*, form: Literal["fast", "slow"] = "fast") -> Any: ...

    register("schedule", "made")(made)
    found = component("schedule", "made")
    assert fields(found.options)[0].type is str
    check_choices(found.options(form="slow"), "schedule")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"schedule.form=fats is not one of fast, slow \(did you mean fast\?\)"):
        check_choices(found.options(form="fats"), "schedule")  # type: ignore[call-arg]


def test_tuple_goes_in_as_a_list_and_comes_out_as_a_tuple() -> None:
    def made(*, betas: tuple[float, ...] = (0.9, 0.95), sizes: tuple[int, int] | None = None) -> Any:
        return betas, sizes

    register("schedule", "made")(made)
    options = component("schedule", "made").options()
    assert options.betas == [0.9, 0.95]  # type: ignore[attr-defined]
    options.betas.append(1.0)  # type: ignore[attr-defined]
    assert component("schedule", "made").options().betas == [0.9, 0.95], "a default is shared between configs"  # type: ignore[attr-defined]
    assert build(options) == ((0.9, 0.95, 1.0), None)


def test_what_cannot_be_config_is_refused() -> None:
    def unannotated(*, eps=1e-6) -> Any: ...  # type: ignore[no-untyped-def]
    def stars(*args: int) -> Any: ...
    def keywords(**kwargs: int) -> Any: ...
    def strange(*, x: complex = 1j) -> Any: ...
    def numbers(*, x: Literal[1, 2] = 1) -> Any: ...
    def named(*, name: str = "mine") -> Any: ...

    for factory, said in (
        (unannotated, "option 'eps' needs a type annotation"),
        (stars, r"\*args cannot become config; name each"),
        (keywords, r"\*kwargs cannot become config"),
        (strange, "option 'x': .*complex.* cannot be config; use int, float"),
        (numbers, "a Literal must hold strings"),
        (named, "an option cannot be called 'name'"),
    ):
        with pytest.raises(ConfigError, match=said):
            register("schedule", "made")(factory)
    assert not any(c.name == "made" for c in components())


@pytest.mark.parametrize("found", [pytest.param(c, id=f"{c.slot.path}={c.name}") for c in (load_components(), components())[1]])
def test_every_options_class_is_importable_by_reference(found: registry.Component) -> None:
    options = found.options()
    again = pickle.loads(pickle.dumps(options))
    assert type(again) is found.options
    assert again == options
    assert registry.component_of(again) is found
    assert found.summary, "a component without a docstring says nothing in `gptlab components`"


def test_registering_the_same_again_is_fine_and_another_is_refused() -> None:
    def made(*, a: int = 1) -> Any: ...

    register("schedule", "made")(made)
    register("schedule", "made")(made)

    def other(*, a: int = 1) -> Any: ...

    with pytest.raises(ConfigError, match=r"schedule=made is registered twice: by .*made and by .*other"):
        register("schedule", "made")(other)


def test_one_factory_under_two_names_keeps_both_importable() -> None:
    register("schedule", "made")(_shared_factory)
    register("schedule", "also_made")(_shared_factory)
    for name in ("made", "also_made"):
        options = pickle.loads(pickle.dumps(component("schedule", name).options()))
        assert registry.component_of(options).name == name


def _shared_factory(*, a: int = 1) -> int:
    return a


def test_unknown_component_names_the_nearest_and_the_way_to_supply_it() -> None:
    with pytest.raises(ConfigError, match=r"model/norm=rmsnrm is not registered \(did you mean rmsnorm\?\).*gptlab --plugin FILE.py"):
        component("model/norm", "rmsnrm")


GOOD = """
from gptlab import register

@register("model/norm", "mine_{0}")
def mine(width: int, *, scale: float = 2.0):
    "Mine."
    return width * scale
"""


def test_a_good_plugin_registers_and_is_known_as_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "good_plugin_a.py"
    file.write_text(GOOD.format("a"))
    monkeypatch.setenv("PYTHONPATH", "")
    registry.add_plugin(file)
    registry.add_plugin(file)
    assert os.environ[registry.PLUGINS_VARIABLE] == str(file)
    assert os.environ["PYTHONPATH"] == str(tmp_path)
    load_components()
    found = component("model/norm", "mine_a")
    assert build(found.options(scale=3.0), width=2, bias=True) == 6.0  # type: ignore[call-arg]
    before = found.source_hash()
    assert before
    assert component("model/norm", "rmsnorm").source_hash() is None
    file.write_text(GOOD.format("a") + "# changed\n")
    assert found.source_hash() != before


def test_a_worker_unpickles_a_plugins_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "good_plugin_b.py"
    file.write_text(GOOD.format("b"))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    registry.add_plugin(file)
    load_components()
    (tmp_path / "options.pickle").write_bytes(pickle.dumps(component("model/norm", "mine_b").options(scale=5.0)))  # type: ignore[call-arg]
    code = "import pickle, sys\nfrom gptlab.config.registry import component_of\n"
    code += "print(component_of(pickle.load(open(sys.argv[1],'rb'))).name)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "options.pickle")], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "mine_b", done.stderr


def test_a_plugin_that_raises_is_told_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "bad_plugin.py"
    file.write_text("x = 1\n\ny = x / 0\n")
    with pytest.raises(ConfigError) as error:
        registry.load_plugin(file)
    assert str(error.value) == f"plugin {file}, line 3 raised ZeroDivisionError: division by zero"
    file.write_text("x = (\n")
    with pytest.raises(ConfigError, match=r"bad_plugin.py, line 1 raised SyntaxError"):
        registry.load_plugin(file)
    file.write_text("from gptlab import register\n\n@register('model/norm', 'worse')\ndef f(hights): ...\n")
    with pytest.raises(ConfigError, match=r"plugin .*bad_plugin.py, line 3: model/norm=worse .*not 'hights'"):
        registry.load_plugin(file)


def test_a_plugin_whose_name_is_taken_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "json.py"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"the name 'json' is taken by .*json.*; rename the file"):
        registry.load_plugin(file)


def test_a_plugin_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(ConfigError, match="not a Python file"):
            registry.add_plugin(file)


def test_every_slot_base_takes_no_stray_field() -> None:
    for found in components():
        assert issubclass(found.options, Options)
        with pytest.raises((AttributeError, TypeError)):
            found.options().zzz = 1  # type: ignore[attr-defined]
