"""A model and a text so small that a whole run takes a fraction of a second."""

from __future__ import annotations

from pathlib import Path


def tiny(file: Path, *more: str, steps: int = 12) -> list[str]:
    """Overrides of a tiny run on a text file, without a tracker."""
    return [
        "data=text", f"data.corpus.path={file}", "data/tokenizer=char",
        "model.width=16", "model.depth=1", "model.heads=2", "model.context_length=16", "trainer.batch_tokens=64",
        f"trainer.budget={steps}steps", "trainer.log_every=1", "callbacks.samples.tokens=4", "tracker=none", *more,
    ]  # fmt: skip
