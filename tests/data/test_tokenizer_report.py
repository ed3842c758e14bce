"""The tokeniser report: every figure checked by hand on a tiny text, and what is printed says it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from gptlab.cli import data_tokenizer as cli
from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import build, component, load_components
from gptlab.data import bpe
from gptlab.data.bpe import BPETokenizer
from gptlab.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, gpt2
from gptlab.data.tokenizer_report import Share, TokenFigure, compare, describe, measure, take, token_texts
from tests.conftest import sentences

load_components()
BPE = component("data/tokenizer", bpe.BPETokenizer.name).options


def tiny() -> BPETokenizer:
    """256 bytes, `ab` (256), ` ab` (257), `abab` (258), ` abab` (259) and seven special tokens, in some order of the four."""
    pytest.importorskip("rustbpe")
    made = BPETokenizer(vocabulary=267)
    made.fit(["abab abab ab"])
    return made


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was printed since the last call, on a console of 100 columns without colour."""
    file = io.StringIO()
    console = Console(file=file, width=100, highlight=False, soft_wrap=True)
    monkeypatch.setattr(cli, "console", console)
    monkeypatch.setattr("gptlab.tracker.console.console", console)

    def since() -> str:
        text = file.getvalue()
        file.seek(0)
        file.truncate()
        return text

    return since


def test_the_figures_of_a_text_are_counted() -> None:
    figures = describe(take(["ab ba\n", "äb"]))
    assert (figures.bytes, figures.characters, figures.words, figures.whole) == (9, 8, 3, True)
    assert figures.distinct_characters == 5  # a b space newline ä
    # ab, b·, ·b, ba, a↵ and äb: none reaches from one text into the next
    assert figures.character_pairs == Share(6, 25)
    assert figures.character_pairs.share == 0.24


def test_the_figures_of_a_tokeniser_are_counted() -> None:
    made = tiny()
    text = "abab ab é abab"  # abab, ·ab, ·, é in two bytes, ·abab
    assert token_texts(made, text) == ["abab", " ab", " ", "\\xc3", "\\xa9", " abab"]
    found = measure("mine", made, take([text, "ab"]))
    assert (found.name, found.vocabulary, found.tokens) == ("mine", 267, 7)
    assert found.bytes_per_token == 17 / 7
    assert found.characters_per_token == 16 / 7
    assert found.tokens_per_word == 7 / 5
    assert found.single_byte == Share(3, 7)
    assert found.unused == Share(260 - 7, 260)
    assert found.token_pairs == Share(5, 260**2)
    assert found.speed > 0
    assert {t.count for t in found.most_frequent} == {1}
    assert len(found.most_frequent) == 7
    assert [t.text for t in found.longest] == []  # none has four different characters
    assert found.unused_examples[0] == TokenFigure(0, "\x00", 0)
    assert found.unused_examples[-1] == TokenFigure(255, "\\xff", 0)


def test_the_most_frequent_come_first_and_the_longest_are_no_rules() -> None:
    pytest.importorskip("rustbpe")
    made = BPETokenizer(vocabulary=300)
    made.fit(["-------- kingdom " * 20 + sentences(20)])
    found = measure("mine", made, take(["-------- kingdom kingdom night " + "z" * 9]), examples=3)
    assert (found.most_frequent[0].text, found.most_frequent[0].count) == ("z", 9)
    assert (found.longest[0].text, found.longest[0].count) == (" kingdom", 2)
    assert len(found.unused_examples) == 3
    assert "--------" not in [t.text for t in found.longest]


def test_figures_hold_for_every_kind_of_tokeniser(tiktoken_cache: Path) -> None:
    text = "Zwölf ab\n"
    char = CharTokenizer()
    char.fit([text])
    found = {f.name: f for f in compare({"char": char, "byte": ByteTokenizer(), "gpt2": gpt2()}, take([text]))}
    assert list(found) == ["char", "byte", "gpt2"]
    assert found["char"].unused == Share(0, 9)
    assert (found["char"].bytes_per_token, found["char"].single_byte) == (10 / 9, Share(8, 9))
    assert (found["byte"].bytes_per_token, found["byte"].single_byte) == (1.0, Share(10, 10))
    assert found["byte"].unused == Share(246, 256)  # the end of text is no ordinary token
    assert found["gpt2"].unused.possible == 50256
    assert found["gpt2"].tokens == len(gpt2().encode(text))


def test_tiny_shakespeare_covers_a_third_of_its_character_pairs(shared_text: Callable[[str], Path]) -> None:
    text = shared_text("tinyshakespeare.txt").read_text()
    figures = describe(take([text]))
    assert (figures.characters, figures.distinct_characters, figures.words) == (1_115_394, 65, 202_651)
    assert figures.character_pairs == Share(len(set(pairwise(text))), 4225)


def test_no_more_is_read_than_the_limit() -> None:
    asked = 0

    def plenty() -> Iterator[str]:
        nonlocal asked
        for _ in range(9):
            asked += 1
            yield "abcé"  # five bytes

    sample = take(plenty(), limit=14)  # two bytes are left for a third text's é, which takes its last place whole or not at all
    assert (sample.texts, sample.bytes, sample.whole, asked) == (("abcé", "abcé", "abc"), 13, False, 3)
    assert take(["abcé"], limit=5).whole
    assert not take(["abcé", "x"], limit=5).whole
    with pytest.raises(DataError, match="no text to report on"):
        take(["", ""])


