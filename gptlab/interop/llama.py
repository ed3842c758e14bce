"""Llama's shape (Touvron et al., 2023) as Hugging Face writes it, with those that are the same but for a name: Mistral, Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.config.schema import ModelConfig
from gptlab.interop.shapes import Piece, Shape, model_config, must_be, must_be_plain

FFNS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN_ROPE = (None, "default")
STRETCH = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "trained": "original_max_position_embeddings",
}  # our options of rotary_stretched, and what they are called there


def _config(read: Mapping[str, Any], where: str) -> ModelConfig:
    width, heads = int(read["hidden_size"]), int(read["num_attention_heads"])
    activation = str(read.get("hidden_act", "silu"))
    if activation not in FFNS:
        raise ConfigError(f"{where}: hidden_act {activation}: there is no model/ffn with it")
    head_width = read.get("head_dim") or width // heads
    if head_width * heads != width:
        raise ConfigError(f"{where}: head_dim {head_width} times {heads} heads is not the width {width}: there is no model/attention of it")
    rope = read.get("rope_parameters") or read.get("rope_scaling") or {}
    windowed = read.get("model_type") == "mistral" or read.get("use_sliding_window", False)
    kinds = set(read.get("layer_types") or [])
    if len(kinds) > 1:
        raise ConfigError(f"{where}: layer_types {', '.join(sorted(kinds))}: there is no model/attention that changes with the layer")
    window = read.get("sliding_window") if windowed else None
    biased = bool(read.get("attention_bias") or read.get("mlp_bias") or read.get("model_type") == "qwen2")
    return model_config(
        width=width,
        depth=int(read["num_hidden_layers"]),
        heads=heads,
        context_length=int(read["max_position_embeddings"]),
        bias=biased,
        pad_vocab_to=1,
        norm=("rmsnorm", {"eps": float(read.get("rms_norm_eps", 1e-6))}),
        position=_position(rope, float(rope.get("rope_theta") or read.get("rope_theta") or 10_000.0), where),
        attention=("multihead", {"kv_heads": int(read.get("num_key_value_heads") or heads), "window": window}),
        ffn=(FFNS[activation], {"expansion": read["intermediate_size"] / width, "multiple_of": 1}),
        head=("tied" if read.get("tie_word_embeddings", False) else "untied", {}),
    )


def _position(rope: Mapping[str, Any], base: float, where: str) -> tuple[str, dict[str, Any]]:
    kind = rope.get("rope_type", rope.get("type"))
    if kind in PLAIN_ROPE:
        return "rotary", {"base": base}
    if kind != "llama3":
        raise ConfigError(
            f"{where}: rope_scaling {kind}: there is no model/position that does so, only rotary and rotary_stretched (Llama 3.1's)"
        )
    return "rotary_stretched", {"base": base} | {ours: rope[theirs] for ours, theirs in STRETCH.items()}


def _fits(config: ModelConfig) -> None:
    must_be(
        config,
        "Llama",
        {"position": ("rotary", "rotary_stretched"), "norm": ("rmsnorm", "rmsnorm_nonparametric"), "ffn": ("swiglu", "geglu")},
    )
    must_be_plain(config, "Llama")
    if getattr(config.attention, "window", None) is not None and config.bias:
        raise ConfigError("model.attention.window with model.bias has no place in Llama's or Mistral's shape: export to safetensors")


def _settings(config: ModelConfig, vocabulary: int) -> dict[str, Any]:
    options: Any = config.attention
    norm: Any = config.norm
    position: Any = config.position
    ffn = component_of(config.ffn).name
    window = options.window
    return {
        "architectures": ["LlamaForCausalLM" if window is None else "MistralForCausalLM"],
        "model_type": "llama" if window is None else "mistral",
        **({} if window is None else {"sliding_window": window}),
        "vocab_size": vocabulary,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "intermediate_size": hidden(config),
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": options.kv_heads or config.heads,
        "head_dim": config.width // config.heads,
        "hidden_act": {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}[ffn],
        "rms_norm_eps": norm.eps,
        "rope_theta": position.base,
        **_stretch(config),
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": component_of(config.head).name == "tied",
    }


def _stretch(config: ModelConfig) -> dict[str, Any]:
    position: Any = config.position
    if component_of(position).name == "rotary":
        return {}
    return {"rope_scaling": {"rope_type": "llama3"} | {theirs: getattr(position, ours) for ours, theirs in STRETCH.items()}}


def hidden(config: ModelConfig) -> int:
    """The hidden units of a gated feed-forward."""
    options: Any = config.ffn
    return int(max(1, round(options.expansion * config.width / options.multiple_of)) * options.multiple_of)


def _pieces(config: ModelConfig) -> list[Piece]:
    options: Any = config.attention
    head_width = config.width // config.heads
    rows = (config.width, *[(options.kv_heads or config.heads) * head_width] * 2)
    units, kinds = hidden(config), ("weight", "bias") if config.bias else ("weight",)
    found = [Piece("embedding.weight", ("embed_tokens.weight",))]
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"layers.{i}"
        found.append(Piece(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",)))
        found.append(Piece(f"{ours}.ffn_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)))
        for kind in kinds:
            qkv = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            found += [
                Piece(f"{ours}.attention.qkv.{kind}", qkv, rows=rows),
                Piece(f"{ours}.attention.out.{kind}", (f"{theirs}.self_attn.o_proj.{kind}",)),
                Piece(f"{ours}.ffn.up.{kind}", (f"{theirs}.mlp.gate_proj.{kind}", f"{theirs}.mlp.up_proj.{kind}"), rows=(units, units)),
                Piece(f"{ours}.ffn.down.{kind}", (f"{theirs}.mlp.down_proj.{kind}",)),
            ]
    found.append(Piece("norm.weight", ("norm.weight",)))
    if component_of(config.head).name == "untied":
        found.append(Piece("head.weight", ("lm_head.weight",)))
    return found


LLAMA = Shape("Llama", "model.", _config, _fits, _settings, _pieces, (".rotary_emb.inv_freq",))
