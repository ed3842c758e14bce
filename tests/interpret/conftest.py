"""Small models of every kind of part, with weights large enough for each to matter."""

from __future__ import annotations

import torch
from torch import Tensor

from gptlab.config.registry import component, load_components
from gptlab.config.schema import ModelConfig
from gptlab.model.transformer import Transformer, new_model

VOCABULARY = 29
PLAIN: dict[str, object] = {
    "norm": "layernorm", "position": "learned", "attention": "multihead", "kernel": "naive", "ffn": "gelu", "block": "prenorm",
    "head": "tied", "init": "gpt2",
}  # fmt: skip
load_components()


def small(
    *, width: int = 24, depth: int = 3, heads: int = 4, context: int = 16, bias: bool = True, seed: int = 0, **parts: object
) -> Transformer:
    """A model of small random parts: `norm="rmsnorm"`, or `head=("untied", {"soft_cap": 5.0})`."""
    chosen = PLAIN | parts
    given = {slot: part if isinstance(part, tuple) else (part, {}) for slot, part in chosen.items()}
    options = {slot: component(f"model/{slot}", name).options(**values) for slot, (name, values) in given.items()}
    model = new_model(ModelConfig(width=width, depth=depth, heads=heads, context_length=context, bias=bias, **options), VOCABULARY, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    return model.eval()


def some_tokens(rows: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


PARTS = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "position": "rotary", "attention": ("multihead", {"kv_heads": 2}), "ffn": "swiglu", "bias": False,
              "head": "untied"},
    "fused": {"kernel": "sdpa"},
    "flex": {"kernel": "flex", "position": "alibi"},
    "t5, window, qk-norm": {"position": "t5", "attention": ("multihead", {"window": 5, "qk_norm": True}), "kernel": "sdpa"},
    "sinusoidal, post-norm": {"position": "sinusoidal", "block": "postnorm"},
    "parallel": {"block": "parallel", "norm": "layernorm_nonparametric"},
    "sandwich": {"block": "sandwich"},
    "sandwich, rms": {"block": "sandwich", "norm": "rmsnorm", "ffn": "geglu"},
    "speed run": {"norm": "rmsnorm_nonparametric", "position": "rotary", "input": "smear", "stream": "input_skip", "value": "embedding",
                  "gate": "per_head", "ffn": "relu2", "head": ("untied", {"soft_cap": 3.0}), "bias": False},
    "normalised input, skips": {"input": "normalised", "stream": "input_skip", "block": "postnorm", "norm": "rmsnorm"},
    "experts": {"ffn": ("moe", {"experts": 3, "top_k": 2, "shared": 1})},
    "no norm, no ffn": {"norm": "none", "ffn": "none"},
    "average": {"attention": "average"},
    "bigram": {"depth": 0},
    "mup": {"parametrisation": ("mup", {"base_width": 8})},
}  # fmt: skip
