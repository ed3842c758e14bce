"""Texts side by side are the texts that the full forward pass gives, one token at a time and alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptlab import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import components, load_components
from gptlab.generate.engine import Engine, Made, Reading, generate
from gptlab.generate.sampling import Sampling
from gptlab.model.cache import KVCache
from gptlab.model.transformer import Transformer, new_model

load_components()
CONTEXT, VOCABULARY = 24, 61
PROMPTS = [[5, 6, 7], [9] * 11, [3], list(range(20, 34))]
PARTS = [
    *(f"model/{slot}={c.name}" for slot in ("position", "attention", "input", "block", "kernel") for c in components(f"model/{slot}")),
    "model.attention.window=5",
    "model.attention.kv_heads=1",
    "model/ffn=moe",
]


def model(*overrides: str) -> Transformer:
    small = ["model.width=16", "model.heads=2", "model.depth=2", f"model.context_length={CONTEXT}", "model.dropout=0"]
    made = new_model(compose([*small, *overrides]).model, VOCABULARY, 0).double()
    with torch.no_grad():  # far from the init, where each token would nearly be the likeliest
        for i, parameter in enumerate(made.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype))
    return made.eval()


def by_rows(made: list[Made]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for one in made:
        found.setdefault(one.row, []).append(one.token)
    return found


@torch.inference_mode()
def likeliest(made: Transformer, prompt: list[int], count: int) -> list[int]:
    """By the full forward pass over all there is, which fits the context."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(made(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("part", PARTS)
def test_greedy_texts_side_by_side_are_those_of_the_full_forward_pass(part: str) -> None:
    made = model(part)
    found = by_rows(list(generate(made, PROMPTS, Sampling(max_tokens=10, temperature=0))))
    assert found == {i: likeliest(made, prompt, 10) for i, prompt in enumerate(PROMPTS)}


@pytest.mark.parametrize("part", PARTS)
def test_a_prompt_read_in_pieces_is_the_prompt(part: str) -> None:
    made, prompt = model(part), [i * 7 % VOCABULARY for i in range(17)]
    reading = Reading(made, prompt)
    for piece in (1, 5, 7, 9):
        reading.go_on(piece)
    assert reading.left == 0
    engine = Engine(made)
    engine.take(prompt, reading, [Sampling(max_tokens=5, temperature=0)], [0])
    found: list[int] = []
    while engine.rows:
        found += [one.token for one in engine.step()]
        engine.advance()
    assert found == likeliest(made, prompt, 5)


def test_a_full_row_forgets_its_older_half_and_the_others_are_none_the_wiser() -> None:
    made, count = model("model/position=rotary"), 40
    found = by_rows(list(generate(made, PROMPTS, Sampling(max_tokens=count, temperature=0))))
    for row, prompt in enumerate(PROMPTS):
        tokens, begin = list(prompt), 0
        for _ in range(count):
            if len(tokens) - begin > CONTEXT:
                begin = len(tokens) - CONTEXT // 2
            with torch.inference_mode():
                tokens.append(int(made(torch.tensor([tokens[begin:]]))[0, -1].argmax()))
        assert found[row] == tokens[len(prompt) :], row


def test_of_a_prompt_longer_than_the_context_the_end_is_read() -> None:
    made, long = model(), [i % VOCABULARY for i in range(3 * CONTEXT)]
    (first, *_) = generate(made, [long], Sampling(max_tokens=3, temperature=0))
    with torch.inference_mode():
        assert first.token == int(made(torch.tensor([long[-CONTEXT:]]))[0, -1].argmax())


def test_each_row_is_told_as_many_of_the_likeliest_tokens_as_it_asks_for() -> None:
    made = model()
    engine = Engine(made)
    tops = (3, None, 0, 100)
    for row, (prompt, top) in enumerate(zip(PROMPTS, tops, strict=True)):
        engine.add([prompt], [Sampling(max_tokens=2, seed=row)], [row], top=top)
    for one in engine.step():
        with torch.inference_mode():
            spread = made(torch.tensor([PROMPTS[one.row]]))[0, -1].float().log_softmax(-1)
        top = tops[one.row]
        assert one.logprob == (None if top is None else pytest.approx(float(spread[one.token]), abs=1e-5))
        values, places = spread.topk(min(top or 0, VOCABULARY))
        assert [token for token, _ in one.likeliest] == places.tolist()
        assert [value for _, value in one.likeliest] == pytest.approx(values.tolist(), abs=1e-5)


def test_samples_of_one_prompt_are_those_of_their_seeds_alone() -> None:
    made, settings = model(), Sampling(max_tokens=8, seed=5)
    together = by_rows(list(generate(made, PROMPTS[:2], settings, samples=3)))
    for i, prompt in enumerate(PROMPTS[:2]):
        for j in range(3):
            alone = by_rows(list(generate(made, [prompt], Sampling(max_tokens=8, seed=5 + j))))
            assert together[3 * i + j] == alone[0]


