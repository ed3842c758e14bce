"""What went wrong with a config, in one sentence: the key, the value, and what would work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from gptlab.config.errors import ConfigError
from gptlab.config.registry import components, suggest
from gptlab.config.schema import Config
from gptlab.config.slots import SLOTS, Options


def short_key(key: str) -> str:
    """The last word of a key: `norm` of `model/norm`, `learning_rate` of `optimizer.learning_rate`."""
    return re.split(r"[./]", key)[-1]


def check_overrides(overrides: Iterable[str]) -> None:
    """Refuse an override that would copy the environment into a config, a log and a checkpoint, and a group that is set to no name."""
    for override in overrides:
        key, _, value = override.partition("=")
        if re.search(r"\$\{\s*oc\.env", override):
            raise ConfigError(environment_refused(key))
        group = key.lstrip("+~").partition("@")[0]
        if group in _groups() and re.fullmatch(r"null|true|false|[-+.\d_]+(e[-+]?\d+)?", value, re.IGNORECASE):
            options = _names(group)
            raise ConfigError(f"{group}={value}: {group} takes the name of an option{f': {_listed(options)}' if options else ''}")


def references_as_text(overrides: Iterable[str]) -> list[str]:
    """The overrides, with references to runs as the texts that they are.

    13e0957672 is infinity to YAML; the `=` of study/position=rotary ends a value to Hydra, and so do the commas of a run's folder.
    """
    return [_REFERENCE.sub(_as_text, override) for override in overrides]


_REFERENCE = re.compile(r"^(?P<key>\+*trainer\.(?:init_from|start))=(?P<run>[^'\"\[\](){}$]+)$")


def _as_text(found: re.Match[str]) -> str:
    run = found["run"]
    quoted = re.fullmatch(r"\d+(?:e\d+)?", run) or ("=" in run and ("," not in run or Path(run.partition("@")[0]).is_dir()))
    return f"{found['key']}='{run}'" if quoted else found[0]


def environment_refused(key: str) -> str:
    """The sentence for a value that interpolates the environment."""
    return f"{key}: ${{oc.env:…}} would write the environment into the run; give the value itself"


def _groups() -> list[str]:
    return [*SLOTS, "model", "data", "hardware"]


def _names(slot: str) -> list[str]:
    return [c.name for c in components(slot)]


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def known_keys(value: Any = None, prefix: str = "") -> list[str]:
    """Every dotted key a config can hold, whatever its components, and every group."""
    if value is None:
        keys = [k for k in known_keys(Config()) if k.replace(".", "/") not in SLOTS or k in SLOTS] + _groups() + ["experiment"]
        for slot in components():
            place = slot.slot.path.replace("/", ".")
            keys += [f"{place}.{f.name}" for f in fields(slot.options) if place != "callback"]
        return list(dict.fromkeys(keys))
    found: list[str] = []
    for f in fields(value):
        key = f"{prefix}{f.name}"
        found.append(key)
        inner = getattr(value, f.name, None)
        if is_dataclass(inner) and not isinstance(inner, Options):
            found += known_keys(inner, f"{key}.")
    return found


def explain(error: BaseException) -> ConfigError:
    """One sentence for an error of Hydra or OmegaConf: the key, the value, and what would work."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for inner in chain:
        if isinstance(inner, ConfigError):
            return inner
    text = " ".join(str(e) for e in chain)
    owner = next((m[1] for e in chain if (m := re.search(r"Key '[^']*' not in '([^']+)'", str(e)))), "")
    for inner in chain:
        if isinstance(inner, OverrideParseException):
            said = re.sub(r"\s+", " ", str(inner.message).removeprefix(f"Error parsing override '{inner.override}'"))
            said = said.split(" See http")[0].strip()
            if "LexerNoViableAlt" in said:  # a character outside Hydra's grammar
                key, _, value = str(inner.override).partition("=")
                return ConfigError(f"{key}: write {key}='\"{value}\"', with both pairs of quotes, for a value with unusual characters")
            return ConfigError(
                f"{inner.override!r} is not an override ({said}); write key=value, and put quotes around a value with special characters"
            )
    if match := re.search(r"Could not override '([^']+)'", text):
        return ConfigError(wrong_key(match[1], owner))
    if match := re.search(r"Could not find '([^']+?)'", text):
        group, _, name = match[1].rpartition("/")
        found = re.search(r"Available options in '[^']+':((?:\s*\S+)*?)\s*(?:Config search path|$|In )", text)
        options = sorted(set((found[1] if found else "").split()))
        if options:
            return ConfigError(f"{group}={name}: no such option{suggest(name, options)}; there {_are(options)}")
        return ConfigError(f"{match[1]}: no such config{_nearest(match[1], known_keys())}")
    for inner in reversed(chain):
        if isinstance(inner, ConfigKeyError) and inner.full_key:
            return ConfigError(wrong_key(str(inner.full_key), owner))
    for inner in reversed(chain):
        if isinstance(inner, OmegaConfBaseException) and (inner.full_key or isinstance(inner, MissingMandatoryValue)):
            return ConfigError(_wrong_value(inner))
    message = re.sub(r"\s+", " ", str(error)).strip()
    if match := re.search(r"Ambiguous value for argument '(.*?)' 1\.", message):
        return ConfigError(f"{match[1]}: a list of values is a sweep; add -m")
    return ConfigError(re.sub(r" ?See https?://\S+.*$", "", message))


