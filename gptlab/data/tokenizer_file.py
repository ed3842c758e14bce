"""A tokeniser that is there already: of a run, of `gptlab data tokenizer train`, or of a pretrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import build, component_of, register
from gptlab.config.schema import DataConfig
from gptlab.data.huggingface import HuggingFaceTokenizer
from gptlab.data.tokenizer import Tokenizer, from_json, to_json


@register("data/tokenizer", "file")
def file(*, path: str) -> Tokenizer:
    """A tokeniser from a file or the folder it lies in: a run's or your own tokenizer.json, or that of a Hugging Face model."""
    return from_json(written_in(path), path)


def given(config: DataConfig) -> dict[str, Any] | None:
    """The fitted tokeniser that a config names by its file, or builds on another, as JSON data; None where it names none."""
    name = component_of(config.tokenizer).name
    if name == "chat":
        return to_json(build(config.tokenizer))
    return written_in(str(config.tokenizer.path)) if name == "file" else None  # type: ignore[attr-defined]


def written_in(path: str) -> dict[str, Any]:
    """What a file holds, as `to_json` writes it. Raises ConfigError where there is none, DataError where it cannot be read."""
    found = Path(path).expanduser()
    found = found / "tokenizer.json" if found.is_dir() else found
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"data.tokenizer.path={path}: there is no file {found}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer.path={path}: {found} cannot be read ({error})") from error
    if isinstance(content, dict) and {"name", "vocabulary", "state"} <= content.keys():
        return content
    if not isinstance(content, dict) or "model" not in content:
        raise DataError(f"data.tokenizer.path={path}: {found} is neither a tokeniser of gptlab's nor a tokenizer.json of Hugging Face's")
    return to_json(from_huggingface(content, ends_in(found.parent), str(found)))


def ends_in(folder: Path) -> dict[str, Any]:
    """What a model's folder says of the tokens that begin and end a text: `eos_token`, `bos_token` (texts) or their ids."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        try:
            read = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found |= {k: v for k, v in read.items() if k in ("eos_token_id", "eos_token", "add_bos_token", "bos_token") and v is not None}
    return found


def from_huggingface(content: dict[str, Any], ends: dict[str, Any], where: str) -> HuggingFaceTokenizer:
    """The tokeniser of a tokenizer.json. `ends`: as `ends_in` gives them. Raises ConfigError or DataError."""
    tokenizer, text = HuggingFaceTokenizer(), json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    try:
        tokenizer.restore({"tokenizer": text})
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    end, begin = _end(tokenizer, ends), _begin(content, ends, tokenizer)
    tokenizer.restore({"tokenizer": text, "end_of_text": end, "begin_of_text": begin})
    return tokenizer


def _end(tokenizer: HuggingFaceTokenizer, ends: dict[str, Any]) -> int | None:
    """The token that ends a text. A chat model's own is that of a turn: a document's, where it is among the special tokens, goes before."""
    for name in ("<|endoftext|>", "<|end_of_text|>"):
        if name in tokenizer.special:
            return tokenizer.special[name]
    ids = ends.get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if isinstance(first, int):
        return first if first < tokenizer.vocabulary else None  # a setting nobody looked at
    return _special(tokenizer, ends.get("eos_token"))


def _special(tokenizer: HuggingFaceTokenizer, token: Any) -> int | None:
    """The id of a special token, as tokenizer_config.json names it."""
    return tokenizer.special.get(str(token["content"] if isinstance(token, dict) else token))


def _begin(content: dict[str, Any], ends: dict[str, Any], tokenizer: HuggingFaceTokenizer) -> int | None:
    """The token that the model expects before every text: that which its post-processor, or else its settings, put there."""
    post: Any = content.get("post_processor") or {}
    for part in [post, *post.get("processors", [])]:
        if part.get("type") == "TemplateProcessing" and part["single"] and "SpecialToken" in part["single"][0]:
            return tokenizer.special.get(str(part["single"][0]["SpecialToken"]["id"]))
    return _special(tokenizer, ends.get("bos_token")) if ends.get("add_bos_token") else None
