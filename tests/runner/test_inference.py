"""`callback=inference`: what a trained model costs when it writes, number format by number format."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.config.errors import ConfigError
from gptlab.config.product import cpu_multiplies_bf16
from gptlab.runner.inference import Inference
from tests.tiny import tiny


def test_every_format_is_measured_and_the_weights_stay_as_they_were(corpus_file: Path) -> None:
    own = ["+callback@callbacks.inference=inference", "callbacks.inference.tokens=6", "callbacks.inference.repeats=1"]
    own.append("model.attention.window=5")
    run = train(compose(tiny(corpus_file, "study=i", *own, steps=4))).run
    assert run is not None
    last = run.read("done.json")
    assert last is not None
    found = last["summary"]
    formats = ["fp32", "int8", *(["bf16"] if cpu_multiplies_bf16() else [])]
    for name in formats:
        assert found[f"inference/{name}/tokens_per_second"] > 0
        assert found[f"inference/{name}/first_token_ms"] > 0
        assert found[f"inference/{name}/loss"] == pytest.approx(found["val/loss"], rel=0.02)
    assert found["inference/fp32/loss"] == pytest.approx(found["val/loss"], rel=1e-6)
    assert found["inference/fp32/weight_bytes"] == 4 * found["parameters"]
    assert found["inference/int8/weight_bytes"] < found["inference/fp32/weight_bytes"] / 2
    assert found["inference/cache_bytes"] == 2 * 5 * 16 * 4  # keys and values of a window of 5, width 16, fp32


@pytest.mark.parametrize("name", ["tokens", "rows", "repeats"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"callbacks.inference.{name}=0 must be at least 1"):
        Inference(**{name: 0})
