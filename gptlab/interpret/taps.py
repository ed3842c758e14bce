"""Names of activations, and the hooks that read and change them.

An activation is what a module gives, and has its path: `embedded`, `blocks.3.attention`, `blocks.3.attention.q`, `blocks.3.ffn.hidden`,
`blocks.3.residual_post`, `norm`. Two kinds of part have names of their own: `blocks.3.attention.head.2`, a head's share of
`attention.z`, and `blocks.3.ffn.neuron.17`, a unit of `ffn.hidden`. A glob takes many: `blocks.*.attention.pattern`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of, suggest
from gptlab.interpret.given import Model, model_of
from gptlab.model.attention import Average
from gptlab.model.kernel import Naive
from gptlab.model.mode import evaluating
from gptlab.model.transformer import Transformer

Edit: TypeAlias = Tensor | Callable[[Tensor], Tensor]
_PART = re.compile(r"(?P<owner>.+)\.(?P<kind>head|neuron)\.(?P<index>\d+)")
_OF_PATTERN = (".pattern", ".scores")


@dataclass(frozen=True)
class Place:
    """One activation: what `module` gives, or the `part` of its last axis (from, to) that is a head's or a unit's."""

    name: str
    module: str
    part: tuple[int, int] | None = None

    def read(self, x: Tensor) -> Tensor:
        return x if self.part is None else x[..., slice(*self.part)]

    def write(self, x: Tensor, edit: Edit) -> Tensor:
        """x with this place changed. Raises ConfigError for a value of another shape."""
        own = self.read(x)
        value = edit if isinstance(edit, Tensor) else edit(own)
        try:
            value = value.to(own).expand_as(own)
        except RuntimeError as error:
            raise ConfigError(
                f"{self.name} has the shape {tuple(own.shape)}; a value of shape {tuple(value.shape)} does not fit it"
            ) from error
        if self.part is None:
            return value
        changed = x.clone()
        changed[..., slice(*self.part)] = value
        return changed


def names(model: Model, pattern: str = "*") -> list[str]:
    """The activations that `pattern` takes, in the order in which they come about. Runs the model on one token.

    Heads and neurons are listed where the pattern asks for them: `*.head.*`, `blocks.0.ffn.neuron.*`.
    """
    inside = model_of(model)
    found: dict[str, Tensor] = {}
    token = torch.zeros((1, 1), dtype=torch.long, device=inside.embedding.weight.device)
    with hooked(inside, places(inside, pattern), found, {}):
        inside(token)
    return list(found)


def places(model: Transformer, names: str | Iterable[str]) -> list[Place]:
    """The places that names and globs mean. Raises ConfigError for one that means none, naming the nearest."""
    modules = _modules(model)
    found: dict[str, Place] = {}
    for name in [names] if isinstance(names, str) else names:
        taken = _globbed(model, modules, name) if re.search(r"[*?\[]", name) else _exact(model, modules, name)
        if not taken:
            raise _unknown(model, modules, name)
        found |= {place.name: place for place in taken}
    return list(found.values())


def tapped(model: Transformer, names: str | Iterable[str]) -> dict[Place, tuple[int, ...]]:
    """The places that names and globs mean and that give an activation, each with the axes along which its tokens lie.

    (b, t, d) has 1, (b, h, t, k) has 2, a pattern has 2 and 3, and where the tokens of all rows lie in one axis, as a mixture's slots do,
    it is 0. Runs the model on one token and on two: what grows is an axis of tokens (of a context of one token none is known).
    Raises ConfigError for a name that means nothing, or only parts that give no activation.
    """
    names = [names] if isinstance(names, str) else list(names)
    taken = places(model, names)
    if not taken:
        return {}
    found: list[dict[str, Tensor]] = []
    for length in (1, min(2, model.config.context_length)):
        found.append({})
        with hooked(model, taken, found[-1], {}):
            model(torch.zeros((1, length), dtype=torch.long, device=model.embedding.weight.device))
    one, two = found
    check_given(model, names, one)
    given = [place for place in taken if place.name in one]
    return {p: tuple(i for i, (a, b) in enumerate(zip(one[p.name].shape, two[p.name].shape, strict=True)) if a != b) for p in given}


def check_given(model: Transformer, names: Iterable[str], found: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for a name or glob of which a forward has `found` nothing."""
    for name in names:
        if not any(place.name in found for place in places(model, name)):
            raise ConfigError(f"{name} is a part of this model that gives no activation; gptlab.interpret.names(model) lists those that do")


