"""The compiled step is the eager step: one recipe of GPT-2's parts, one of newer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptlab import compose, train
from tests.tiny import tiny

MODERN = ("model/norm=rmsnorm", "model/position=rotary", "model/ffn=relu2", "model/attention=qk_norm", "model/head=untied")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(), MODERN], ids=["gpt2", "modern"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(corpus_file: Path, parts: tuple[str, ...]) -> None:
    losses = []
    for compiled in ("false", "true"):
        run = train(compose(tiny(corpus_file, *parts, f"hardware.compile={compiled}", steps=4))).run
        losses.append([m["train/loss"] for m in run.metrics() if "train/loss" in m])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
