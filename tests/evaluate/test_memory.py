"""The longest common stretch is the one that a plain search finds; a text that was trained on is told from one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError
from gptlab.data import ngrams
from gptlab.data.prepare import prepare
from gptlab.evaluate.memory import contamination, longest, memorised
from tests.tiny import tiny


class Tokens:
    """A stream of tokens that lie in memory."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = np.asarray(tokens, np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, start: int, length: int) -> Any:
        return self.tokens[start : start + length]


def by_search(text: list[int], row: list[int]) -> int:
    """Length of the longest common stretch, by trying them all."""
    inside = {n: {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} for n in range(1, len(row) + 1)}
    return max((n for n in inside for i in range(len(row) - n + 1) if tuple(row[i : i + n]) in inside[n]), default=0)


@pytest.mark.parametrize("stretch", [7, 64, 1 << 20])
def test_the_longest_stretch_is_the_one_a_plain_search_finds(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "STRETCH", stretch)  # over the borders of parts, too
    draw = np.random.default_rng(0)
    text, other = draw.integers(0, 6, 300).tolist(), draw.integers(0, 6, 100).tolist()
    rows = [draw.integers(0, 6, n).tolist() for n in (1, 5, 40)]
    rows += [[9, *text[100:131], 9], text[-20:], other[:33], [9, 9], text[:50]]
    found = longest([Tokens(text), Tokens(other)], [np.array(row) for row in rows])  # type: ignore[list-item]
    for (length, place), row in zip(found, rows, strict=True):
        assert length == max(by_search(text, row), by_search(other, row)), row
        copied = row[place : place + length]
        assert any(copied == whole[i : i + length] for whole in (text, other) for i in range(len(whole) - length + 1))


def test_hashes_of_stretches_are_equal_where_the_stretches_are() -> None:
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, 3, 2000)
    for n in (1, 2, 5, 9):
        found = ngrams.hashes(tokens, n)
        assert len(found) == len(tokens) - n + 1
        parts = {}
        for i, value in enumerate(found.tolist()):
            assert parts.setdefault(value, tuple(tokens[i : i + n])) == tuple(tokens[i : i + n])
        assert len(parts) == len({tuple(tokens[i : i + n]) for i in range(len(found))})
    assert len(ngrams.hashes(tokens[:3], 4)) == 0


def test_what_was_trained_on_is_told_from_what_was_not(corpus_file: Path, gptlab: Callable[..., Any], tmp_path: Path) -> None:
    run = train(compose(tiny(corpus_file, "study=heart"))).run
    loaded, text = load(run), corpus_file.read_text()
    data = prepare(loaded.config.data)
    words = text.split()
    inside = " ".join(words[50:70])
    unknown = " ".join(["unseen", *words[50:62], "unseen", *words[70:82], "unseen"])  # twelve of its words in a row, and not thirteen
    found = contamination(data, [inside.upper().replace(" ", ", "), unknown, "too short"])
    assert (found.examples, found.examples_seen, found.too_short) == (2, 1, 1)
    assert (found.ngrams, found.ngrams_seen) == (20 - 12 + 27 - 12, 8)
    assert contamination(data, [unknown], 12).ngrams_seen == 2
    with pytest.raises(ConfigError, match=r"--ngram 13: no text has so many words; --ngram 2 is the longest"):
        contamination(data, ["too short"])
    rows = memorised(loaded.model, data, temperatures=(0.5, 1.0), samples=2, tokens=12)
    assert [row.source for row in rows] == ["temperature 0.5", "temperature 1", "the held-out text"]
    for row in rows:
        assert row.text in text
        assert row.longest == len(row.text) >= row.mean >= 1
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in (inside, unknown)))
    shown = gptlab("evaluate", run.identity, "--contamination", "--text", str(file))
    assert shown.code == 0, shown.err
    assert "1 (50.0%)" in shown.out
    (told,) = json.loads(gptlab("evaluate", run.identity, "--contamination", "--text", str(file), "--json").out)
    assert (told["text"], told["share_of_examples"]) == ("examples.jsonl", 0.5)
    for more, said in (
        (["--contamination"], "--contamination needs --text FILE"),
        (["--memorised", "--text", str(file)], "--memorised looks at what the run itself writes"),
        (["--contamination", "--probes", "all"], "go without --tasks, --probes"),
        (["--ngram", "5"], "--ngram goes with --contamination"),
        (["--contamination", "--text", str(file), "--ngram", "0"], "--ngram 0 must be at least 1"),
    ):
        refused = gptlab("evaluate", run.identity, *more)
        assert (refused.code, said in refused.err) == (2, True), refused.err


def test_a_task_has_no_text_to_have_by_heart() -> None:
    run = train(
        compose(["data=copy", "model.width=16", "model.depth=1", "model.heads=2", "trainer.budget=2steps", "tracker=none", "study=made"])
    ).run
    loaded = load(run)
    with pytest.raises(ConfigError, match=r"data/corpus=copy makes its rows on the fly"):
        memorised(loaded.model, prepare(loaded.config.data))