_WANTED = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "string": "text"}


def _wrong_value(error: OmegaConfBaseException) -> str:
    """The sentence for a value that its key cannot hold."""
    message = re.sub(r"\s+", " ", str(error.msg or error)).split(" full_key:")[0].strip()
    key = str(error.full_key or (m[1] if (m := re.search(r"[Mm]issing mandatory value: (\S+)", message)) else ""))
    slot = key.replace(".", "/")
    if isinstance(error, MissingMandatoryValue):
        if slot in SLOTS:
            return f"{key} has no component: choose one with {slot}={_listed(_names(slot))}"
        return f"{key} has no value: give it on the command line with {key}=…"
    if slot in SLOTS and (match := re.search(r"is not a subclass of \w+\. value: (.*)", message)):
        return f"{key}={match[1]}: components are chosen with a slash, {slot}={_listed(_names(slot))}"
    if match := re.search(r"Value '(.*?)'(?: of type '\w+')? could not be converted to (\w+)", message):
        return f"{key}={match[1]} must be {_WANTED.get(match[2], match[2])}"
    if match := re.search(r"Value '(.*?)' of type '\w+' is incompatible with type hint 'Union\[int, str\]'", message):
        return f"{key}={match[1]} must be a whole number or text"
    if match := re.search(r"Value '(.*)' is not a valid bool", message):
        return f"{key}={match[1]} must be true or false"
    if match := re.search(r"Cannot convert '(\w+)' to string: '(.*)'", message):
        return f"{key}={match[2]} must be text, not a {match[1]}"
    if "is not Optional" in message:
        return f"{key}=null: it needs a value"
    if match := re.search(r"Interpolation key '([^']+)' not found", message):
        return f"{key}: ${{{match[1]}}} names a key that is not there{_nearest(match[1], known_keys())}"
    return f"{key}: {message}"


def extra_key(node: Any) -> tuple[str, str] | None:
    """The full key of the first value that its class does not declare, and the name of that class."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return None
    kind = OmegaConf.get_type(node)
    declared = {f.name for f in fields(kind)} if kind is not None and is_dataclass(kind) else None
    for key in node:
        if declared is not None and key not in declared:
            return str(node._get_full_key(key)), str(getattr(kind, "__name__", ""))
        if found := extra_key(node._get_node(key)):
            return found
    return None


def wrong_key(key: str, owner: str = "") -> str:
    """The sentence for a key that is not there; `owner` is the class that was asked for it."""
    parent, _, word = key.rpartition(".")
    here = [c for c in components() if c.options.__name__ == owner and c.slot.path.replace("/", ".") in (parent, "callback")]
    if here:
        chosen = here[0]
        own = [f.name for f in fields(chosen.options)]
        choice = f"{chosen.slot.path}={chosen.name}"
        others = [c.name for c in components(chosen.slot.path) if word in {f.name for f in fields(c.options)}]
        if others:
            return f"{key} is not an option of {choice}, which has {', '.join(own) or 'none'}; {chosen.slot.path}={_listed(others)} has it"
        has = f", which has {', '.join(own) or 'none'}"
        return f"{key} is not an option of {choice}{_sibling(key, [f'{parent}.{name}' for name in own]) or has}"
    if key.startswith(("data.corpus.weights.", "data.corpus.sources.")) and key.count(".") == 3:
        new = "+data.corpus.weights.NAME=3" if ".weights." in key else "+data/corpus@data.corpus.sources.NAME=text"
        return f"{key} is a new one, which takes a plus: {new}"
    if key.startswith("data.validation.") or key == "data.validation":
        return f"{key} is a new set, which takes a plus: +data.validation.NAME=FILE"
    if re.match(r"hydra\.sweeper\.(vary|arms|params|stages)(\.|$)", key):
        return f"{key} is a new one, which takes a plus: +{key}=… (`gptlab ablate --vary` and `--arm` write it for you)"
    keys = known_keys()
    siblings = [k for k in keys if k.rpartition(".")[0] == parent and "/" not in k]
    mark = next((m for m in "/." if m in key), "")
    hint = ("" if mark == "/" else _sibling(key, siblings)) or _nearest(key, [k for k in keys if mark in k])
    return f"{key} is not a key of the config{hint or (f'; there {_are(siblings)}' if siblings else '')}"


def _are(words: Sequence[str]) -> str:
    return f"{'is' if len(words) == 1 else 'are'} {', '.join(sorted(words))}"


def _sibling(key: str, keys: Sequence[str]) -> str:
    """' (did you mean …?)' by the last word alone: the rest is the same for all of them, and proves nothing."""
    words = {short_key(k): k for k in keys}
    near = get_close_matches(short_key(key), words, n=1, cutoff=0.6)
    return f" (did you mean {words[near[0]]}?)" if near else ""


def _nearest(key: str, keys: Sequence[str]) -> str:
    """' (did you mean …?)' with the keys that end in nearly the same word, or else the nearest key."""
    word = get_close_matches(short_key(key), {short_key(k) for k in keys}, n=1, cutoff=0.75)
    near = [k for k in keys if word and short_key(k) == word[0]]
    return f" (did you mean {_listed(near[:3])}?)" if near else suggest(key, keys, 0.8)
