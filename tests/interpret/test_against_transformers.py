"""Patterns, streams and lens are what transformers gives for the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab import compose, load
from gptlab.config.resolve import resolve
from gptlab.hardware.device import machine
from gptlab.interop.importing import import_run
from gptlab.interpret import capture, lens, patterns
from gptlab.runner.load import Loaded
from tests.interop.conftest import gpt2, letters, llama, saved  # noqa: F401 (fixtures)

MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "llama, grouped": llama,
    "mistral, window": lambda: llama("Mistral", sliding_window=5),
}


@pytest.fixture(params=MODELS)
def both(request: pytest.FixtureRequest, saved: Callable[..., Path], letters: str) -> tuple[Any, Loaded]:  # noqa: F811
    theirs = MODELS[request.param]()
    theirs.set_attn_implementation("eager")
    return theirs, load(import_run(str(saved(theirs)), resolve(compose([]), machine()), tokenizer=letters).run)


def test_patterns_streams_and_lens_are_those_of_transformers(both: tuple[Any, Loaded]) -> None:
    theirs, ours = both
    tokens = torch.randint(28, (3, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        told = theirs(tokens, output_attentions=True, output_hidden_states=True)
    looked = patterns(ours, tokens)
    assert "naive" in looked.note
    assert len(looked) == len(told.attentions) == 3
    for layer, expected in enumerate(told.attentions):
        assert expected.amax((-1, -2)).min() > 0.3
        torch.testing.assert_close(looked[layer], expected, rtol=0, atol=1e-5)
    names = ["embedded", "blocks.0", "blocks.1.residual_post", "norm"]  # of the last layer theirs is after the norm
    streams = capture(ours, tokens, names)
    for name, expected in zip(names, told.hidden_states, strict=True):
        torch.testing.assert_close(streams[name], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    read = lens(ours, tokens)
    inner = getattr(theirs, "transformer", None)
    last = theirs.model.norm if inner is None else inner.ln_f
    with torch.no_grad():
        for place, stream in enumerate(told.hidden_states[:-1]):
            expected = theirs.lm_head(last(stream))[..., :28]
            torch.testing.assert_close(read.logits(place), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(read.logits(-1), told.logits[..., :28], rtol=0, atol=1e-5 * float(told.logits.abs().max()))
