"""A model's folder as Hugging Face's libraries lay it out: read as data, and written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptlab.config.errors import CheckpointError, ConfigError
from gptlab.config.schema import ModelConfig
from gptlab.data.tokenizer import Tokenizer
from gptlab.data.tokenizer_file import ends_in, from_huggingface
from gptlab.interop.gpt2 import GPT2
from gptlab.interop.llama import LLAMA
from gptlab.interop.shapes import Shape, imported

SHAPES = {"gpt2": GPT2, "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")  # what is asked of a hub: never code, never a pickle
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Foreign:
    """A model from elsewhere, in our terms."""

    model: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    kind: str  # what it was there
    chat_template: str | None = None
    told: dict[str, Any] = field(default_factory=dict)  # what else its files say, for imported.json


def read_folder(folder: Path, tokenizer: Tokenizer | None = None) -> Foreign:
    """A GPT-2 or Llama model of Hugging Face's; none of its code is run. `tokenizer`: in place of the folder's own.

    Raises ConfigError for an architecture we have not, CheckpointError for weights that are missing, damaged or of another shape.
    """
    read = _json(folder / "config.json")
    kind = str(read.get("model_type", "?"))
    if kind not in SHAPES:
        raise ConfigError(
            f"{folder}: model_type {kind}: there is no model of this architecture here, only {', '.join(SHAPES)}; "
            "its attention, block and feed-forward would be components of your own"
        )
    shape = SHAPES[kind]
    try:
        model = shape.config(read, str(folder / "config.json"))
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} has no {error}; is the download complete?") from error
    tokenizer = tokenizer or read_tokenizer(folder)
    rows = int(read["vocab_size"])
    if tokenizer.vocabulary > rows:
        raise ConfigError(f"{folder}: its tokeniser has {tokenizer.vocabulary:,} tokens, and its weights are for {rows:,}")
    if tokenizer.vocabulary < rows:
        model = replace(model, pad_vocab_to=rows)
    weights = imported(shape, model, tokenizer.vocabulary, _weights(folder), str(folder))
    template = folder / CHAT_TEMPLATE
    chat = template.read_text(encoding="utf-8") if template.is_file() else _json(folder / "tokenizer_config.json", {}).get("chat_template")
    return Foreign(model, weights, tokenizer, kind, chat if isinstance(chat, str) else None)


def _json(file: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    if absent is not None and not file.is_file():
        return absent
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {file}: it is no model's folder, or half a download") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); is the download complete?") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no settings")
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, on the CPU. Raises CheckpointError."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _tensors(folder / name)
        if index.is_file():
            parts = sorted(set(_json(index).get("weight_map", {}).values()))
            missing = [part for part in parts if not (folder / part).is_file()]
            if missing or not parts:
                raise CheckpointError(f"{folder} lacks {len(missing)} of its {len(parts)} files of weights, the first {missing[:1]}")
            return {key: tensor for part in parts for key, tensor in _tensors(folder / part).items()}
    raise CheckpointError(f"{folder} holds no weights: neither {' nor '.join(WEIGHTS)}")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read ({' '.join(str(error).split())[:150]}): half a download?") from error
    return found


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokeniser of a model's folder; GPT-2's own is `data/tokenizer=gpt2`. Raises ConfigError where there is none."""
    from gptlab.interop.tokenizers import from_files, is_gpt2

    content = _json(folder / "tokenizer.json", {}) or from_files(folder)
    if content is None:
        raise ConfigError(
            f"{folder} holds no tokenizer.json, nor vocab.json and merges.txt: --tokenizer NAME or PATH gives one "
            "(transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…) makes a tokenizer.json of an older form)"
        )
    if is_gpt2(content):
        from gptlab.data.tokenizer import gpt2

        return gpt2()
    return from_huggingface(content, ends_in(folder), str(folder / "tokenizer.json"))


def settings_of(shape: Shape, model: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The config.json of a model of ours. Raises ConfigError for a component that the shape cannot hold."""
    shape.fits(model)
    made = shape.settings(model, tokenizer.vocabulary)
    begin = getattr(tokenizer, "begin_of_text", None)
    ends = {"bos_token_id": tokenizer.end_of_text if begin is None else begin, "eos_token_id": tokenizer.end_of_text}
    return made | ends | {"dtype": dtype}


def shape_for(model: ModelConfig) -> Shape:
    """The shape that a model of ours could have elsewhere: by its positions. Raises ConfigError where there is none."""
    from gptlab.config.registry import component_of

    position = component_of(model.position).name
    found = {"learned": GPT2, "rotary": LLAMA, "rotary_stretched": LLAMA}.get(position)
    if found is None:
        raise ConfigError(f"model/position={position} has no place in GPT-2's or Llama's shape (learned, rotary): export to safetensors")
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """A settings file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
