"""`gptlab bench data`: preparing text beside the bare tokeniser, and the loader over two billion tokens, on this machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from gptlab.cli.train import environment
from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component
from gptlab.data.pipeline import pieces_from
from gptlab.data.prepare import prepare
from gptlab.data.shard import SHARD_TOKENS, SplitState, SplitWriter
from gptlab.tracker.console import console, say

TOKENS = 2_000_000_000
SETTINGS = ((64, 12), (1024, 12), (1024, 512))  # context length, rows of a batch
LOAD_SECONDS = 3.0

# What one core does with the loader: in a process of its own, so that its memory is its own.
_LOAD = """
import json, os, sys, time
started = time.perf_counter()
import numpy as np
from gptlab.data.loader import Loader
from gptlab.data.shard import TokenStream
from gptlab.data.sources import Windows
import torch
torch.set_num_threads(1)
imported = time.perf_counter()
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024
before = resident()
folder, entry, context, rows, seconds = json.loads(sys.argv[1])
from pathlib import Path
stream = TokenStream([(Path(folder), entry)], np.dtype("<u2"))
loader = Loader(Windows(stream, context, 0), rows)
loader.batch(0)
opened, tokens, step, peak = time.perf_counter(), 0, 0, 0
while time.perf_counter() - opened < seconds:
    step += 1
    tokens += loader.batch(step).targets.numel()
    if step % 16 == 0:
        peak = max(peak, resident())
print(json.dumps({"tokens_per_second": tokens / (time.perf_counter() - opened), "first_batch_seconds": opened - imported,
                  "memory_bytes": max(peak, resident()), "grown_bytes": max(peak, resident()) - before}))
"""


def data(text: Path | None, *, megabytes: int, rounds: int, as_json: bool) -> None:
    """Time both, and print them with their ratio."""
    if rounds < 1 or megabytes < 1:
        raise ConfigError(f"--rounds {rounds} and --megabytes {megabytes} must be at least 1")
    with tempfile.TemporaryDirectory(prefix="gptlab-bench-") as name:
        found: dict[str, Any] = {"tokenising": _tokenising(text, Path(name), megabytes, rounds), "loader": _loading(Path(name))}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    tokenising = found["tokenising"]
    say(
        ("tokenising ", "bold"),
        f"{tokenising['bytes'] / 1e6:.0f} MB in GPT-2's tokens on {tokenising['threads']} threads: "
        f"{tokenising['prepare']:.1f} MB/s read, tokenised and written, {tokenising['tiktoken']:.1f} MB/s by encode_ordinary_batch alone: ",
        (f"{tokenising['ratio']:.2f}", "bold"),
        f" ({min(tokenising['ratios']):.2f} to {max(tokenising['ratios']):.2f}, round by round)",
    )
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="the loader on one core", title_justify="left")
    for column in ("context", "rows", "tokens", "tokens/s", "first batch", "memory"):
        shown.add_column(column, justify="right")
    for row in found["loader"]:
        shown.add_row(
            str(row["context"]),
            str(row["rows"]),
            f"{row['tokens']:,}",
            f"{row['tokens_per_second'] / 1e6:,.0f} M",
            f"{1000 * row['first_batch_seconds']:.0f} ms",
            f"{row['memory_bytes'] / 1e6:,.0f} MB (+{row['grown_bytes'] / 1e6:,.0f})",
        )
    console.print(shown)


def _tokenising(text: Path | None, folder: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    """Both ways in turn over the same documents, which lie in a file of JSON lines."""
    import tiktoken

    overrides = ["data/corpus=text", f"data.corpus.path='{text}'"] if text else []
    corpus = build(compose(overrides).data.corpus)
    documents: list[str] = []
    size, wanted = 0, megabytes * 1_000_000
    while size < wanted:
        before = size
        for piece, _ in pieces_from(corpus, None):
            for start in range(0, len(piece.text), 10_000):  # a plain file is one document: make it some of the size of web pages
                documents.append(piece.text[start : start + 10_000])
                size += len(documents[-1].encode())
            if size >= wanted:
                break
        if size == before:
            raise ConfigError(f"--text {text} holds no text")
    file = folder / "text.jsonl"
    with file.open("w", encoding="utf-8") as opened:
        for document in documents:
            opened.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    encoding, threads = tiktoken.get_encoding("gpt2"), os.cpu_count() or 1
    options: Any = component("data/corpus", "text").options
    tokenizer: Any = component("data/tokenizer", "gpt2").options()
    config = replace(compose([]).data, corpus=options(path=str(file)), tokenizer=tokenizer, validation_fraction=0.01)

    def bare() -> None:
        encoding.encode_ordinary_batch(documents, num_threads=threads)

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as home, environment("GPTLAB_HOME", home):
            prepare(config, threads=threads)

    times = {name: [_seconds(call) for _ in range(0)] for name, call in (("tiktoken", bare), ("prepare", whole))}
    for _ in range(rounds):
        times["tiktoken"].append(_seconds(bare))
        times["prepare"].append(_seconds(whole))
    ratios = [a / b for a, b in zip(times["tiktoken"], times["prepare"], strict=True)]
    speeds = {name: size / 1e6 / statistics.median(found) for name, found in times.items()}
    return {"bytes": size, "threads": threads, **speeds, "ratios": ratios, "ratio": statistics.median(ratios)}


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _loading(folder: Path) -> list[dict[str, Any]]:
    """The loader over sparse shards: their blocks are zeros that take no room, and are read like any others."""
    found = []
    for tokens in (TOKENS // 100, TOKENS):
        entry = _sparse(folder, tokens)
        for context, rows in SETTINGS if tokens == TOKENS else SETTINGS[1:2]:
            told = json.dumps([str(folder), entry, context, rows, LOAD_SECONDS])
            done = subprocess.run([sys.executable, "-c", _LOAD, told], capture_output=True, text=True, check=True)
            found.append({"context": context, "rows": rows, "tokens": tokens, **json.loads(done.stdout)})
    return found


def _sparse(folder: Path, tokens: int) -> dict[str, Any]:
    """A split of so many tokens. Its large shards have been looked through once, as the ones of a preparation have."""
    import numpy as np

    from gptlab.data.shard import file_hash, seal

    state = SplitState()
    writer = SplitWriter(folder, f"sparse{tokens}", np.dtype("<u2"), state)
    writer.write(np.zeros(0, np.uint16), np.zeros(1, np.int64))
    writer.flush()
    writer.close()
    shards: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, tokens, SHARD_TOKENS)):
        file, count = folder / f"sparse{tokens}-{number:05d}.bin", min(SHARD_TOKENS, tokens - start)
        with file.open("wb") as opened:
            opened.truncate(2 * count)
        shards.append({"file": file.name, "tokens": count, "sha256": file_hash(file)})
        seal(file, shards[-1]["sha256"])  # as the one that wrote it does
    return {"tokens": tokens, "documents": 1, "shards": shards, "index": writer.index()}
