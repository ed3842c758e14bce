"""A probe's items are right, a model is judged by the likelihood of whole texts, and what a tokeniser lacks is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptlab import compose, train
from gptlab.config.errors import ConfigError
from gptlab.evaluate import pairs, probes, skills
from gptlab.evaluate.results import kept, share
from gptlab.runner.run import Run
from tests.evaluate.test_losses import CONTEXT, TEXT, alone, model, tokenizer
from tests.tiny import tiny

WORDS = {word for pair in (*pairs.NOUNS.items(), *pairs.PLACES.items()) for word in pair}


@pytest.mark.parametrize("name", pairs.PHENOMENA)
def test_the_sentences_of_a_pair_differ_in_one_point(name: str) -> None:
    found = pairs.pairs(name)
    assert len(found) == len(set(found)) >= 60
    assert found == pairs.pairs(name), "the same each time"
    assert not {good for good, _ in found} & {bad for _, bad in found}, "no sentence is right here and wrong there"
    for good, bad in found:
        assert good.strip()[0].isupper()
        assert good[-1] in ".?"
        one, two = good.lower().split(), bad.lower().split()
        if name.endswith("word_order"):
            assert sorted(w.strip(".,") for w in one) == sorted(w.strip(".,") for w in two)
        else:
            assert sum(a != b for a, b in zip(one, two, strict=True)) == 1, (good, bad)


def test_of_a_pair_the_first_is_grammatical() -> None:
    many = set(pairs.NOUNS.values())
    for name in ("english/agreement", "english/agreement_phrase", "english/agreement_clause"):
        for good, bad in pairs.pairs(name):
            subject = good.split()[1]
            assert (subject in many) == (not good.endswith("s.")) == bad.endswith("s."), good
    gender = {noun: g for g, noun, _, _ in pairs.NOMEN + pairs.ORTE}
    articles = {"german/gender": "der die das", "german/accusative": "den die das", "german/dative": "dem der dem"}
    for name, forms in articles.items():
        for good, bad in pairs.pairs(name):
            article, noun = good.strip(".?").split()[-2:]
            assert article == dict(zip("mfn", forms.split(), strict=True))[gender[noun]], good
            assert bad.strip(".?").split()[-2] != article
    for good, bad in pairs.pairs("english/article"):
        for text, right in ((good, True), (bad, False)):
            article, noun = text.strip(".").split()[-2:]
            assert ((article == "an") == (noun[0] in "aeiou")) is right, text
    for good, bad in pairs.pairs("german/agreement"):
        assert (good.split()[2].endswith("en."), bad.split()[2].endswith("en.")) in ((True, False), (False, True))


def likely_by(rule: Callable[[str], float], by_byte: Any) -> Callable[..., Any]:
    """In the place of a model: texts are as likely as a rule says."""

    def found(_: Any, __: Any, texts: Sequence[Sequence[int]]) -> Any:
        return np.array([rule(by_byte.decode(text)) for text in texts])

    return found


def is_true(text: str) -> float:
    """Whether the last line of sums is right."""
    last = text.strip().splitlines()[-1].strip(".")
    for sign, does in (("plus", "+"), ("minus", "-"), ("times", "*")):
        last = last.replace(f" {sign} ", does)
    left, _, right = last.replace(" is ", "=").partition("=")
    return float(eval(left) == int(right))


def repeats(text: str) -> float:
    """How often a pair of letters comes again."""
    two = [text[i : i + 2] for i in range(len(text) - 1)]
    return float(len(two) - len(set(two)))


def says_again(text: str) -> float:
    """Whether a sentence comes again."""
    told = [part.strip() for part in text.split(".") if part.strip()]
    return float(len(told) - len(set(told)))


@pytest.mark.parametrize(
    ("asked", "rule"),
    [("arithmetic", is_true), ("addition", is_true), ("recall", says_again), ("induction", repeats), ("copying/8", repeats)],
)
def test_who_can_do_it_gets_every_item_right(asked: str, rule: Callable[[str], float], monkeypatch: pytest.MonkeyPatch) -> None:
    by_byte = tokenizer("byte")
    made = model(257, "model.context_length=128")
    monkeypatch.setattr(probes, "log_likelihoods", likely_by(rule, by_byte))
    for score in probes.probe(made, by_byte, [asked]):
        assert score.value > (0.85 if rule is repeats else 0.999), score  # letters between may repeat by chance, too
    monkeypatch.setattr(probes, "log_likelihoods", likely_by(lambda text: 0.0, by_byte))
    for score in probes.probe(made, by_byte, [asked]):
        assert score.value == pytest.approx(score.chance), "who holds all for equally likely gets what guessing does"
        assert score.error == pytest.approx(0)


def test_a_fact_has_one_right_answer() -> None:
    for language in ("english", "german"):
        found = skills.facts(language)
        assert len({texts[0] for texts in found}) == len(found) > 40
        for texts in found:
            assert len(set(texts)) == skills.CHOICES


@pytest.mark.parametrize("begin", [[256], []])
def test_the_likelihood_of_a_text_is_that_of_its_tokens(begin: list[int]) -> None:
    by_byte = tokenizer("byte")
    made = model(257)
    texts = [tuple(by_byte.encode((TEXT * 2)[:n]).tolist()) for n in (2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 3)]
    found = probes.log_likelihoods(made, begin, texts)
    for text, value in zip(texts, found, strict=True):
        expected = -sum(loss for _, loss in alone(made, [*begin, *text], CONTEXT // 2))
        assert value == pytest.approx(expected, abs=1e-4)


def test_what_a_tokeniser_cannot_write_is_counted() -> None:
    letters = tokenizer("char")
    letters.fit(["".join(sorted({c for name in pairs.PHENOMENA for pair in pairs.pairs(name) for s in pair for c in s} - set("äöüß")))])
    made = model(letters.vocabulary)
    by_name = {score.task: score for score in probes.probe(made, letters, ["english", "german", "addition"])}
    assert by_name["english"].skipped == 0
    assert "addition/1" not in by_name
    german = sum(any(c in "äöüß" for sentence in pair for c in sentence) for name in pairs.PHENOMENA for pair in pairs.pairs(name))
    assert by_name["german"].skipped == german > 0
    assert by_name["german"].examples + german == sum(len(pairs.pairs(name)) for name in pairs.PHENOMENA if name.startswith("german"))
    one = by_name["english/agreement"]
    assert one.error == pytest.approx((one.value * (1 - one.value) / (one.examples - 1)) ** 0.5, rel=0.05)
    with pytest.raises(ConfigError, match=r"probes addition: the tokeniser cannot write a single one of their texts"):
        probes.probe(made, letters, ["addition"])
    with pytest.raises(ConfigError, match=r"probes 'germna': no such probe.*german"):
        probes.probe(made, letters, ["germna"])
    assert share("t", [1.0, 0.0, 1.0, 1.0]).error == pytest.approx((0.75 / 3 / 4) ** 0.5)


@pytest.mark.parametrize("recipe", ["bigram", "average", "nano"])
def test_any_model_can_be_asked(recipe: str) -> None:
    torch.manual_seed(0)
    letters = tokenizer("char")
    found = probes.probe(
        model(letters.vocabulary, f"model={recipe}") if recipe == "nano" else _small(recipe, letters), letters, ["induction"]
    )
    assert 0 <= found[0].value <= 1


def _small(recipe: str, letters: Any) -> Any:
    from gptlab.model.transformer import new_model

    config = compose([f"model={recipe}", "model.width=32", "model.heads=2", f"model.context_length={CONTEXT}"]).model
    return new_model(config, letters.vocabulary, seed=0).eval()


def test_the_command_shows_and_keeps_them(corpus_file: Path, gptlab: Callable[..., Any]) -> None:
    run: Run = train(compose(tiny(corpus_file, "data/tokenizer=byte", "study=asked"))).run
    shown = gptlab("evaluate", run.identity, "--probes", "english,induction", "--limit", "4")
    assert shown.code == 0, shown.err
    assert "english/agreement" in shown.out
    assert "± a standard error" in shown.out
    assert "nothing left of" not in shown.out
    far = gptlab("evaluate", run.identity, "--probes", "copying", "--limit", "2")
    assert "nothing left of copying/16, copying/32, copying/64, copying/128: " in " ".join(far.out.split()), "its context is 16"
    told = json.loads(gptlab("evaluate", run.identity, "--probes", "all", "--limit", "3", "--json").out)
    (scores,) = told.values()
    assert {score["task"] for score in scores} >= {"english", "german", "facts/german", "addition/3", "copying/4", "recall/english"}
    assert {score["task"]: score["value"] for score in scores} == {score.task: score.value for score in kept(run).values()}
    for more, said in (
        (["--probes", "inductoin"], "no such probe"),
        (["--probes", "all", "--text", str(corpus_file)], "--tasks and --probes go without --text"),
        (["--limit", "3"], "--limit goes with --tasks, --probes and --chats"),
    ):
        refused = gptlab("evaluate", run.identity, *more)
        assert (refused.code, said in refused.err, len(refused.err.strip().splitlines())) == (2, True, 1), refused.err
