"""Any tokeniser with the tokens of a chat behind its own: its own ids stay, a text never holds the new ones, and it is read back whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component, load_components
from gptlab.data.chat import Message, chat_format, render
from gptlab.data.chat_tokens import TEMPLATES, chat
from gptlab.data.tokenizer import CharTokenizer, Tokenizer, from_json, to_json
from tests.data.test_chat_format import TALK

load_components()


def base_file(folder: Path, name: str) -> str:
    """A tokeniser that has learned something, as a file."""
    if name in ("byte", "gpt2"):
        return name
    text = "".join(message.content for message in TALK) + "User: Assistant:\nsystemipython\n abcdefghijklmnopqrstuvwxyz" * 40
    if name == "char":
        made: Any = CharTokenizer()
    else:
        pytest.importorskip("rustbpe")
        made = build(component("data/tokenizer", "bpe").options(vocabulary=300, special_tokens=["<|endoftext|>", "<|im_start|>"]))
    made.fit([text])
    file = folder / f"{name}.json"
    file.write_text(json.dumps(to_json(made)))
    return str(file)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["byte", "char", "bpe", "gpt2"])
def test_the_bases_ids_stay_and_the_new_ones_follow(name: str, template: str, tmp_path: Path, tiktoken_cache: Path) -> None:
    if template == "plain" and name == "char":
        with pytest.raises(ConfigError, match="template=plain ends an answer with the end-of-text token"):
            chat(base=base_file(tmp_path, name), template=template)
        return
    made = chat(base=base_file(tmp_path, name), template=template)  # type: ignore[arg-type]
    base = made.base
    text = "Be brief. <|im_end|>" if name != "char" else "Be brief."
    assert made.encode(text).tolist() == base.encode(text).tolist()
    assert made.encode(text).max() < base.vocabulary
    assert made.decode(made.encode(text).tolist()) == text
    assert sorted(made.added.values()) == list(range(base.vocabulary, made.vocabulary))
    assert len(made.byte_lengths()) == made.vocabulary
    assert not made.byte_lengths()[base.vocabulary :].any()
    if name == "bpe" and template == "chatml":
        assert list(made.added) == ["<|im_end|>"], "one that it has is not added again"
    found = chat_format(made)
    assert found is not None
    assert found.name == template
    rendered = render(TALK, made)
    again: Tokenizer = from_json(json.loads(json.dumps(to_json(made))), "here")
    assert render(TALK, again).tokens == rendered.tokens
    assert again.decode(rendered.tokens) == made.decode(rendered.tokens)


def test_plain_words_stand_around_the_messages() -> None:
    made = chat(base="byte", template="plain")
    told = render(TALK[:3], made, answer=False)
    spelt = "".join("⏹" if i == 256 else chr(i) for i in told.tokens)
    assert spelt == "Be brief.\nUser:\nHi\nAssistant:\nHello⏹"
    own = [i for i, written in zip(told.tokens, told.written, strict=True) if written]
    assert own == [*b"Hello", 256]
    found = chat_format(made)
    assert found is not None
    assert found.ends == {256}


def test_a_tools_word_has_a_place_in_every_format() -> None:
    talk = [Message("user", "a"), Message("assistant", "b"), Message("tool", "c"), Message("assistant", "d")]
    for template, marks in (("chatml", "tool\nc"), ("llama3", "ipython<|end_header_id|>\n\nc"), ("gptlab", "<|user_start|>c<|user_end|>")):
        made = chat(base="byte", template=template)  # type: ignore[arg-type]
        assert marks in made.decode(render(talk, made, answer=False).tokens)


def test_a_base_that_takes_a_chats_token_for_text_is_refused(tmp_path: Path) -> None:
    package = pytest.importorskip("tokenizers")
    made = package.Tokenizer(package.models.BPE())
    made.pre_tokenizer, made.decoder = package.pre_tokenizers.ByteLevel(add_prefix_space=False), package.decoders.ByteLevel()
    letters = package.pre_tokenizers.ByteLevel.alphabet()
    trainer = package.trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=["<|endoftext|>"])
    made.train_from_iterator(["hello world"] * 10, trainer)
    made.add_tokens([package.AddedToken("<|im_end|>", special=False)])
    file = tmp_path / "tokenizer.json"
    made.save(str(file))
    with pytest.raises(ConfigError, match=r"takes <\|im_end\|> for text \(token \d+\).*mark it as special"):
        chat(base=str(file), template="chatml")
    assert chat(base=str(file), template="gptlab").added, "another template's are not in the way"


def test_a_base_that_is_no_tokeniser_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer\.base=gtp2 is neither a tokeniser that needs no training \(byte, cl100k, gpt2, o200k\)"
    ):
        chat(base="gtp2")
    with pytest.raises(ConfigError, match="there is no file"):
        chat(base=str(tmp_path / "missing.json"))
