"""The registry: one decorator turns a class or a factory function into a component that a config can name.

A component's keyword-only parameters are its config; its positional parameters are wiring that the builder supplies.
`register` makes a typed options dataclass from the signature, so adding a component is one file and no YAML.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from gptlab.config.errors import ConfigError
from gptlab.config.slots import SLOTS, Options, Slot

F = TypeVar("F", bound=Callable[..., Any])

PLUGINS_VARIABLE = "GPTLAB_PLUGINS"
ENTRY_POINTS = "gptlab.components"
# Modules that register the built-in components; imported when a command needs them, since they import torch.
BUILTIN = (
    *(f"gptlab.model.{m}" for m in ("norm", "position", "attention", "kernel", "ffn", "experts", "block")),
    *(f"gptlab.model.{m}" for m in ("input", "stream", "value", "gate", "head", "init", "parametrisation")),
    *(
        f"gptlab.data.{m}"
        for m in ("corpus", "hub", "synthetic", "reasoning_gym", "mix", "tokenizer", "bpe", "huggingface", "tokenizer_file")
    ),
    *(f"gptlab.data.{m}" for m in ("chat_tokens", "chat_corpus", "drills")),
    "gptlab.hardware.checkpointing",
    "gptlab.hardware.strategy",
    *(f"gptlab.optimizer.{m}" for m in ("adamw", "sgd", "lion", "muon", "adafactor", "schedule_free")),
    *(f"gptlab.schedule.{m}" for m in ("cosine", "wsd", "linear", "constant", "inverse_sqrt", "cooldown")),
    *(f"gptlab.objective.{m}" for m in ("lm", "sft", "dpo", "reward", "grpo", "sae")),
    *(f"gptlab.tracker.{m}" for m in ("none", "wandb", "tensorboard")),
    "gptlab.runner.callbacks",
    "gptlab.runner.histograms",
    "gptlab.runner.inference",
    "gptlab.runner.pruning",
    "gptlab.runner.problems",
    "gptlab.runner.averages",
    "gptlab.runner.diagnostics",
    "gptlab.runner.reference",
    "gptlab.runner.inherit",
    "gptlab.interpret.insight",
    "gptlab.evaluate.callback",
)


@dataclass(frozen=True)
class Component:
    """A registered choice for a slot."""

    slot: Slot
    name: str
    factory: Callable[..., Any]
    options: type[Options]
    wiring: tuple[str, ...]
    choices: dict[str, tuple[str, ...]]
    tuples: frozenset[str]
    outside: Path | None  # the source file of a component that is not gptlab's own

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        lines = (inspect.getdoc(self.factory) or "").strip().splitlines()
        return lines[0] if lines else ""

    def source_hash(self) -> str | None:
        """SHA-256 of the file that defines an outside component; None for gptlab's own."""
        return hashlib.sha256(self.outside.read_bytes()).hexdigest() if self.outside else None


_COMPONENTS: dict[tuple[str, str], Component] = {}
_BY_OPTIONS: dict[type[Options], Component] = {}


def register(slot: str, name: str) -> Callable[[F], F]:
    """Decorator: make a class or factory function the component `name` of `slot`.

    Raises ConfigError for an unknown slot, a name that is taken, positional parameters that the slot does not supply, and
    keyword-only parameters without a type that a config can hold.
    """
    if slot not in SLOTS:
        raise ConfigError(f"register({slot!r}, {name!r}): no such slot{suggest(slot, SLOTS)}")

    def decorate(factory: F) -> F:
        component = _describe(SLOTS[slot], name, factory)
        known = _COMPONENTS.get((slot, name))
        if known is not None and _identity_of(known.factory) != _identity_of(factory):
            raise ConfigError(f"{slot}={name} is registered twice: by {_where(known.factory)} and by {_where(factory)}")
        _COMPONENTS[slot, name] = component
        _BY_OPTIONS[component.options] = component
        return factory

    return decorate


def _identity_of(factory: Callable[..., Any]) -> tuple[str, str]:
    return factory.__module__, factory.__qualname__


def _where(factory: Callable[..., Any]) -> str:
    return ".".join(_identity_of(factory))


