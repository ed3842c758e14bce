"""`gptlab bench generate`: tokens a second of our engine, and in turn with it of transformers' generate on a GPT-2 of the same shape."""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.resolve import resolve
from gptlab.config.schema import Config, ModelConfig
from gptlab.generate import native, step
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling
from gptlab.generate.weights import for_generation
from gptlab.hardware.device import machine, synchronise
from gptlab.model.pages import Pages
from gptlab.model.transformer import Transformer, new_model
from gptlab.tracker.console import RunProgress, console, say

VOCABULARY, PROMPT, TOP_K = 50257, 16, 50  # GPT-2's
READ_BYTES = 1 << 28  # of the matrix by which the memory's speed is measured


def bench(*, model: str, batches: Sequence[int], tokens: int, rounds: int, precision: str, as_json: bool) -> None:
    """Time `tokens` new tokens after PROMPT, top-k TOP_K, at each batch; print medians, ratios and the share of the memory's limit.

    Weights are random: what a token costs does not depend on them. Raises ConfigError for counts below 1 or an unknown precision.
    """
    for name, value in (("--tokens", tokens), ("--rounds", rounds), ("--batch", min(batches))):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    config = resolve(compose([f"model={model}", "data=shakespeare_gpt2"]), machine())
    if PROMPT + tokens > config.model.context_length:
        most = config.model.context_length - PROMPT
        raise ConfigError(f"--tokens {tokens}: with a prompt of {PROMPT} at most {most} fit the context of {model}")
    device = torch.device(config.hardware.device)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16  # int8 is set beside bf16
    ours = new_model(config.model, VOCABULARY, 0).to(device).eval()
    size = _read_bytes(ours, {"fp32": 4, "bf16": 2, "int8": 1}.get(precision, 0))
    llama = _llama_cpp(config, ours, tokens, device, precision)
    ours = for_generation(ours, precision)
    makers: dict[str, Callable[[int], float]] = {f"gptlab {precision}": lambda batch: _ours(ours, batch, tokens, device)}
    note = ""
    if importlib.util.find_spec("transformers") is None:
        note = "transformers is not installed: pip install transformers sets its generate beside ours"
    elif not _like_gpt2(config.model):
        note = "transformers' GPT-2 has no such parts: ours is timed alone"
    else:
        theirs = _transformers(ours, device, dtype)
        makers[f"transformers {'fp32' if precision == 'fp32' else 'bf16'}"] = lambda batch: theirs(batch, tokens)
    if llama is not None:
        makers[f"llama.cpp {precision}"] = llama
    found: dict[int, dict[str, list[float]]] = {}
    with RunProgress("bench generate", None):
        for batch in batches:
            timed = {name: make for name, make in makers.items() if batch == 1 or not name.startswith("llama.cpp")}
            for make in timed.values():
                make(batch)  # warm
            found[batch] = {name: [] for name in timed}
            for _ in range(rounds):
                for name, make in timed.items():
                    found[batch][name].append(batch * tokens / make(batch))
    limit = _read_speed(device, dtype) / size
    report: dict[str, Any] = {
        "model": model,
        "precision": precision,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "new_tokens": tokens,
        "prompt_tokens": PROMPT,
        "top_k": TOP_K,
        "memory_limit": limit,
        "native": device.type == "cpu" and native.available(),
        "one_call": step.of(ours) is not None,  # whether a step is one call
        "note": note,
        "rows": [_row(batch, by_name, limit) for batch, by_name in found.items()],
    }
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)


