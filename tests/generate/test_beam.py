"""Beam search against every text there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from gptlab.config.errors import ConfigError
from gptlab.generate.beam import beam_search
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling
from tests.generate.test_speculative import VOCABULARY, model

PROMPT = [1, 4, 2]


def every_text(count: int, end: int | None, penalty: float) -> list[tuple[list[int], float]]:
    """All texts of at most `count` tokens that end by themselves, or are as long as may be, the best score first."""
    made, found = model(0), []
    with torch.inference_mode():
        for length in range(1, count + 1):
            for text in itertools.product(range(VOCABULARY), repeat=length):
                if end in text[:-1] or (length < count and text[-1] != end):
                    continue
                tokens = torch.tensor([[*PROMPT, *text]])
                likely = made(tokens).float().log_softmax(-1)[0, len(PROMPT) - 1 : -1]
                total = float(likely.gather(1, tokens[0, len(PROMPT) :, None]).sum())
                found.append((list(text[: -1 if text[-1] == end else None]), total / length**penalty))
    return sorted(found, key=lambda item: -item[1])


@pytest.mark.parametrize(("end", "penalty"), [(None, 1.0), (3, 1.0), (3, 0.0), (0, 2.0)])
def test_wide_enough_it_finds_the_best_of_all_texts(end: int | None, penalty: float) -> None:
    expected = every_text(3, end, penalty)[:4]
    found = beam_search(model(0), PROMPT, beams=VOCABULARY**2, max_tokens=3, end=end, length_penalty=penalty)[:4]
    assert [b.tokens for b in found] == [tokens for tokens, _ in expected]
    assert [b.score for b in found] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_one_beam_is_the_greedy_text() -> None:
    greedy = [one.token for one in generate(model(0), [PROMPT], Sampling(max_tokens=9, temperature=0))]
    (found,) = beam_search(model(0), PROMPT, beams=1, max_tokens=9)
    assert found.tokens == greedy


def test_more_beams_find_a_text_at_least_as_likely() -> None:
    scores = [beam_search(model(0), PROMPT, beams=n, max_tokens=6)[0].logprob for n in (1, 4, 40)]
    assert scores[0] <= scores[1] + 1e-9
    assert scores[1] <= scores[2] + 1e-9


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"beams": 0, "max_tokens": 3}, "--beams 0 must be at least 1"),
        ({"beams": 2, "max_tokens": 0}, "--max-tokens 0 must be at least 1"),
        ({"beams": 2, "max_tokens": 30}, "do not fit the context of 24"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        beam_search(model(0), PROMPT, **given)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        beam_search(model(0), [], beams=2, max_tokens=2)
