"""Sizes, texts that excite units, and embeddings, against the same written out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gptlab import load
from gptlab.config.errors import ConfigError
from gptlab.config.schema import Config
from gptlab.data.tokenizer import gpt2
from gptlab.interpret import analogy, capture, neighbours, norms, position_similarity, rows_of, top_texts
from gptlab.interpret.given import token_of
from gptlab.interpret.sizes import collect
from gptlab.runner.load import Loaded
from gptlab.runner.run import Run
from tests.conftest import sentences
from tests.interpret.conftest import PARTS, small, some_tokens


@pytest.fixture
def run(finished_run: Run) -> Loaded:
    return load(finished_run)


def test_norms_are_those_of_the_activations() -> None:
    model, tokens = small(**PARTS["gpt2"]), some_tokens()
    frame = norms(model, tokens).set_index("name")
    x = capture(model, tokens, "blocks.1.attention")["blocks.1.attention"]
    line = frame.loc["blocks.1.attention"]
    assert line.layer == 1
    assert line.norm == pytest.approx(float(x.norm(dim=-1).mean()))
    assert line.rms == pytest.approx(float((x**2).mean() ** 0.5))
    assert line.largest == pytest.approx(float(x.abs().max()))
    assert frame.loc["embedded"].layer == -1
    assert len(norms(small(**PARTS["no norm, no ffn"]), tokens)) == 7, "no feed-forward writes nothing that has a size"
    scores = capture(model, tokens, "blocks.1.attention.scores")["blocks.1.attention.scores"]
    seen = scores[scores > -torch.inf]
    line = norms(model, tokens, "blocks.1.attention.scores").iloc[0]
    assert (line.rms, line.largest) == pytest.approx((float((seen**2).mean() ** 0.5), float(seen.abs().max())))
    with pytest.raises(ConfigError, match="gives no activation"):
        norms(model, tokens, "position")


def test_top_texts_are_those_of_the_largest_values(run: Loaded) -> None:
    tokens = rows_of(run, sentences(60))
    assert tokens.shape[1] == 16
    assert run.tokenizer.decode(tokens[:2].flatten().tolist()) == sentences(60)[:32]
    name = "blocks.0.ffn.hidden"
    values = collect(run, tokens, name)
    torch.testing.assert_close(values[:3], capture(run, tokens[:3], name)[name])
    frame = top_texts(run, tokens, name, [5, 0], top=3)
    assert list(frame.unit) == [5, 5, 5, 0, 0, 0]
    rows = values[..., 5].max(1).values
    assert frame.activation[0] == pytest.approx(float(rows.max()))
    assert frame.activation[2] == pytest.approx(float(rows.sort(descending=True).values[2]))
    for line in frame.itertuples():
        assert float(values[line.row, line.position, line.unit]) == pytest.approx(line.activation)
        text = run.tokenizer.decode(tokens[line.row].tolist())
        assert line.token == text[line.position]
        assert line.before == text[: line.position]
        assert line.after == text[line.position + 1 : line.position + 9]
    double = top_texts(run, tokens, name, [0], top=1, through=lambda x: 2 * x[..., 5:6])
    assert double.activation[0] == pytest.approx(2 * frame.activation[0])


def test_neighbours_and_analogies_are_cosines(run: Loaded) -> None:
    weight = F.normalize(run.model.embedding.weight.detach(), dim=-1)
    a, b, c = (int(run.tokenizer.encode(letter)[0]) for letter in "abd")
    frame = neighbours(run, "a", top=4)
    others = weight @ weight[a]
    others[a] = -1
    assert frame.token[0] == int(others.argmax())
    assert frame.text[0] == run.tokenizer.decode([frame.token[0]])
    assert frame.cosine[0] == pytest.approx(float(others.max()), abs=1e-6)
    assert list(frame.cosine) == sorted(frame.cosine, reverse=True)
    assert frame.equals(neighbours(run, a, top=4))
    made = analogy(run, "a - b + d", top=100)
    aim = F.normalize(weight[a] - weight[b] + weight[c], dim=-1)
    assert len(made) == run.model.vocabulary - 3
    assert made.equals(analogy(run, "a \u2212 b + d", top=100)), "a minus as it is printed"
    for line in made.itertuples():
        assert line.token not in (a, b, c)
        assert line.cosine == pytest.approx(float(weight[line.token] @ aim), abs=1e-6)


def test_a_word_is_its_token_behind_a_space(tiktoken_cache: Path) -> None:
    tokenizer = gpt2()
    model = Loaded(None, Config(), small(), tokenizer)
    assert tokenizer.decode([token_of(model, "king", as_word=True)]) == " king"
    assert tokenizer.decode([token_of(model, "king")]) == "king"
    assert tokenizer.decode([token_of(model, "Paris", as_word=True)]) == " Paris"
    with pytest.raises(ConfigError, match="'Vater' is 2 tokens of the tokeniser gpt2, and a single one"):
        token_of(model, "Vater", as_word=True)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_similarity_of_positions(position: str) -> None:
    model = small(position=position)
    found = position_similarity(model)
    with torch.no_grad():
        nothing = torch.zeros(1, 16, 24)
        table = F.normalize(model.position.embed(nothing, torch.arange(16)[None])[0], dim=-1)
    torch.testing.assert_close(found, table @ table.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(16))
    assert position_similarity(model, 5).shape == (5, 5)


def test_what_has_no_answer_is_told(run: Loaded) -> None:
    for position in ("rotary", "alibi", "t5"):
        with pytest.raises(ConfigError, match=f"model/position={position} adds no embedding"):
            position_similarity(small(position=position))
    with pytest.raises(ConfigError, match="'king' is 4 tokens of the tokeniser char"):
        analogy(run, "king - a")
    for wrong in ("", "a -", "a b", "a - + b"):
        with pytest.raises(ConfigError, match="is no analogy"):
            analogy(run, wrong)
    with pytest.raises(ConfigError, match="there is no token 9999"):
        neighbours(run, 9999)
    with pytest.raises(ConfigError, match="a view of embeddings needs a tokeniser"):
        neighbours(run.model, 1)
    tokens = rows_of(run, sentences(10))
    with pytest.raises(ConfigError, match=r"has 64 units, from 0 to 63; there is no 64"):
        top_texts(run, tokens, "blocks.0.ffn.hidden", [64])
    with pytest.raises(ConfigError, match="is no row of units a token"):
        top_texts(run, tokens, "blocks.0.attention.pattern", [0])
    with pytest.raises(ConfigError, match="is no row of units a token"):
        top_texts(run, tokens, "position.table", [0])  # one row for all of the corpus
    with pytest.raises(ConfigError, match="no such activation"):
        top_texts(run, tokens, "blocks.*.nothing", [0])
    for silent in ("position", "positio[n]"):
        with pytest.raises(ConfigError, match="gives no activation"):
            top_texts(run, tokens, silent, [0])
    with pytest.raises(ConfigError, match="rows of 40 tokens cannot be cut"):
        rows_of(run, sentences(10), length=40)
    with pytest.raises(ConfigError, match="is no vector a token"):
        collect(dataclasses.replace(run, model=small(**PARTS["experts"])), some_tokens(3, 7), "blocks.0.ffn.slots")
