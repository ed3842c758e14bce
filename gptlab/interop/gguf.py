"""A run as a GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.config.schema import ModelConfig
from gptlab.data.bpe import PATTERNS
from gptlab.data.tokenizer import Tokenizer
from gptlab.interop.huggingface import shape_for
from gptlab.interop.llama import LLAMA, hidden
from gptlab.interop.shapes import exported, must_be
from gptlab.interop.tokenizers import KNOWN, tokenizer_json
from gptlab.runner.export import cast
from gptlab.runner.load import Loaded

GPT2_NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "lm_head": "output",
}  # fmt: skip
LLAMA_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
SPLITS = {PATTERNS["gpt2"]: "gpt-2", PATTERNS["gpt4"]: "llama-bpe", PATTERNS["gpt4o"]: "gpt-4o"}  # what llama.cpp calls the ways to split
# Llama 3's spelling of gpt4's, as its tokenizer.json has it.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NORMAL, CONTROL, UNUSED = 1, 3, 5  # GGUF's types of tokens


def write_gguf(loaded: Loaded, file: Path, dtype: str) -> str:
    """Write a run; which shape it has there. Raises ConfigError for a component or tokeniser that llama.cpp has not."""
    gguf = _library()
    model, tokenizer = loaded.config.model, loaded.tokenizer
    shape = shape_for(model)
    llama = shape is LLAMA
    shape.fits(model)
    must_be(model, "llama.cpp", {"ffn": ("swiglu",) if llama else ("gelu",)})
    if not llama and getattr(model.ffn, "approximate", "") != "tanh":
        raise ConfigError("model.ffn.approximate=none has no place in llama.cpp's GPT-2, whose GELU is the tanh form: export to hf")
    if component_of(model.position).name == "rotary_stretched":
        raise ConfigError("model/position=rotary_stretched is not written to GGUF: export to hf, whose folder converts")
    if getattr(model.attention, "window", None) is not None:
        raise ConfigError("model.attention.window has no place in llama.cpp's Llama: export to hf")
    weights = exported(shape, model, tokenizer.vocabulary, loaded.model.state_dict())
    words = _words(tokenizer)
    writer = gguf.GGUFWriter(str(file), "llama" if llama else "gpt2")
    _settings(writer, model, loaded)
    _tokens(writer, tokenizer, words)
    for name, tensor in weights.items():
        _add(gguf, writer, name.removeprefix(shape.prefix), tensor, model, llama, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"{'Llama' if llama else 'GPT-2'}'s shape"


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError("--to gguf needs the gguf library: pip install 'gptlab[interop]'") from error


def _settings(writer: Any, model: ModelConfig, loaded: Loaded) -> None:
    options: Any = model.attention
    ffn: Any = model.ffn
    norm: Any = model.norm
    position: Any = model.position
    writer.add_name(loaded.run.name if loaded.run else "a model of gptlab's")
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.depth)
    writer.add_head_count(model.heads)
    if component_of(model.position).name == "learned":
        writer.add_feed_forward_length(round(ffn.expansion * model.width))
        writer.add_layer_norm_eps(norm.eps)
        return
    writer.add_feed_forward_length(hidden(model))
    writer.add_head_count_kv(options.kv_heads or model.heads)
    writer.add_layer_norm_rms_eps(norm.eps)
    writer.add_rope_dimension_count(model.width // model.heads)
    writer.add_rope_freq_base(position.base)
    writer.add_vocab_size(loaded.tokenizer.vocabulary)


def _words(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokeniser as GGUF has it: tokens, types, merges and the way to split. Raises ConfigError for one that llama.cpp has not."""
    if tokenizer.name == "char" and not str(tokenizer.state()["characters"]).isascii():
        raise ConfigError("data/tokenizer=char has characters of several bytes, which llama.cpp's tokenisers split: export to hf")
    content = tokenizer_json(tokenizer)
    pre: dict[str, Any] = content.get("pre_tokenizer") or {}
    if tokenizer.name == "char":
        from gptlab.data.bpe import byte_letters

        letters = {byte: letter for letter, byte in byte_letters().items()}
        vocabulary = {letters[ord(c)]: i for c, i in content["model"]["vocab"].items()}
        return {"vocabulary": vocabulary, "special": {}, "merges": [], "split": "gpt-2"}
    if content["model"].get("type", "BPE") != "BPE" or '"ByteLevel"' not in json.dumps(pre):
        raise ConfigError(f"data/tokenizer={tokenizer.name}: only byte-level BPE is written to GGUF; export to hf, whose folder converts")
    special = {t["content"]: int(t["id"]) for t in content.get("added_tokens", [])}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    return {"vocabulary": content["model"]["vocab"], "special": special, "merges": merges, "split": _split(tokenizer, pre)}


