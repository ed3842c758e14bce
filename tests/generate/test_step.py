"""A step in one call: the modules' own numbers for all that it knows, and the modules themselves for all else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptlab import compose
from gptlab.config.product import cpu_multiplies_bf16
from gptlab.generate import native, step
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling
from gptlab.generate.weights import for_generation
from gptlab.model.cache import KVCache
from gptlab.model.linear import linear
from gptlab.model.transformer import Transformer, new_model

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")

VOCABULARY, CONTEXT = 61, 40
PROMPTS = [[5, 6, 7], [9] * 11, [3], list(range(20, 34))]
KNOWN = [
    [],
    *([f"model/norm={name}"] for name in ("layernorm", "layernorm_nonparametric", "rmsnorm", "rmsnorm_nonparametric", "none")),
    *([f"model/position={name}"] for name in ("none", "learned", "rotary", "rotary_stretched")),
    *([f"model/ffn={name}"] for name in ("gelu", "relu2", "swiglu", "geglu")),
    *([f"model/kernel={name}"] for name in ("naive", "sdpa")),
    ["model/ffn=gelu", "model.ffn.approximate=none"],
    ["model.bias=true"],
    ["model.bias=false"],
    ["model/head=untied", "model.head.soft_cap=3"],
    ["model/parametrisation=mup"],
    ["model.attention.kv_heads=1", "model/position=rotary"],
    ["model.attention.kv_heads=2", "model.heads=4", "model.attention.qk_norm=true", "model/position=rotary"],
    ["model.attention.window=5"],
    ["model.width=39", "model.pad_vocab_to=64"],  # nothing that vectors divide
    ["model.width=256", "model.heads=2"],
]
UNKNOWN = {
    "model/position=alibi": "model.position is Alibi",
    "model/block=sandwich": "model.blocks.0 is Sandwich",
    "model/ffn=moe": "model.blocks.0.ffn is",
    "model/input=smear": "model.input is Smear",
    "model/value=embedding": "model.blocks.0.attention.value is ValueEmbedding",
    "model/gate=per_head": "model.blocks.0.attention.gate is PerHead",
    "model/stream=input_skip": "model.blocks.0.stream is InputSkip",
    "model/attention=average": "model.blocks.0.attention is Average",
    "model.depth=0": "no blocks",
}
PRECISIONS = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(not cpu_multiplies_bf16(), reason="no bf16 products on this CPU")),
    "int8",
]


def model(*overrides: str) -> Transformer:
    small = ["model.width=48", "model.heads=3", "model.depth=2", f"model.context_length={CONTEXT}", "model.dropout=0"]
    made = new_model(compose([*small, *overrides]).model, VOCABULARY, 0)
    with torch.no_grad():  # far from the init, where each token would nearly be the likeliest
        for i, parameter in enumerate(made.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return made.eval()


def prepared(precision: str, *overrides: str) -> tuple[Transformer, step.Step]:
    made = for_generation(model(*overrides), precision)
    own = step.of(made)
    assert own is not None, step.why_not(made)
    return made, own


def read(made: Transformer, lengths: list[int]) -> KVCache:
    """A cache of rows so long, each its own."""
    cache = made.new_cache(1, CONTEXT)
    for row, length in enumerate(lengths):
        alone = cache if row == 0 else made.new_cache(1, CONTEXT)
        made(torch.arange(length)[None] * (row + 3) % VOCABULARY, cache=alone)
        if row:
            cache.join(alone)
    return cache


def steps(feed: Callable[[list[int]], Tensor], rows: int, count: int = 12) -> Tensor:
    return torch.stack([feed([(7 * i + 11 * row) % VOCABULARY for row in range(rows)]).float() for i in range(count)])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("parts", KNOWN, ids=" ".join)
@torch.inference_mode()
def test_it_gives_the_modules_logits_and_fills_the_cache_as_they_do(parts: list[str], precision: str) -> None:
    made, own = prepared(precision, *parts)
    for lengths in ([3], [4, 9, 1], [6] * 9):
        caches = read(made, lengths), read(made, lengths)
        found = steps(lambda tokens: own(tokens, caches[0]), len(lengths))  # noqa: B023
        wanted = steps(lambda tokens: made(torch.tensor(tokens)[:, None], cache=caches[1])[:, -1], len(lengths))  # noqa: B023
        near = 1e-5 if precision == "fp32" else 0.02  # of what the numbers differ by among themselves
        assert (found - wanted).square().mean().sqrt() < near * wanted.std()
        assert (found - wanted).abs().max() < 8 * near * wanted.std()
        assert caches[0].lengths == caches[1].lengths
        for mine, theirs in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
            assert (mine - theirs).float().square().mean().sqrt() < near * theirs.float().std()


@pytest.mark.parametrize("parts", KNOWN, ids=" ".join)
def test_greedy_texts_are_those_of_the_full_forward_pass_at_any_length(parts: list[str]) -> None:
    made, _ = prepared("fp32", *parts)
    found: dict[int, list[int]] = {}
    for one in generate(made, PROMPTS, Sampling(max_tokens=45, temperature=0)):
        found.setdefault(one.row, []).append(one.token)
    for row, prompt in enumerate(PROMPTS):
        tokens, begin = list(prompt), 0
        for token in found[row]:
            if len(tokens) - begin > CONTEXT:
                begin = len(tokens) - CONTEXT // 2
            with torch.inference_mode():
                logits = made(torch.tensor([tokens[begin:]]))[0, -1]
            assert logits.max() - logits[token] < 1e-4, (row, len(tokens))  # the likeliest, or one as likely
            tokens.append(token)


@pytest.mark.parametrize("parts", UNKNOWN)
def test_a_model_of_other_parts_goes_through_its_modules(parts: str) -> None:
    plain, made = model(parts), for_generation(model(parts), "fp32")
    assert step.of(made) is None
    assert (step.why_not(made) or "").startswith(UNKNOWN[parts])
    settings = Sampling(max_tokens=6, seed=3)
    assert list(generate(made, PROMPTS, settings)) == list(generate(plain, PROMPTS, settings))


def test_what_was_put_into_a_model_is_not_left_out() -> None:
    changes: dict[str, Callable[[Transformer], object]] = {
        "numbers that are not fp32 or bf16": lambda made: made.double(),
        "model.embedded is Tanh": lambda made: setattr(made, "embedded", torch.nn.Tanh()),
        "model.blocks.1.ffn.up has a product of its own": lambda made: setattr(
            made.blocks[1].ffn.up, "product", lambda *a, **k: linear(*a, **k)
        ),
        "a forward pass that was replaced": lambda made: setattr(made.norm, "forward", lambda x: x),
        "blocks that are not alike, or not in their order": lambda made: made.blocks.insert(0, made.blocks.pop(1)),
        "parts of kinds that it does not know: ReLU": lambda made: setattr(made.blocks[0].attention, "scores", torch.nn.ReLU()),
    }
    for why, change in changes.items():
        made = model("model/kernel=naive")
        assert step.why_not(made) is None
        change(made)
        assert step.why_not(made) == why


@torch.inference_mode()
def test_who_watches_the_modules_sees_them_work() -> None:
    made, own = prepared("fp32")
    seen: list[Tensor] = []
    settings = Sampling(max_tokens=5, temperature=0)
    before = list(generate(made, PROMPTS[:1], settings))
    for add in (
        lambda: made.blocks[1].attention.z.register_forward_hook(lambda m, i, out: seen.append(out)),
        lambda: made.norm.register_forward_pre_hook(lambda m, i: seen.append(i[0])),
        lambda: torch.nn.modules.module.register_module_forward_hook(lambda m, i, out: seen.append(out) if m is made.norm else None),
    ):
        handle = add()
        assert not own.takes(1)
        assert list(generate(made, PROMPTS[:1], settings)) == before
        handle.remove()
        assert len(seen) == 5  # the prompt, and what was made but for the last
        seen.clear()
    assert own.takes(1)
    assert not own.takes(step.MOST_ROWS + 1)
    with torch.autocast("cpu"):
        assert not own.takes(1)


@torch.inference_mode()
def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SMALL", 0)  # where one would do it alone
    made, own = prepared("int8", "model/ffn=swiglu", "model.width=39")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = read(made, [3, 5])
            found.append(steps(lambda tokens: own(tokens, cache), 2, 4))  # noqa: B023
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_several_engines_work_at_once() -> None:
    made, _ = prepared("fp32")
    alone = {seed: list(generate(made, PROMPTS, Sampling(max_tokens=30, seed=seed))) for seed in range(4)}
    together: dict[int, list[object]] = {}

    def work(seed: int) -> None:
        together[seed] = list(generate(made, PROMPTS, Sampling(max_tokens=30, seed=seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads, which is what is tested
@torch.inference_mode()
def test_a_forked_process_does_not_wait_for_threads_that_stayed_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SMALL", 0)
    made, own = prepared("fp32")
    cache, before = read(made, [3]), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        steps(lambda tokens: own(tokens, cache), 1, 2)
        child = os.fork()
        if not child:
            found = steps(lambda tokens: own(tokens, cache), 1, 2)
            os._exit(0 if found.isfinite().all() else 1)
    finally:
        torch.set_num_threads(before)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert (ended, status) == (child, 0)


@torch.inference_mode()
def test_a_row_longer_than_the_cache_is_refused_as_by_the_modules() -> None:
    made, own = prepared("fp32", "model/position=rotary")
    cache = read(made, [CONTEXT])
    with pytest.raises(ValueError, match=f"the cache holds {CONTEXT} tokens, not {CONTEXT + 1}"):
        own([1], cache)