def _describe(slot: Slot, name: str, factory: Callable[..., Any]) -> Component:
    where = f"{slot.path}={name} ({_where(factory)})"
    namespace = vars(sys.modules[factory.__module__])
    wiring: list[str] = []
    option_fields: list[tuple[str, Any, Any]] = []
    choices: dict[str, tuple[str, ...]] = {}
    tuples: set[str] = set()
    inherited = isinstance(factory, type) and "__init__" not in vars(factory)
    for parameter in inspect.signature(factory).parameters.values():
        if inherited and parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue  # nn.Module's own __init__, which wants nothing
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(f"{where}: *{parameter.name} cannot become config; name each keyword-only parameter")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            if parameter.name not in slot.wiring:
                offers = ", ".join(slot.wiring) or "nothing"
                raise ConfigError(f"{where}: the slot supplies {offers}, not {parameter.name!r}; options must be keyword-only (after `*`)")
            wiring.append(parameter.name)
            continue
        if parameter.name == "name":
            raise ConfigError(f"{where}: an option cannot be called 'name': in a run's config.json that is the component's own")
        if parameter.annotation is parameter.empty:
            raise ConfigError(f"{where}: option {parameter.name!r} needs a type annotation")
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = eval(annotation, dict(namespace))  # the component author's own annotation, as typing does
        kind, allowed, is_tuple = _config_type(annotation, f"{where}: option {parameter.name!r}")
        if allowed:
            choices[parameter.name] = allowed
        if is_tuple:
            tuples.add(parameter.name)
        option_fields.append((parameter.name, kind, _default(parameter.default, is_tuple)))
    # A name that cannot clash with the class itself, and a place to import it from: workers of a sweep unpickle by reference.
    module = sys.modules[factory.__module__]
    class_name = f"{factory.__name__}Options"
    taken = _BY_OPTIONS.get(getattr(module, class_name, Options))
    if taken is not None and (taken.slot.path, taken.name) != (slot.path, name):  # one factory under two names
        class_name = f"{factory.__name__}_{slot.path}_{name}_Options".replace("/", "_")
    options = make_dataclass(class_name, option_fields, bases=(slot.base,), slots=True, kw_only=True)
    options.__module__ = factory.__module__
    options.__doc__ = f"Options of {slot.path}={name}."
    setattr(module, class_name, options)
    return Component(slot, name, factory, options, tuple(wiring), choices, frozenset(tuples), _outside(factory))


def _outside(factory: Callable[..., Any]) -> Path | None:
    if factory.__module__.split(".")[0] == "gptlab":
        return None
    source = inspect.getsourcefile(inspect.unwrap(factory))
    return Path(source) if source else None


def _default(value: Any, is_tuple: bool) -> Any:
    if value is inspect.Parameter.empty:
        return field(default="???")  # OmegaConf's mark for "must be given"
    if isinstance(value, (list, dict, tuple)):
        made = list(value) if is_tuple else value
        return field(default_factory=lambda: type(made)(made))
    return field(default=value)


