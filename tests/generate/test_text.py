"""Text as it streams: whole characters, and nothing of a stop string."""

from __future__ import annotations

import pytest

from gptlab import compose
from gptlab.config.errors import ConfigError
from gptlab.data.tokenizer import ByteTokenizer
from gptlab.generate.sampling import Sampling
from gptlab.generate.text import Completion, TextStream, complete
from gptlab.model.transformer import new_model

TEXT = "Grüße, 世界 🙂!"


def pieces(text: str, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(ByteTokenizer(), stop)
    made = [stream.feed(token) for token in ByteTokenizer().encode(text)]
    return [*made, stream.finish()], stream


def test_no_piece_is_half_a_character() -> None:
    made, _ = pieces(TEXT)
    assert "".join(made) == TEXT
    assert not any("\ufffd" in piece for piece in made)
    assert [p for p in made if p] == list(TEXT)


def test_bytes_that_are_no_character_are_shown_as_broken_and_hold_nothing_up() -> None:
    stream = TextStream(ByteTokenizer())
    shown = "".join(stream.feed(b) for b in b"a\xff\xff\xff\xffb") + stream.finish()
    assert shown.startswith("a\ufffd")
    assert shown.endswith("b")


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("thr", "two"), "one ", True),  # the first in the text, not in the list
        ("one tw", ("two",), "one tw", False),  # what began it is given back at the end
        ("aaab", ("aab",), "a", True),
        ("one", ("zero",), "one", False),
        ("Grüße", ("ß",), "Grü", True),
    ],
)
def test_a_text_ends_before_a_stop_string(text: str, stop: tuple[str, ...], expected: str, stopped: bool) -> None:
    made, stream = pieces(text, *stop)
    assert ("".join(made), stream.stopped) == (expected, stopped)


def test_nothing_of_a_stop_string_is_shown_before_it_is_whole() -> None:
    shown = ""
    stream = TextStream(ByteTokenizer(), ["</end>"])
    for token in ByteTokenizer().encode("text </en</end>"):
        shown += stream.feed(token)
        assert shown in "text </en"
    assert shown == "text </en"


def test_completions_say_why_they_ended_and_are_what_was_streamed() -> None:
    tokenizer = ByteTokenizer()
    small = ["model.width=16", "model.heads=2", "model.depth=1", "model.context_length=16"]
    model = new_model(compose(small).model, tokenizer.vocabulary, 0)
    heard: dict[tuple[int, int], str] = {}

    def streamed(one: Completion, text: str) -> None:
        heard[one.prompt, one.sample] = heard.get((one.prompt, one.sample), "") + text

    found = complete(model, tokenizer, ["ab", "c"], Sampling(max_tokens=20, seed=3), samples=2, logprobs=True, streamed=streamed)
    assert [(c.prompt, c.sample, c.finish) for c in found] == [(0, 0, "length"), (0, 1, "length"), (1, 0, "length"), (1, 1, "length")]
    assert all(c.text == heard[c.prompt, c.sample] == tokenizer.decode(c.tokens) for c in found)
    assert all(c.logprobs is not None and len(c.logprobs) == len(c.tokens) == 20 for c in found)
    letter = next(c for c in found[0].text[3:] if c.isascii() and c.isprintable())
    (cut,) = complete(model, tokenizer, ["ab"], Sampling(max_tokens=20, seed=3, stop=(letter,)))
    assert (cut.text, cut.finish) == (found[0].text.split(letter)[0], "stop")
    assert len(cut.tokens) < 20, "the row ends there"


@pytest.mark.parametrize(("prompts", "samples", "told"), [([""], 1, "the prompt is empty"), (["a"], 0, "--samples 0 must be at least 1")])
def test_what_cannot_be_completed_is_refused(prompts: list[str], samples: int, told: str) -> None:
    model = new_model(compose(["model.width=16", "model.heads=2", "model.depth=1"]).model, 256, 0)
    with pytest.raises(ConfigError, match=told):
        complete(model, ByteTokenizer(), prompts, Sampling(), samples=samples)