def test_the_report_of_one_tokeniser_says_its_figures(printed: Callable[[], str]) -> None:
    cli.report(["abab ab é abab"], {"mine": tiny()}, show="ab\n[bold]", as_json=False)
    lines = [" ".join(line.split()) for line in printed().splitlines()]
    assert "text 15 bytes, 14 characters (4 distinct), 4 words" in lines
    assert "6 of the 16 possible pairs of its characters stand side by side (37.5%)" in lines
    for line in (
        "vocabulary 267 tokens, special ones included",
        "tokens 6 that the text becomes",
        "bytes per token 2.50 1 is no compression",
        "characters per token 2.33",
        "tokens per word 1.50 a word is what white space separates",
        "single-byte tokens 50.0% 3 of the text's tokens",
        "unused tokens 97.7% 254 of 260 never occur in the text",
        "mine 8 tokens for 9 characters",
        "ab│↵",
        "[│b│o│l│d│]",
    ):
        assert line in lines, line
    assert max(map(len, lines)) <= 100


def test_the_report_of_several_compares_them_and_skips_what_cannot_be_shown(printed: Callable[[], str]) -> None:
    char = CharTokenizer()
    char.fit(["abab"])
    cli.report(["abab"], {"mine": tiny(), "byte": ByteTokenizer(), "char": char}, show="abé", as_json=False)
    said = printed()
    assert [line.split()[:4] for line in said.splitlines() if line.split()[1:2] in (["267"], ["257"], ["2"])] == [
        ["mine", "267", "1", "4.00"],
        ["byte", "257", "4", "1.00"],
        ["char", "2", "4", "1.00"],
    ]
    assert "ab│\\xc3│\\xa9" in said
    assert "the character 'é' at place 3 is not among" in said
    assert max(map(len, said.splitlines())) <= 100


def test_the_report_as_json_has_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny()
    cli.report(["abab ab"], {"mine": made, "byte": ByteTokenizer()}, show="", as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["text"]["characters"] == 7
    assert [t["name"] for t in said["tokenizers"]] == ["mine", "byte"]
    assert said["tokenizers"][0]["single_byte"] == {"found": 0, "possible": 2}
    assert said["tokenizers"][0]["most_frequent"][0]["count"] == 1
    with pytest.raises(ConfigError, match="a report needs a tokeniser"):
        cli.report(["a"], {}, show="", as_json=True)


def test_tokens_side_by_side_differ_in_colour_and_hide_no_white_space() -> None:
    tokens = ["a", " b", "\t", "\n", "\u200b", "c d\n"]
    plain, bright = cli.coloured(tokens, colour=False), cli.coloured(tokens, colour=True)
    assert plain.plain == "a│·b│→│↵\n\\u200b│c·d↵\n"
    assert bright.plain == "a·b→↵\n\\u200bc·d↵\n"
    colours = [span.style for span in bright.spans]
    assert len(colours) == len(tokens)
    assert all(a != b for a, b in pairwise(colours))
    assert cli.short("-" * 40) == "- × 40"
    assert cli.short(" " + "x" * 40) == "·" + "x" * 22 + "…"


def test_an_excerpt_is_short_and_ends_with_a_word() -> None:
    assert cli.excerpt("\n\nA few words.\n") == "A few words."
    assert cli.excerpt("word " * 200) == ("word " * 60).strip()
    assert cli.excerpt("x" * 1000) == "x" * 300
    assert cli.excerpt("a\n" * 50) == "a\n" * 7 + "a"


def test_what_is_trained_is_written_and_read_again(tmp_path: Path, printed: Callable[[], str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rustbpe")
    options = BPE(vocabulary=300)  # type: ignore[call-arg]
    file = tmp_path / "new" / "mine.json"
    made: Tokenizer = build(options)
    cli.train([sentences(50)] * 2, made, options, out=file, as_json=False)
    said = printed()
    assert re.search(rf"bpe 300 tokens, learned in \d\.\d s from 4\.7 kB of text \({2 * len(sentences(50)):,} characters\)", said)
    assert "<|endoftext|>   <|system_start|>" in said
    assert "first learned   " in said
    again = cli.read(file)
    assert again.vocabulary == 300
    assert again.encode("a small king").tolist() == made.encode("a small king").tolist()
    cli.train([sentences(50)], made, options, out=file, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["file"], told["vocabulary"], told["characters"]) == (str(file), 300, len(sentences(50)))
    assert told["file_bytes"] == file.stat().st_size
    assert [f.name for f in file.parent.iterdir()] == ["mine.json"]


def test_what_cannot_be_trained_written_or_read_is_told(tmp_path: Path, printed: Callable[[], str]) -> None:
    options = component("data/tokenizer", "byte").options()
    with pytest.raises(ConfigError, match="data/tokenizer=byte has nothing to learn"):
        cli.train(["a"], ByteTokenizer(), options, out=tmp_path / "x.json", as_json=False)
    char = component("data/tokenizer", "char").options()
    (tmp_path / "file").write_text("")
    with pytest.raises(IOFailure, match="could not be written"):
        cli.train(["a"], build(char), char, out=tmp_path / "file" / "x.json", as_json=False)
    with pytest.raises(IOFailure, match=r"none\.json could not be read"):
        cli.read(tmp_path / "none.json")
    for content in ("", "[]", "{}", "\ufffd"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=r"bad\.json is not a tokeniser written by"):
            cli.read(tmp_path / "bad.json")
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