def _modules(model: Transformer) -> list[str]:
    """Every path that may give an activation: those of the modules, and the taps that a fused kernel lacks."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        if path and not isinstance(module, nn.ModuleList):
            found[path] = None
        if _fused(module):
            found |= {f"{path}{tap}": None for tap in _OF_PATTERN}
    return list(found)


def _fused(module: Any) -> bool:
    """Whether it is an attention whose kernel shows no pattern."""
    kernel = vars(module).get("kernel", module._modules.get("kernel"))
    return getattr(kernel, "materialises_pattern", None) is False


def _exact(model: Transformer, modules: Sequence[str], name: str) -> list[Place]:
    if name in modules:
        return [Place(name, name)]
    part = _PART.fullmatch(name)
    if part is None or part["owner"] not in modules:
        return []
    owner, kind, index = part["owner"], part["kind"], int(part["index"])
    count, width, tap = _parts(model.get_submodule(owner), kind)
    if not count:
        raise ConfigError(f"{name}: {owner} ({described(model, owner)}) has no {kind}s of its own; `{owner}` is all of it")
    if index >= count:
        raise ConfigError(f"{name}: {owner} has {count:,} {kind}s, from 0 to {count - 1}")
    return [Place(name, f"{owner}.{tap}", (index * width, (index + 1) * width))]


def _globbed(model: Transformer, modules: Sequence[str], glob: str) -> list[Place]:
    found = [Place(name, name) for name in modules if fnmatchcase(name, glob)]
    for kind in ("head", "neuron"):
        if f".{kind}." in glob:
            for owner in modules:
                count, width, tap = _parts(model.get_submodule(owner), kind) if _has(model, owner) else (0, 0, "")
                named = ((f"{owner}.{kind}.{i}", i) for i in range(count))
                found += [Place(n, f"{owner}.{tap}", (i * width, (i + 1) * width)) for n, i in named if fnmatchcase(n, glob)]
    return found


def _has(model: Transformer, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _parts(module: Any, kind: str) -> tuple[int, int, str]:
    """How many heads (or neurons) a module has, how wide each is, and which tap holds them; 0 of them where it has none."""
    if kind == "head" and hasattr(module, "z") and hasattr(module, "heads"):
        return module.heads, module.head_width, "z"
    if kind == "neuron" and hasattr(module, "hidden") and hasattr(module, "down"):
        return module.down.in_features, 1, "hidden"
    return 0, 0, ""


def has_heads(module: Any) -> bool:
    """Whether an attention's heads can be told apart, and have names."""
    return _parts(module, "head")[0] > 0


def described(model: Transformer, path: str) -> str:
    """The component that a block's part is: `model/attention=average`."""
    slot = path.rpartition(".")[2]
    options = getattr(model.config, slot, None)
    return f"model/{slot}={component_of(options).name}" if options is not None else type(model.get_submodule(path)).__name__


def _unknown(model: Transformer, modules: Sequence[str], name: str) -> ConfigError:
    if name.startswith("blocks.") and not model.blocks:
        return ConfigError(f"{name}: this model has no blocks (model.depth=0, a bigram), so neither attention nor a pattern")
    owner, _, tap = name.rpartition(".")
    if f".{tap}" in _OF_PATTERN:
        owners = [o for o in modules if o.endswith(".attention") and fnmatchcase(o, owner)]
        if owners:
            told = f"{name}: {described(model, owners[0])} has no {tap}"
            even = isinstance(model.get_submodule(owners[0]), Average)
            return ConfigError(f"{told}; `patterns` gives what an even mean comes to" if even else f"{told} that could be shown")
    parts = [f"{o}.{k}.0" for o in modules for k in ("head", "neuron") if _has(model, o) and _parts(model.get_submodule(o), k)[0]]
    near = suggest(name, [*names(model), *parts], cutoff=0.4)
    return ConfigError(f"{name}: this model has no such activation{near}; gptlab.interpret.names(model) lists them")


@contextmanager
def hooked(model: Transformer, read: Sequence[Place], into: dict[str, Tensor], edits: dict[Place, Edit]) -> Iterator[tuple[str, ...]]:
    """Within, a forward puts the places read `into` a dictionary, as the edits have left them; in evaluation mode, without gradients.

    Attentions whose fused kernel shows no pattern compute with the naive one where their pattern or scores are read or changed;
    these are given by their paths. A place that gives no tensor is not among what was read.
    """
    by_module: dict[str, tuple[list[Place], list[Place]]] = {}
    for place in edits:
        by_module.setdefault(place.module, ([], []))[0].append(place)
    for place in read:
        by_module.setdefault(place.module, ([], []))[1].append(place)
    modules = dict(model.named_modules())
    fused = tuple(path for path, module in modules.items() if _fused(module) and any(f"{path}{t}" in by_module for t in _OF_PATTERN))

    def hook(changed: list[Place], wanted: list[Place]) -> Callable[..., Tensor | None]:
        def seen(module: nn.Module, inputs: Any, out: Any) -> Tensor | None:
            if not isinstance(out, Tensor):
                return None
            for place in changed:
                out = place.write(out, edits[place])
            for place in wanted:
                into[place.name] = place.read(out)
            return out if changed else None

        return seen

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        for path in fused:
            stack.enter_context(_shown(modules[path]))
            modules |= {f"{path}{tap}": model.get_submodule(f"{path}{tap}") for tap in _OF_PATTERN}
        for path, (changed, wanted) in by_module.items():
            stack.callback(modules[path].register_forward_hook(hook(changed, wanted)).remove)
        yield fused


@contextmanager
def _shown(attention: Any) -> Iterator[None]:
    """The naive kernel in the place of a fused one, with the taps that it needs: the same function, and all of it can be seen."""
    own, plain = vars(attention), vars(attention).get("kernel")  # in the dictionary, so that a kernel that is a module keeps its place
    own["kernel"] = Naive()
    attention.scores, attention.pattern = nn.Identity(), nn.Identity()
    try:
        yield
    finally:
        del own["kernel"], attention.scores, attention.pattern
        if plain is not None:
            own["kernel"] = plain
