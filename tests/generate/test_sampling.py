"""What may be drawn, against distributions worked by hand, and draws against their distribution."""

from __future__ import annotations

import pytest
import torch

from gptlab.config.errors import ConfigError, DivergedError
from gptlab.generate.sampling import Sampling, distribution, draw

P = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]])
LOGITS = P.log()


def probabilities(settings: Sampling, seen: list[list[int]] | None = None, logits: torch.Tensor = LOGITS) -> list[float]:
    p, places = distribution(logits, settings, seen or [])
    return torch.zeros(logits.shape).scatter(1, places, p)[0].tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.25, 0.15, 0.07, 0.03]),
        (Sampling(top_p=0.5), [1, 0, 0, 0, 0]),
        (Sampling(top_p=0.51), [2 / 3, 1 / 3, 0, 0, 0]),  # the token that reaches it is kept
        (Sampling(min_p=0.3), [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
        (Sampling(temperature=0.5), [0.25 / 0.3408, 0.0625 / 0.3408, 0.0225 / 0.3408, 0.0049 / 0.3408, 0.0009 / 0.3408]),
        (Sampling(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0, 0]),  # of what top_k left: 0.56, 0.28, 0.17
        (Sampling(temperature=0), [1, 0, 0, 0, 0]),
    ],
)
def test_distributions_are_those_worked_by_hand(settings: Sampling, expected: list[float]) -> None:
    assert probabilities(settings) == pytest.approx(expected, abs=1e-6)


def test_the_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.5]])
    expected = torch.tensor([1.0, 1.0, -2.0, 0.5]).softmax(0).tolist()
    assert probabilities(Sampling(repetition_penalty=2.0), [[0, 2, 2]], logits) == pytest.approx(expected)
    assert logits[0, 0] == 2.0, "the model's logits are left as they were"


def test_draws_follow_the_distribution() -> None:
    count, settings = 20000, Sampling(temperature=1.3, top_k=4)
    expected = probabilities(settings)
    rows = [settings] * count
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    drawn = torch.tensor(draw(LOGITS.expand(count, -1), rows, generators))
    shares = (torch.bincount(drawn, minlength=5) / count).tolist()
    assert shares == pytest.approx(expected, abs=4 * (0.25 / count) ** 0.5)


def test_a_row_draws_the_same_whatever_its_neighbours_are() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    settings = [Sampling(seed=1), Sampling(seed=2, top_p=0.9), Sampling(temperature=0)]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s.seed) for s in settings]

    together = draw(logits, settings, generators())
    alone = [draw(logits[i : i + 1], settings[i : i + 1], generators()[i : i + 1])[0] for i in range(3)]
    assert together == alone
    assert together[2] == int(logits[2].argmax())


def test_a_number_at_the_very_end_draws_a_token_that_has_a_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.ones(n))
    assert draw(LOGITS, [Sampling(top_p=0.6)], [torch.Generator()]) == [1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Sampling(max_tokens=0), "--max-tokens 0 must be at least 1"),
        (Sampling(temperature=-1.0), "--temperature -1.0 must be at least 0"),
        (Sampling(temperature=float("nan")), "--temperature nan must be"),
        (Sampling(temperature=float("inf")), "--temperature inf must be"),
        (Sampling(top_k=-1), "--top-k -1 must be at least 0"),
        (Sampling(top_p=0.0), "--top-p 0.0 must be above 0"),
        (Sampling(top_p=float("nan")), "--top-p nan must be above 0"),
        (Sampling(min_p=1.5), "--min-p 1.5 must be between 0 and 1"),
        (Sampling(repetition_penalty=0.0), "--repetition-penalty 0.0 must be above 0"),
        (Sampling(stop=("",)), "must be texts of at least one character"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings: Sampling, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settings.check()
    assert told in str(refused.value)


@pytest.mark.parametrize("settings", [Sampling(), Sampling(temperature=0), Sampling(top_k=2), Sampling(top_p=0.5), Sampling(min_p=0.1)])
def test_scores_that_are_no_numbers_are_no_token(settings: Sampling) -> None:
    with pytest.raises(DivergedError, match="not a number"):
        draw(LOGITS * float("nan"), [settings], [torch.Generator()])
