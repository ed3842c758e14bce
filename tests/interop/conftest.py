"""Small random models of transformers', as they lie on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

LETTERS = "\n abcdefghijklmnopqrstuvwxyz"  # 28 tokens


def stirred(model: Any) -> Any:
    """Weights large enough for every part to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def gpt2(**more: Any) -> Any:
    torch.manual_seed(3)
    settings = {
        "vocab_size": 29,
        "n_positions": 13,
        "n_embd": 30,
        "n_layer": 3,
        "n_head": 5,
        "n_inner": 77,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **more,
    }
    return stirred(transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)))


def llama(kind: str = "Llama", **more: Any) -> Any:
    settings = {
        "vocab_size": 29, "max_position_embeddings": 37, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "intermediate_size": 51, "rms_norm_eps": 3e-4, "bos_token_id": 0, "eos_token_id": 1, **more,
    }  # fmt: skip
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**settings)
    return stirred(getattr(transformers, f"{kind}ForCausalLM")(config))


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """A tokeniser of 28 characters, in a file."""
    file = tmp_path / "letters.json"
    file.write_text(json.dumps({"version": 1, "name": "char", "vocabulary": len(LETTERS), "state": {"characters": LETTERS}}))
    return str(file)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save a model of transformers' to a folder."""

    def save(model: Any, name: str = "model", **how: Any) -> Path:
        model.save_pretrained(tmp_path / name, **how)
        return tmp_path / name

    return save


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found = model(tokens)
    return getattr(found, "logits", found)
