"""Tokenisers: what is encoded is decoded the same, and what is unknown is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.registry import build, component, load_components
from gptlab.data.tokenizer import CharTokenizer, Tokenizer, digest, from_json, to_json

load_components()
NASTY = [
    "",
    " ",
    "\n\n \n",
    "a",
    "\r\n\tx\r\n",
    "<|endoftext|>",
    "don't  stop… 日本語\u3000テキスト émoji 👩‍👩‍👧 \u200b ½ Ⅷ ² \x00\x1c\x85\xa0",
    "e\u0301" * 5,
    "नमस्ते दुनिया",
]
TIKTOKEN = ["gpt2", "cl100k", "o200k"]


def make(name: str, text: str = "") -> Tokenizer:
    tokenizer: Tokenizer = build(component("data/tokenizer", name).options())
    tokenizer.fit([text])
    return tokenizer


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("name", ["char", "byte", *TIKTOKEN])
def test_decoding_gives_the_text_back(name: str, text: str, tiktoken_cache: Path) -> None:
    tokenizer = make(name, text)
    ids = tokenizer.encode(text)
    assert ids.dtype.name == "uint32"
    assert tokenizer.decode(ids.tolist()) == text
    assert not len(ids) or int(ids.max()) < tokenizer.vocabulary
    again = from_json(to_json(tokenizer), "tokenizer.json")
    assert again.encode(text).tolist() == ids.tolist()
    assert digest(to_json(again)) == digest(to_json(tokenizer))


def test_vocabulary_sizes_and_borders_are_the_published_ones(tiktoken_cache: Path) -> None:
    found = {name: (make(name).vocabulary, make(name).end_of_text) for name in ("byte", *TIKTOKEN)}
    assert found == {"byte": (257, 256), "gpt2": (50257, 50256), "cl100k": (100277, 100257), "o200k": (200019, 199999)}


def test_a_special_token_in_a_text_is_plain_text(tiktoken_cache: Path) -> None:
    for name in TIKTOKEN:
        tokenizer = make(name)
        assert tokenizer.end_of_text not in tokenizer.encode("a<|endoftext|>b").tolist()


def test_an_unknown_character_is_named_with_its_place_and_what_is_known() -> None:
    tokenizer = make("char", "abc\n")
    with pytest.raises(ConfigError) as error:
        tokenizer.encode("abXc")
    assert str(error.value) == "the character 'X' at place 3 is not among the 4 characters the tokeniser knows: abc"
    with pytest.raises(ConfigError, match="'\\\\U0010ffff' at place 1"):
        tokenizer.encode("\U0010ffff")


def test_the_characters_do_not_depend_on_the_order_they_were_met_in() -> None:
    one, two = CharTokenizer(), CharTokenizer()
    one.fit(["ab", "cz"])
    two.fit(["zcb", "a"])
    assert digest(to_json(one)) == digest(to_json(two))
    assert one.encode("abcz").tolist() == [0, 1, 2, 3]


def test_broken_bytes_decode_to_the_replacement_character(tiktoken_cache: Path) -> None:
    assert make("byte").decode([0xE2, 0x82]) == "\ufffd"
    assert make("byte").decode([104, 256, 105]) == "hi"
    gpt2 = make("gpt2")
    assert "\ufffd" in gpt2.decode(gpt2.encode("日").tolist()[:1])


def test_a_tokeniser_of_another_version_or_size_is_refused() -> None:
    data = to_json(make("char", "abc"))
    with pytest.raises(DataError, match=r"tokenizer\.json: tokeniser version 2; this gptlab reads version 1"):
        from_json({**data, "version": 2}, "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer\.json: 4 tokens written, 3 read back"):
        from_json({**data, "vocabulary": 4}, "tokenizer.json")
    with pytest.raises(ConfigError, match=r"data/tokenizer=charr is not registered \(did you mean char\?\)"):
        from_json({**data, "name": "charr"}, "tokenizer.json")


def test_a_vocabulary_that_cannot_be_fetched_says_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken.load
    import tiktoken.registry

    def refuse(*_: object) -> bytes:
        raise OSError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    with pytest.raises(IOFailure, match=r"data/tokenizer=cl100k: .*OSError.*TIKTOKEN_CACHE_DIR.*data/tokenizer=byte") as error:
        make("cl100k")
    assert error.value.code == 74
