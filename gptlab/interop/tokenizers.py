"""Tokenisers as a tokenizer.json, which Hugging Face's libraries (and vLLM) read; and what older folders have instead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptlab.config.errors import ConfigError, DataError
from gptlab.data.bpe import PATTERNS, byte_letters
from gptlab.data.tokenizer import Tokenizer

GPT2_VOCABULARY = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"  # sha256 of GPT-2's tokens in the order of their ids
KNOWN = {"gpt2": "gpt2", "cl100k": "gpt4", "o200k": "gpt4o"}  # tiktoken's, and how each splits its text


def is_gpt2(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is GPT-2's own: its tokens, its merges' order and its way to split."""
    model = content.get("model") or {}
    vocabulary = {**model.get("vocab", {}), **{t["content"]: t["id"] for t in content.get("added_tokens", [])}}
    pre = content.get("pre_tokenizer") or {}
    plain = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
    if model.get("type", "BPE") != "BPE" or not plain or content.get("normalizer") or len(vocabulary) != 50257:
        return False
    words = sorted(vocabulary, key=lambda token: int(vocabulary[token]))
    return hashlib.sha256("\n".join(words).encode()).hexdigest() == GPT2_VOCABULARY


def from_files(folder: Path) -> dict[str, Any] | None:
    """The tokenizer.json of a folder that has vocab.json and merges.txt, as GPT-2's own; None where these are not there."""
    words, merges = folder / "vocab.json", folder / "merges.txt"
    if not (words.is_file() and merges.is_file()):
        return None
    try:
        vocabulary = json.loads(words.read_text(encoding="utf-8"))
        lines = [line for line in merges.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#version")]
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: vocab.json or merges.txt cannot be read ({error})") from error
    special = {token: int(number) for token, number in vocabulary.items() if token.startswith("<|") and token.endswith("|>")}
    return _byte_level(vocabulary, [line.split(" ") for line in lines], special, {"type": "ByteLevel", "add_prefix_space": False})


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokeniser as tokenizer.json has it: the same ids for the same text. Raises ConfigError for one that cannot be written so."""
    name, state = tokenizer.name, tokenizer.state()
    if name == "huggingface":
        content: dict[str, Any] = json.loads(state["tokenizer"])
        return content
    if name == "char":
        return _characters(str(state["characters"]))
    if name == "chat":
        return _with_more(tokenizer_json(tokenizer.base), tokenizer.added)  # type: ignore[attr-defined]
    tokens, special = token_table(tokenizer)
    if name == "byte":
        pattern = None
    elif name == "bpe":
        pattern = str(state["pattern"])
    elif name in KNOWN:
        pattern = PATTERNS[KNOWN[name]]
    else:
        raise ConfigError(f"data/tokenizer={name} cannot be written as a tokenizer.json; export to safetensors")
    letters = {byte: letter for letter, byte in byte_letters().items()}
    spelt = {number: "".join(letters[b] for b in token) for number, token in tokens.items()}
    ranks = {token: number for number, token in tokens.items()}
    merges = [["".join(letters[b] for b in part) for part in pair] for pair in merges_of(ranks)]
    vocabulary = {word: number for number, word in spelt.items()} | special
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    pre = {"type": "Sequence", "pretokenizers": [split, level]} if pattern else level
    return _byte_level(vocabulary, merges, special, pre)


def _with_more(content: dict[str, Any], added: Mapping[str, int]) -> dict[str, Any]:
    """The same tokeniser with special tokens behind its own."""
    content["model"]["vocab"] = {**content["model"]["vocab"], **added}  # there too, or the library numbers them anew
    content["added_tokens"] = [*content.get("added_tokens", []), *(_added(token, number) for token, number in added.items())]
    return content


def token_table(tokenizer: Any) -> tuple[dict[int, bytes], dict[str, int]]:
    """The bytes of each ordinary token by id, and the special tokens."""
    special = dict(getattr(tokenizer, "special", {}))
    if not special and tokenizer.end_of_text is not None:
        special = {"<|endoftext|>": int(tokenizer.end_of_text)}
    lengths = tokenizer.byte_lengths()
    ordinary = [i for i in range(tokenizer.vocabulary) if lengths[i]]
    return {i: tokenizer.token_bytes(i) for i in ordinary}, special


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that a byte-pair encoding merges, in their order: a token's last one is of the two parts that the earlier merges leave."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merged(token, ranks, rank)
            if len(parts) == 2:
                found.append((parts[0], parts[1]))
    return found


def _merged(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, at = min(pairs)
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_level(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], special: Mapping[str, int], pre: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, number) for token, number in sorted(special.items(), key=lambda item: item[1])],
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocabulary, **special},  # there too, or the library numbers them anew
            "merges": [list(pair) for pair in merges],
        },
    }


def _characters(characters: str) -> dict[str, Any]:
    """Each character by itself: a word of its own, as the library's WordLevel has them."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(characters)}, "unk_token": "<unk>"},
    }


def _added(token: str, number: int) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, **plain, "special": True}