def test_rows_end_by_themselves() -> None:
    made = model()
    whole = by_rows(list(generate(made, PROMPTS, Sampling(max_tokens=9, seed=1))))
    end = whole[1][4]
    found = by_rows(list(generate(made, PROMPTS, Sampling(max_tokens=9, seed=1), end=end)))
    cut = {row: tokens[: tokens.index(end)] if end in tokens else tokens for row, tokens in whole.items()}
    assert found == {row: tokens for row, tokens in cut.items() if tokens}
    heard = by_rows(list(generate(made, PROMPTS, Sampling(max_tokens=9, seed=1), ended=lambda m: m.row == 2)))
    assert heard == whole | {2: whole[2][:1]}
    each = [Sampling(max_tokens=n, seed=1) for n in (2, 9, 1, 4)]
    assert {row: len(tokens) for row, tokens in by_rows(list(generate(made, PROMPTS, each))).items()} == {0: 2, 1: 9, 2: 1, 3: 4}


def test_log_probabilities_are_the_models_own() -> None:
    made = model()
    found = list(generate(made, PROMPTS, Sampling(max_tokens=4, temperature=0.7, top_k=5), logprobs=True))
    for row, prompt in enumerate(PROMPTS):
        own = [m for m in found if m.row == row]
        tokens = torch.tensor([[*prompt, *(m.token for m in own)]])
        with torch.inference_mode():
            likely: Tensor = made(tokens).float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = likely.gather(1, tokens[0, len(prompt) :, None])[:, 0].tolist()
        assert [m.logprob for m in own] == pytest.approx(expected, abs=1e-5)


def test_a_model_without_blocks_and_a_context_of_one_generate_too() -> None:
    made = model("model.depth=0", "model/position=none")
    assert by_rows(list(generate(made, [[4], [7, 4]], Sampling(max_tokens=6, temperature=0))))[1] == likeliest(made, [7, 4], 6)
    single = model("model.context_length=1")
    tokens = [8]
    for _ in range(5):
        with torch.inference_mode():
            tokens.append(int(single(torch.tensor([tokens[-1:]]))[0, -1].argmax()))
    assert by_rows(list(generate(single, [[8]], Sampling(max_tokens=5, temperature=0))))[0] == tokens[1:]


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    made = model()
    made.train()
    list(generate(made, [[1]], Sampling(max_tokens=2)))
    assert made.training
    with pytest.raises(ConfigError, match="the prompt is empty"):
        list(generate(made, [[]], Sampling()))
    assert made.training


def test_a_window_keeps_no_more_than_its_window() -> None:
    cache = model("model.attention.window=5").new_cache(2, CONTEXT)
    assert [tuple(keys.shape) for keys in cache.keys] == [(2, 2, 5, 8)] * 2


@pytest.mark.parametrize("window", ["null", "5", "9"])
def test_memory_grows_with_the_text(window: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, prompts, settings = model(f"model.attention.window={window}"), [[8], [1, 2, 3, 4, 5], [3]], Sampling(max_tokens=12, temperature=0)
    at_once = by_rows(list(generate(made, prompts, settings)))
    monkeypatch.setattr("gptlab.model.cache.ROOM", 2)
    assert by_rows(list(generate(made, prompts, settings))) == at_once
    cache = made.new_cache(1, CONTEXT)
    assert [keys.shape[2] for keys in cache.keys] == [2, 2]
    held = CONTEXT if window == "null" else int(window)
    assert cache.bytes_when_full == 2 * 2 * held * made.config.width * made.embedding.weight.itemsize


def test_a_cache_goes_back_unless_a_window_has_forgotten() -> None:
    made, tokens = model("model/position=rotary"), torch.tensor([[1, 2, 3, 4, 5, 6]])
    cache = made.new_cache(1, CONTEXT)
    with torch.inference_mode():
        made(tokens, cache=cache)
        cache.rewind([3])
        again = made(torch.tensor([[9, 8]]), cache=cache)
        torch.testing.assert_close(again, made(torch.tensor([[1, 2, 3, 9, 8]]))[:, 3:], rtol=0, atol=1e-12)
        windowed = model("model.attention.window=4")
        cache = windowed.new_cache(1, CONTEXT)
        windowed(tokens, cache=cache)
    with pytest.raises(ValueError, match="a sliding window has forgotten"):
        cache.rewind([3])


def test_caches_of_different_sizes_are_not_joined() -> None:
    sizes = {"layers": 1, "kv_heads": 1, "head_width": 4}
    with pytest.raises(ValueError, match="different sizes"):
        KVCache(1, 8, **sizes).join(KVCache(1, 9, **sizes))