def _llama_cpp(config: Config, model: Transformer, tokens: int, device: torch.device, precision: str) -> Callable[[int], float] | None:
    """llama.cpp with the same weights, by its Python package, where that is installed: one row on a CPU, in fp32 or bf16."""
    if importlib.util.find_spec("llama_cpp") is None or device.type != "cpu" or precision == "int8" or not _like_gpt2(config.model):
        return None
    from llama_cpp import Llama

    from gptlab.data.tokenizer import gpt2
    from gptlab.interop.gguf import write_gguf
    from gptlab.runner.load import Loaded

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.gguf"
        write_gguf(Loaded(None, config, model, gpt2()), file, precision)
        theirs = Llama(str(file), n_ctx=config.model.context_length, n_threads=torch.get_num_threads(), verbose=False)

    def timed(batch: int) -> float:
        prompt = torch.randint(VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
        started = time.perf_counter()
        made = theirs.generate(prompt, top_k=TOP_K, top_p=1.0, min_p=0.0, temp=1.0, repeat_penalty=1.0)
        for _ in range(tokens):
            next(made)
        return time.perf_counter() - started

    return timed


def _row(batch: int, by_name: dict[str, list[float]], limit: float) -> dict[str, Any]:
    ours, *others = by_name
    row: dict[str, Any] = {"batch": batch, "tokens_per_second": {name: statistics.median(values) for name, values in by_name.items()}}
    row["share_of_limit"] = row["tokens_per_second"][ours] / (limit * batch)
    row["ratio"] = {}
    for other in others:
        ratios = [a / b for a, b in zip(by_name[ours], by_name[other], strict=True)]
        row["ratio"][other] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return row


def _show(report: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["tokens_per_second"]))
    where = f"{report['device']}, {report['threads']} threads" if report["device"] == "cpu" else report["device"]
    what = f"tokens/s of {report['new_tokens']} new tokens after {report['prompt_tokens']}, top-k {report['top_k']}"
    title = f"{report['model']}, {report['precision']}, {what}, {where}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    ours, *others = names
    table.add_column("batch", no_wrap=True)
    table.add_column(ours.split()[0], justify="right", no_wrap=True)
    for other in others:
        table.add_column(other.split()[0], justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("of limit", justify="right", no_wrap=True)
    for row in report["rows"]:
        cells = [str(row["batch"]), f"{row['tokens_per_second'][ours]:,.1f}"]
        for other in others:
            known = other in row["ratio"]
            cells.append(f"{row['tokens_per_second'][other]:,.1f}" if known else "")
            shown = "{median:.2f} ({least:.2f} to {most:.2f})" if len(others) == 1 else "{median:.2f}"  # 80 columns hold no two ranges
            cells.append(shown.format(**row["ratio"][other]) if known else "")
        table.add_row(*cells, f"{row['share_of_limit']:.0%}")
    console.print(table)
    say((f"the limit: every weight is read once a step, at most {report['memory_limit']:,.0f} times a second here", "dim"))
    if report["note"]:
        say((report["note"], "dim"))


def _ours(model: Transformer, batch: int, tokens: int, device: torch.device) -> float:
    prompts = torch.randint(VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    settings = Sampling(max_tokens=tokens, top_k=TOP_K)
    synchronise(device)
    started = time.perf_counter()
    count = sum(1 for _ in generate(model, prompts, [settings] * batch))
    synchronise(device)
    assert count == batch * tokens
    return time.perf_counter() - started


def _transformers(ours: Transformer, device: torch.device, dtype: torch.dtype) -> Callable[[int, int], float]:
    from transformers import GPT2Config, GPT2LMHeadModel

    c = ours.config
    made = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=c.context_length, n_embd=c.width, n_layer=c.depth, n_head=c.heads))
    theirs: Any = made.to(device=device, dtype=dtype).eval()

    def timed(batch: int, tokens: int) -> float:
        prompts = torch.randint(VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
        synchronise(device)
        started = time.perf_counter()
        with torch.inference_mode():
            out = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=TOP_K,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        synchronise(device)
        assert out.shape == (batch, PROMPT + tokens)
        return time.perf_counter() - started

    return timed


def _like_gpt2(model: ModelConfig) -> bool:
    """Whether it is GPT-2 at another size, which transformers' is, too."""
    gpt2 = compose(["model=gpt2"]).model
    return replace(gpt2, width=model.width, depth=model.depth, heads=model.heads, context_length=model.context_length) == model


def _read_bytes(model: Transformer, width: int) -> int:
    """Bytes of weights that one step reads, each number of `width` bytes: all but tables of which a token takes one row (a tied head is
    read whole)."""
    tables = {id(p) for name, p in model.named_parameters() if name.startswith("position.")}
    return width * sum(p.numel() for p in model.parameters() if id(p) not in tables)


def _read_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second at which a matrix much larger than the caches is multiplied with a vector, the best of several: by torch, and on a CPU
    by our own product too, from pages as large as the weights'."""
    width = 4096
    matrix = torch.ones(READ_BYTES // width // dtype.itemsize, width, device=device, dtype=dtype)
    vector, best = torch.ones(width, device=device, dtype=dtype), 0.0
    ways: list[Callable[[], Tensor]] = [lambda: torch.mv(matrix, vector)]
    if device.type == "cpu" and native.available():
        own, short = native.Product(Pages().copy(matrix.view(torch.bfloat16).view(-1, width))), torch.ones(1, width, dtype=torch.bfloat16)
        ways.append(lambda: own(short))
    for way in ways * 8:
        synchronise(device)
        started = time.perf_counter()
        way()
        synchronise(device)
        best = max(best, READ_BYTES / (time.perf_counter() - started))
    return best
