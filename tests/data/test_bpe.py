"""One's own BPE: what it learns is what it encodes with, whoever trained it, and every text comes back."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import build, component, load_components
from gptlab.data import bpe, pipeline
from gptlab.data.amount import amount
from gptlab.data.bpe import CHAT_TOKENS, END_OF_TEXT, PATTERNS, BPETokenizer
from gptlab.data.tokenizer import Tokenizer, digest, from_json, to_json
from tests.conftest import sentences
from tests.data.test_shard import nasty
from tests.data.test_tokenizer import NASTY

load_components()
TRAINERS = ["rustbpe", "tokenizers"]
PUBLISHED = {"gpt2": "gpt2", "gpt4": "cl100k_base", "gpt4o": "o200k_base"}


def texts() -> list[str]:
    return [sentences(300), *nasty(), *NASTY]


def learned(trainer: str = "rustbpe", **options: Any) -> BPETokenizer:
    pytest.importorskip(trainer)
    made = BPETokenizer(**{"vocabulary": 600, "trainer": trainer, **options})
    made.fit(texts())
    return made


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_text_comes_back(trainer: str, pattern: str) -> None:
    made: Tokenizer = learned(trainer, pattern=pattern)
    for text in texts():
        ids = made.encode(text)
        assert ids.dtype.name == "uint32"
        assert made.decode(ids.tolist()) == text
    compressed = len(made.encode(sentences(300)))
    assert compressed < len(sentences(300)) / 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_ids_are_those_that_rustbpe_itself_gives(pattern: str) -> None:
    made = learned(pattern=pattern)
    trainer = pytest.importorskip("rustbpe").Tokenizer()
    trainer.train_from_iterator(iter(texts()), made.vocabulary - len(made.special), pattern=PATTERNS[pattern])
    for text in texts():
        assert made.encode(text).tolist() == trainer.encode(text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_ids_are_those_that_hugging_face_itself_gives(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("tokenizers")
    kept: list[Any] = []
    monkeypatch.setattr(package, "Tokenizer", lambda model, make=package.Tokenizer: kept.append(make(model)) or kept[0])
    made = learned("tokenizers", pattern=pattern)
    for text in texts():
        assert made.encode(text).tolist() == kept[0].encode(text).ids


def test_hugging_faces_letters_for_bytes_are_these() -> None:
    pytest.importorskip("tokenizers")
    from tokenizers.pre_tokenizers import ByteLevel

    table = bpe.byte_letters()
    assert sorted(table.values()) == list(range(256))
    assert set(table) == set(ByteLevel.alphabet())
    assert bytes(table[c] for c in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("ä \n😀")[0][0]) == "ä \n😀".encode()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_texts_are_split_as_the_models_the_patterns_are_named_for_split_them(pattern: str, tiktoken_cache: Path) -> None:
    import tiktoken

    theirs = tiktoken.get_encoding(PUBLISHED[pattern])
    ours = tiktoken.Encoding("ours", pat_str=PATTERNS[pattern], mergeable_ranks=theirs._mergeable_ranks, special_tokens={})
    for text in texts():
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_run_of_a_million_of_anything_is_encoded(pattern: str) -> None:
    made = learned(pattern=pattern)
    for letter, end in itertools.product((" ", "\t", "\r\n", "a", "^"), ("", "a")):
        text = letter * 1_000_000 + end
        assert made.decode(made.encode(text).tolist()) == text
    made.fit([" " * 1_000_000 + "a", *texts()])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_safe_cuts_leave_the_tokens_of_any_text_as_they_are(pattern: str) -> None:
    made = learned(pattern=pattern)
    cuts = 0
    for text in nasty():
        places = [m.start() for m in pipeline._CUT.finditer(text) if m.start()]
        cuts += len(places)
        parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        assert [t for part in parts for t in made.encode(part).tolist()] == made.encode(text).tolist()
    assert cuts > 2000


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_was_learned_is_restored_from_json_whatever_the_options(trainer: str) -> None:
    made = learned(trainer, pattern="gpt2", special_tokens=("<|x|>",))
    data = json.loads(json.dumps(to_json(made)))
    again = from_json(data, "tokenizer.json")
    assert digest(to_json(again)) == digest(data)
    assert (again.vocabulary, again.end_of_text) == (600, 598)
    assert isinstance(again, BPETokenizer)
    assert again.special == {END_OF_TEXT: 598, "<|x|>": 599}
    for text in texts():
        assert again.encode(text).tolist() == made.encode(text).tolist()
    options = component("data/tokenizer", "bpe").options(vocabulary=600, pattern="gpt2", special_tokens=["<|x|>"], trainer=trainer)
    fitted: Tokenizer = build(options)
    fitted.fit(texts())
    assert from_json(to_json(fitted, options), "tokenizer.json").encode("a king").tolist() == made.encode("a king").tolist()


def test_a_vocabulary_of_32768_is_less_than_a_megabyte_of_json(shared_text: Callable[[str], Path]) -> None:
    pytest.importorskip("rustbpe")
    made = BPETokenizer()
    made.fit([shared_text("enwiki_excerpt_clean.txt").read_text(encoding="utf-8")])
    assert len(json.dumps(made.state())) < 500_000
    assert made.vocabulary == 32768


def test_special_tokens_have_the_last_ids_and_come_from_no_text() -> None:
    made = learned()
    assert list(made.special.items()) == [(t, 593 + i) for i, t in enumerate((END_OF_TEXT, *CHAT_TOKENS))]
    assert made.end_of_text == 593
    said = "".join(made.special) * 3 + " ".join(made.special)
    made.fit([said * 50, *texts()])
    ids = made.encode(said)
    assert int(ids.max()) < 593
    assert made.decode(ids.tolist()) == said
    assert made.decode([593, 595]) == "<|endoftext|><|system_end|>"
    assert made.byte_lengths()[:256].tolist() == [1] * 256
    assert made.byte_lengths()[593:].tolist() == [0] * 7
    assert int(made.byte_lengths()[ids].sum()) == len(said.encode())
    assert b"".join(made.token_bytes(i) for i in ids.tolist()) == said.encode()


def test_lone_surrogates_become_the_replacement_character_when_learning_and_encoding() -> None:
    made = learned()
    made.fit(["\ud800", *texts()])
    assert made.decode(made.encode("a\ud800b\ud83d\ude00").tolist()) == "a\ufffdb😀"


def test_it_learns_from_no_more_characters_than_it_was_told() -> None:
    one, two = (BPETokenizer(vocabulary=300, characters="2k") for _ in range(2))
    asked = 0

    def plenty() -> Iterator[str]:
        nonlocal asked
        for _ in range(9):
            asked += 1
            yield sentences(40)[:900]

    one.fit(plenty())
    two.fit([sentences(40)[:900]] * 2 + [sentences(40)[:200]])
    assert asked == 3
    assert one.state() == two.state()


def test_threads_change_nothing() -> None:
    program = (
        "import json, sys; from gptlab.data.bpe import BPETokenizer; from gptlab.data.tokenizer import digest\n"
        "texts = json.load(sys.stdin)\n"
        "for trainer in ('rustbpe', 'tokenizers'):\n"
        "    made = BPETokenizer(vocabulary=600, trainer=trainer); made.fit(texts); print(digest(made.state()))"
    )
    expected = [digest(learned(trainer).state()) for trainer in TRAINERS]
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        run = subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(texts()), env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.split() == expected
    made = learned()
    with ThreadPoolExecutor(4) as pool:
        many = list(pool.map(lambda text: made.encode(text).tolist(), texts() * 4))
    assert many == [made.encode(text).tolist() for text in texts()] * 4


@pytest.mark.parametrize("trainer", TRAINERS)
def test_too_little_text_says_how_many_tokens_it_supports(trainer: str) -> None:
    pytest.importorskip(trainer)
    text = "abab abab ab"
    with pytest.raises(ConfigError) as error:
        BPETokenizer(trainer=trainer).fit([text])  # type: ignore[arg-type]
    # ab, " ab", abab and " abab" can be learned: 256 + 4 + 7
    assert str(error.value) == (
        "data.tokenizer.vocabulary=32768: the 12 characters it learns from hold only 267 tokens; "
        "set data.tokenizer.vocabulary=267 or less, or give it more text"
    )
    made = BPETokenizer(vocabulary=267, trainer=trainer)  # type: ignore[arg-type]
    made.fit([text])
    assert sorted(made.token_bytes(i) for i in range(267) if made.byte_lengths()[i] > 1) == [b" ab", b" abab", b"ab", b"abab"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocabulary": 262}, "data.tokenizer.vocabulary=262 is too small: 256 bytes and 7 special tokens are 263"),
        ({"characters": "much"}, "data.tokenizer.characters=much is not an amount"),
        ({"special_tokens": ("<a>", "<a>")}, "must be different"),
        ({"special_tokens": ("",)}, "and not empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.tokenizer\.") as error:
        BPETokenizer(**options)
    assert said in str(error.value)
    assert BPETokenizer(vocabulary=263).vocabulary == 263


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_missing_package_names_what_installs_it_and_the_other_trainer(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, trainer, None)
    other = next(t for t in TRAINERS if t != trainer)
    with pytest.raises(ConfigError, match=rf"trainer={trainer} .*pip install 'gptlab\[bpe\]'.*data\.tokenizer\.trainer={other}"):
        BPETokenizer(trainer=trainer).fit(["a"])  # type: ignore[arg-type]


def test_encoding_before_learning_is_refused_with_a_sentence() -> None:
    for use in (lambda t: t.encode("a"), lambda t: t.decode([1])):
        with pytest.raises(ConfigError, match="has learned nothing yet"):
            use(BPETokenizer())


def test_a_damaged_state_is_refused() -> None:
    good = learned().state()
    words = good["tokens"].split(" ")
    for damage in (
        {},
        {"tokens": ""},
        {"tokens": None},
        {"tokens": good["tokens"][:-1] + "!"},
        {"tokens": " ".join(words[1:])},
        {"tokens": " ".join([*words, words[-1]])},
        {"special_tokens": ["<|x|>"]},
        {"special_tokens": [END_OF_TEXT, END_OF_TEXT]},
        {"pattern": "("},
    ):
        with pytest.raises(DataError, match="the state of a bpe tokeniser is damaged"):
            BPETokenizer().restore({**good, **damage} if damage else {})


def test_what_stops_the_text_stops_the_learning() -> None:
    def broken() -> Iterator[str]:
        yield "abab"
        raise DataError("the corpus ended badly")

    for trainer in TRAINERS:
        pytest.importorskip(trainer)
        with pytest.raises(DataError, match="the corpus ended badly"):
            BPETokenizer(trainer=trainer).fit(broken())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("20_000", 20_000),
        ("500k", 500_000),
        ("100M", 10**8),
        ("2.3G", 2_300_000_000),
        ("0.1k", 100),
        ("1e9", 10**9),
        ("4B", 4 * 10**9),
    ],
)
def test_amounts_are_read_as_they_are_written(text: str, number: int) -> None:
    assert amount("key", text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "10MB", "M", "1.0001k", "nan", "1e999"])
def test_what_is_no_amount_is_refused_with_its_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.rows="):
        amount("data.rows", text)
