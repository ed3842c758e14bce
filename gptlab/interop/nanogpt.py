"""nanoGPT's checkpoint, `ckpt.pt`: read with `weights_only`, and its character table without running a pickle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.config.errors import CheckpointError, ConfigError
from gptlab.config.registry import build, component
from gptlab.data.tokenizer import Tokenizer, gpt2
from gptlab.interop.gpt2 import GPT2
from gptlab.interop.huggingface import Foreign
from gptlab.interop.shapes import Piece, Shape, imported, model_config

GPT2_TOKENS, GPT2_ROWS = 50257, (50257, 50304)  # nanoGPT pads GPT-2's table to the second


def read_nanogpt(file: Path, tokenizer: Tokenizer | None = None) -> Foreign:
    """A model that nanoGPT trained. `tokenizer`: of a model by characters, whose table nanoGPT keeps beside its data (meta.pkl).

    Raises CheckpointError for another file, ConfigError where the tokeniser is not told.
    """
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
        settings, weights = dict(found["model_args"]), dict(found["model"])
        rows = int(settings["vocab_size"])
        model = model_config(
            width=int(settings["n_embd"]),
            depth=int(settings["n_layer"]),
            heads=int(settings["n_head"]),
            context_length=int(settings["block_size"]),
            bias=bool(settings["bias"]),
            pad_vocab_to=1,
            norm=("layernorm", {}),
            position=("learned", {}),
            attention=("multihead", {}),
            ffn=("gelu", {"approximate": "none"}),  # nanoGPT's is exact
            head=("tied", {}),
        )
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:150]
        raise CheckpointError(f"{file} is no checkpoint of nanoGPT's, or half a download ({said})") from error
    tokenizer = tokenizer or _tokenizer(file, rows)
    if tokenizer.vocabulary > rows:
        raise ConfigError(f"{file} was trained on {rows:,} tokens, and data/tokenizer={tokenizer.name} has {tokenizer.vocabulary:,}")
    if tokenizer.vocabulary < rows:
        model.pad_vocab_to = rows
    named = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    ours = imported(_linear(GPT2), model, tokenizer.vocabulary, named, str(file))
    done = {"iter_num": found.get("iter_num"), "best_val_loss": _number(found.get("best_val_loss"))}
    return Foreign(model, ours, tokenizer, "nanogpt", told={k: v for k, v in done.items() if v is not None})


def _linear(shape: Shape) -> Shape:
    """The same, its matrices lying as torch's Linear has them, and no bias where the model has none."""

    def pieces(config: Any) -> list[Piece]:
        every = [Piece(piece.ours, piece.theirs) for piece in shape.pieces(config)]
        return [piece for piece in every if config.bias or not piece.ours.endswith(".bias")]

    return Shape("nanoGPT", shape.prefix, shape.config, shape.fits, shape.settings, pieces, shape.ignored)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _tokenizer(file: Path, rows: int) -> Tokenizer:
    beside = file.parent / "meta.pkl"
    if beside.is_file():
        return read_meta(beside)
    if rows in GPT2_ROWS:
        return gpt2()
    raise ConfigError(
        f"{file} was trained on {rows} tokens of its own, which the checkpoint does not name: --tokenizer PATH/meta.pkl, "
        "the table that nanoGPT's prepare.py wrote beside its data"
    )


class _Plain(pickle.Unpickler):
    """Dictionaries, texts and numbers alone: a pickle that names a class or a function is refused before anything is made."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def read_meta(file: Path) -> Tokenizer:
    """The characters of nanoGPT's meta.pkl, by id; nothing of the pickle is run. Raises CheckpointError."""
    try:
        with file.open("rb") as opened:
            table = dict(_Plain(opened).load()["itos"])
        characters = "".join(table[i] for i in range(len(table)))
        if any(len(table[i]) != 1 for i in table):
            raise ValueError("its tokens are no characters")
    except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} is no table of characters of nanoGPT's ({' '.join(str(error).split())[:150]})") from error
    tokenizer: Tokenizer = build(component("data/tokenizer", "char").options())
    tokenizer.restore({"characters": characters})
    return tokenizer
