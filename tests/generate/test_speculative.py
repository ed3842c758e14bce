"""Speculative decoding gives what the model alone gives: the same greedy text, the same distribution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gptlab import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import components, load_components
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling, distribution
from gptlab.generate.speculative import Draft, Lookup, Proposer, Told, speculate
from gptlab.model.transformer import Transformer, new_model

load_components()
CONTEXT, VOCABULARY = 24, 6
PARTS = [*(f"model/position={c.name}" for c in components("model/position")), "model/attention=average", "model.attention.kv_heads=1"]


def model(seed: int, *overrides: str) -> Transformer:
    small = ["model.width=16", "model.heads=2", "model.depth=1", f"model.context_length={CONTEXT}", "model.dropout=0"]
    made = new_model(compose([*small, *overrides]).model, VOCABULARY, seed).double()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + i), dtype=torch.double))
    return made.eval()


@torch.inference_mode()
def likeliest(made: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    tokens, begin = list(prompt), 0
    for _ in range(count):
        if len(tokens) - begin > CONTEXT:
            begin = len(tokens) - CONTEXT // 2
        tokens.append(int(made(torch.tensor([tokens[begin:]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def proposers(made: Transformer, settings: Sampling) -> dict[str, Proposer]:
    return {"other": Draft(model(7), settings), "itself": Draft(made, settings), "look-up": Lookup(VOCABULARY)}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("which", ["other", "itself", "look-up"])
def test_greedy_texts_are_the_models_own(part: str, which: str) -> None:
    made, settings, told = model(0, part), Sampling(max_tokens=14, temperature=0), Told()
    found = list(speculate(made, [1, 2, 3, 1, 2], settings, proposers(made, settings)[which], told=told))
    assert found == likeliest(made, [1, 2, 3, 1, 2], 14)
    assert told.tokens == 14
    if which == "itself":
        assert (told.passes, told.accepted) == (3, told.proposed), "what it would draw itself is never refused"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["other", "look-up"])
@pytest.mark.parametrize("settings", [Sampling(max_tokens=3), Sampling(max_tokens=3, temperature=0.7, top_k=4, repetition_penalty=1.2)])
def test_texts_are_distributed_as_the_models_own(which: str, settings: Sampling) -> None:
    made, prompt, count = model(0), [2, 4, 2], 2500
    expected: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(VOCABULARY), repeat=3):
        share = 1.0
        for i, token in enumerate(text):
            so_far = [*prompt, *text[:i]]
            with torch.inference_mode():
                p, places = distribution(made(torch.tensor([so_far]))[:, -1], settings, [so_far])
            share *= float(p[places == token].sum())
        expected[text] = share
    assert sum(expected.values()) == pytest.approx(1)
    proposer = proposers(made, settings)[which]
    found = dict.fromkeys(expected, 0)
    for seed in range(count):
        own = Sampling(**{**vars(settings), "seed": seed})
        found[tuple(speculate(made, prompt, own, proposer, ahead=2))] += 1
    assert not any(found[text] for text, share in expected.items() if share == 0)
    # Pearson's statistic: mean df, deviation sqrt(2 df); rare texts are taken together
    cells = [(found[t], count * s) for t, s in expected.items() if count * s >= 5]
    cells.append((count - sum(seen for seen, _ in cells), count - sum(wanted for _, wanted in cells)))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells if wanted > 0)
    df = len(cells) - 1
    assert df > 5
    assert statistic < df + 4 * (2 * df) ** 0.5


def test_a_full_context_forgets_its_older_half_here_too() -> None:
    made, settings = model(0, "model/position=rotary"), Sampling(max_tokens=60, temperature=0)
    for proposer in proposers(made, settings).values():
        assert list(speculate(made, [1, 2, 3], settings, proposer, ahead=3)) == likeliest(made, [1, 2, 3], 60)


def test_a_prompt_longer_than_the_context_is_read_as_the_engine_reads_it() -> None:
    made, settings, prompt = model(0), Sampling(max_tokens=16, temperature=0), [i * i % VOCABULARY for i in range(50)]
    expected = [one.token for one in generate(made, [prompt], settings)]
    for proposer in proposers(made, settings).values():
        assert list(speculate(made, prompt, settings, proposer)) == expected


def test_the_end_token_ends_it() -> None:
    made, settings = model(0), Sampling(max_tokens=14, temperature=0)
    whole = likeliest(made, [1, 2, 3], 14)
    end = whole[5]
    assert list(speculate(made, [1, 2, 3], settings, Lookup(VOCABULARY), end=end)) == whole[: whole.index(end)]


def test_look_up_proposes_what_followed_the_longest_match_last() -> None:
    tokens, p = Lookup(VOCABULARY).propose([1, 2, 3, 4, 1, 2, 5, 0, 1, 2], 3, torch.Generator())
    assert tokens == [5, 0, 1]
    assert p.argmax(1).tolist() == [5, 0, 1]
    assert Lookup(VOCABULARY).propose([1, 2, 3], 3, torch.Generator())[0] == []


@pytest.mark.parametrize(
    ("overrides", "ahead", "told"),
    [
        (["model.attention.window=4"], 4, "sliding window"),
        (["model/input=smear"], 4, "model/input=smear"),
        ([], 0, "--ahead 0 must be at least 1"),
        ([], 12, "less than half of the context of 24"),
    ],
)
def test_what_cannot_go_back_is_refused(overrides: list[str], ahead: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        next(speculate(model(0, *overrides), [1], Sampling(), Lookup(VOCABULARY), ahead=ahead))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        next(speculate(model(0), [], Sampling(), Lookup(VOCABULARY)))


def test_weights_that_do_not_sum_to_one_are_drawn_from_in_proportion() -> None:
    from gptlab.generate.speculative import _drawn

    weights: Tensor = torch.tensor([0.0, 0.2, 0.0, 0.6, 0.0])
    drawn = [_drawn(weights, torch.Generator().manual_seed(i)) for i in range(4000)]
    assert set(drawn) == {1, 3}
    assert drawn.count(1) / 4000 == pytest.approx(0.25, abs=0.03)