def _split(tokenizer: Tokenizer, pre: Mapping[str, Any]) -> str:
    if tokenizer.name in KNOWN:
        return SPLITS[PATTERNS[KNOWN[tokenizer.name]]]
    parts = [pre, *pre.get("pretokenizers", [])]
    patterns = [p["pattern"]["Regex"] for p in parts if p.get("type") == "Split" and "Regex" in p.get("pattern", {})]
    if patterns:
        found = {**SPLITS, LLAMA3: "llama-bpe"}.get(patterns[0])
        if found is None or len(patterns) > 1:
            raise ConfigError(f"data/tokenizer={tokenizer.name} splits text in a way that llama.cpp does not know: export to hf")
        return found
    digits = any(p.get("type") == "Digits" for p in parts)
    return "smollm" if digits else "gpt-2"  # without a pattern (data/tokenizer=byte) there is nothing to merge, however it is split


def _tokens(writer: Any, tokenizer: Tokenizer, words: Mapping[str, Any]) -> None:
    tokens = [f"[unused{i}]" for i in range(tokenizer.vocabulary)]
    types = [UNUSED] * tokenizer.vocabulary
    for kind, table in ((NORMAL, words["vocabulary"]), (CONTROL, words["special"])):
        for token, number in table.items():
            tokens[number], types[number] = token, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["split"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp opens no file without merges: one of two NUL bytes, to a token that is not there, changes no text.
    writer.add_token_merges(words["merges"] or ["\u0100 \u0100"])
    if tokenizer.end_of_text is not None:
        writer.add_eos_token_id(tokenizer.end_of_text)
    begin = getattr(tokenizer, "begin_of_text", None)
    writer.add_add_bos_token(begin is not None)
    if begin is not None or tokenizer.end_of_text is not None:
        writer.add_bos_token_id(tokenizer.end_of_text if begin is None else begin)


def _add(gguf: Any, writer: Any, name: str, tensor: Tensor, model: ModelConfig, llama: bool, dtype: str) -> None:
    stem, _, kind = name.rpartition(".")
    layer = ""
    if stem.startswith(("h.", "layers.")):
        _, number, stem = stem.split(".", 2)
        layer = f"blk.{number}."
    if llama and stem in ("self_attn.q_proj", "self_attn.k_proj"):
        options: Any = model.attention
        heads = model.heads if stem.endswith("q_proj") else options.kv_heads or model.heads
        tensor = _interleaved(tensor, heads)
    if not llama and tensor.dim() == 2 and stem not in ("wte", "wpe", "lm_head"):
        tensor = tensor.t()
    own = f"{layer}{(LLAMA_NAMES if llama else GPT2_NAMES)[stem]}.{kind}"
    if tensor.dim() == 1 or dtype == "fp32":  # llama.cpp wants vectors in fp32
        writer.add_tensor(own, tensor.float().contiguous().numpy())
    elif dtype == "fp16":
        writer.add_tensor(own, cast(name, tensor, dtype).contiguous().numpy())
    else:
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(own, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head in the order that llama.cpp turns them: neighbours are a pair, where ours has halves."""
    paired = weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2)
    return paired.reshape(weight.shape).contiguous()
