"""GPT-2's shape (Radford et al., 2019) as Hugging Face writes it: its matrices lie as (inputs, outputs)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.config.schema import ModelConfig
from gptlab.interop.shapes import Piece, Shape, model_config, must_be, must_be_plain

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}


def _config(read: Mapping[str, Any], where: str) -> ModelConfig:
    activation = str(read.get("activation_function", "gelu_new"))
    if activation != "relu2" and activation not in GELUS:
        raise ConfigError(f"{where}: activation_function {activation}: there is no model/ffn with it")
    for key, plain in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
        if read.get(key, plain) != plain:
            raise ConfigError(f"{where}: {key}={read[key]}: there is no model/attention that does so")
    width = int(read["n_embd"])
    expansion = (read.get("n_inner") or 4 * width) / width
    gelu = {} if activation == "relu2" else {"approximate": GELUS[activation]}
    return model_config(
        width=width,
        depth=int(read["n_layer"]),
        heads=int(read["n_head"]),
        context_length=int(read.get("n_positions", read.get("n_ctx", 1024))),
        bias=True,
        pad_vocab_to=1,
        norm=("layernorm", {"eps": float(read.get("layer_norm_epsilon", 1e-5))}),
        position=("learned", {}),
        attention=("multihead", {}),
        ffn=("gelu" if gelu else "relu2", {"expansion": expansion, **gelu}),
        head=("tied" if read.get("tie_word_embeddings", True) else "untied", {}),
    )


def _fits(config: ModelConfig) -> None:
    must_be(config, "GPT-2", {"position": ("learned",), "norm": ("layernorm", "layernorm_nonparametric"), "ffn": ("gelu", "relu2")})
    must_be_plain(config, "GPT-2")
    options: Any = config.attention
    for key in ("window", "kv_heads"):
        value = getattr(options, key)
        if value is not None and not (key == "kv_heads" and value == config.heads):
            raise ConfigError(f"model.attention.{key}={value} has no place in GPT-2's shape: export to safetensors")


def _settings(config: ModelConfig, vocabulary: int) -> dict[str, Any]:
    ffn: Any = config.ffn
    norm: Any = config.norm
    activation = "relu2" if component_of(ffn).name == "relu2" else {"tanh": "gelu_new", "none": "gelu"}[ffn.approximate]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": round(ffn.expansion * config.width),
        "activation_function": activation,
        "layer_norm_epsilon": norm.eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": component_of(config.head).name == "tied",
    }


def _pieces(config: ModelConfig) -> list[Piece]:
    def both(ours: str, theirs: str, *, matrix: bool) -> list[Piece]:
        return [Piece(f"{ours}.weight", (f"{theirs}.weight",), transposed=matrix), Piece(f"{ours}.bias", (f"{theirs}.bias",))]

    found = [Piece("embedding.weight", ("wte.weight",)), Piece("position.table.weight", ("wpe.weight",))]
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"h.{i}"
        found += both(f"{ours}.attention_norm", f"{theirs}.ln_1", matrix=False)
        found += both(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", matrix=True)
        found += both(f"{ours}.attention.out", f"{theirs}.attn.c_proj", matrix=True)
        found += both(f"{ours}.ffn_norm", f"{theirs}.ln_2", matrix=False)
        found += both(f"{ours}.ffn.up", f"{theirs}.mlp.c_fc", matrix=True)
        found += both(f"{ours}.ffn.down", f"{theirs}.mlp.c_proj", matrix=True)
    found += both("norm", "ln_f", matrix=False)
    if component_of(config.head).name == "untied":
        found.append(Piece("head.weight", ("lm_head.weight",)))
    return found


GPT2 = Shape("GPT-2", "transformer.", _config, _fits, _settings, _pieces, (".attn.bias", ".attn.masked_bias"))