def _config_type(annotation: Any, where: str) -> tuple[Any, tuple[str, ...], bool]:
    """The type OmegaConf can hold for an annotation, the allowed values of a Literal, and whether it was a tuple."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if not all(isinstance(a, str) for a in arguments):
            raise ConfigError(f"{where}: a Literal must hold strings")
        return str, tuple(arguments), False
    if origin is tuple:
        inner = {a for a in arguments if a is not Ellipsis}
        if len(inner) != 1:
            raise ConfigError(f"{where}: a tuple must hold one type")
        return list[inner.pop()], (), True  # type: ignore[misc]
    if origin in (typing.Union, types.UnionType):
        inner = {a for a in arguments if a is not type(None)}
        if len(inner) == 1 and type(None) in arguments:
            kind, allowed, is_tuple = _config_type(inner.pop(), where)
            return typing.Optional[kind], allowed, is_tuple  # noqa: UP045 (built from a value)
        if inner <= {int, float, bool, str}:  # a number or `auto`
            return annotation, (), False
    if annotation in (int, float, bool, str) or origin in (list, dict):
        return annotation, (), False
    raise ConfigError(f"{where}: {annotation!r} cannot be config; use int, float, bool, str, Literal, list, dict or X | None")


def build(options: Options, **wiring: Any) -> Any:
    """Make the component that `options` describes. `wiring` must hold every name of the slot; each takes what it asks for."""
    component = component_of(options)
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    for name in component.tuples:
        if values[name] is not None:
            values[name] = tuple(values[name])
    return component.factory(*(wiring[name] for name in component.wiring), **values)


def component_of(options: Options) -> Component:
    """The component whose options these are."""
    return _BY_OPTIONS[type(options)]


def component(slot: str, name: str) -> Component:
    """The component `name` of `slot`. Raises ConfigError, naming the nearest and how to supply a missing one."""
    try:
        return _COMPONENTS[slot, name]
    except KeyError:
        known = [c.name for c in components(slot)]
        raise ConfigError(
            f"{slot}={name} is not registered{suggest(name, known)}; a component of your own is supplied with `gptlab --plugin FILE.py …`"
        ) from None


def absent(slot: Slot) -> Options | None:
    """The options of the component that a config without this slot means; None where every config must choose one."""
    return component(slot.path, slot.absent).options() if slot.absent else None


def absent_parts(recipe: str) -> dict[str, Any]:
    """The field of a recipe's config (`model`, `hardware`) -> the component that does nothing, of every slot that it may leave open."""
    return {path.partition("/")[2]: absent(slot) for path, slot in SLOTS.items() if slot.absent and path.startswith(f"{recipe}/")}


def components(slot: str | None = None) -> list[Component]:
    """Every component (of `slot`), in order of registration."""
    return [c for c in _COMPONENTS.values() if slot is None or c.slot.path == slot]


def check_choices(options: Options, path: str) -> None:
    """Raise ConfigError if a field declared as a Literal holds another value."""
    for name, allowed in component_of(options).choices.items():
        value = getattr(options, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{path}.{name}={value} is not one of {', '.join(allowed)}{suggest(str(value), allowed)}")


def suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """' (did you mean …?)' when something known is close to `word`, else ''."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]}?)" if near else ""


def load_components() -> None:
    """Import the built-in components, installed entry points, and the files named by --plugin."""
    for module in BUILTIN:
        importlib.import_module(module)
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    for file in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep)):
        load_plugin(Path(file))


def add_plugin(file: Path) -> None:
    """Make `file` a plugin of this process and of the workers it starts. Raises ConfigError if it is not a Python file."""
    file = file.resolve()
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"--plugin {file}: not a Python file")
    known = [p for p in os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep) if p]
    if str(file) not in known:
        os.environ[PLUGINS_VARIABLE] = os.pathsep.join([*known, str(file)])
    # Workers unpickle option classes by module name, so they must be able to import the file's stem.
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if str(file.parent) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(file.parent), *paths])


def load_plugin(file: Path) -> types.ModuleType:
    """Import a plugin file under its stem. Raises ConfigError with what it raised and where."""
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    try:
        module = importlib.import_module(file.stem)
    except (Exception, SystemExit) as error:
        frames = [f for f in inspect.getinnerframes(error.__traceback__) if f.filename == str(file)] if error.__traceback__ else []
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        said = f": {error}" if isinstance(error, ConfigError) else f" raised {type(error).__name__}: {error}"
        raise ConfigError(f"plugin {file}{f', line {line}' if line else ''}{said}") from error
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != file.resolve():
        raise ConfigError(f"plugin {file}: the name {file.stem!r} is taken by {found or 'a built-in module'}; rename the file")
    return module


def components_from(file: Path) -> list[Component]:
    """The components that a Python file registers; it is imported as a plugin. Raises ConfigError."""
    add_plugin(file)
    module = load_plugin(file.resolve())
    return [c for c in components() if c.factory.__module__ == module.__name__]


def has_default(options: type[Options], name: str) -> bool:
    """Whether the field has a default (a required one has not)."""
    found = next(f for f in fields(options) if f.name == name)
    return found.default not in (NO_DEFAULT, "???") or found.default_factory is not NO_DEFAULT
