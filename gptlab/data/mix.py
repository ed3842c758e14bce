"""A mix of corpora: each is prepared by itself, once, and the loader draws rows from them by weight."""

from __future__ import annotations

from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, register, suggest
from gptlab.config.slots import Corpus as CorpusSlot
from gptlab.data.corpus import Corpus
from gptlab.data.synthetic import Task


@register("data/corpus", "mix")
class Mix:
    """Several corpora: `sources` by name, and the `weights` of their shares of the training tokens (1 where none is given).

    A weight of 0 is measured and not trained on. The held-out sets, and a tokeniser trained on the mix, do not depend on the weights.
    """

    name = "mix"

    def __init__(self, *, sources: dict[str, CorpusSlot] = {}, weights: dict[str, float] = {}) -> None:  # noqa: B006
        if unknown := sorted(set(weights) - set(sources)):
            raise ConfigError(
                f"data.corpus.weights.{unknown[0]}: there is no such source{suggest(unknown[0], sources)}; there are {', '.join(sources)}"
            )
        for name in sources:
            if name in ("train", "val") or "/" in name:
                raise ConfigError(f"data.corpus.sources.{name}: choose another name; train and val are taken, and it cannot hold a slash")
        self.options = dict(sources)
        self.sources: dict[str, Corpus] = {name: build(options) for name, options in sources.items()}
        for name, corpus in self.sources.items():
            if isinstance(corpus, (Mix, Task)):
                raise ConfigError(f"data.corpus.sources.{name}={corpus.name} cannot be a part of a mix; only text can")
        given = {name: float(weights.get(name, 1.0)) for name in sources}
        for name, weight in given.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"data.corpus.weights.{name}={weight:g} must be at least 0 and finite")
        if given and sum(given.values()) <= 0:
            raise ConfigError("data.corpus.weights: one at least must be above 0")
        total = sum(given.values())
        self.weights = {name: w / total for name, w in given.items()}

    def fingerprint(self) -> dict[str, Any]:
        return {name: corpus.fingerprint() for name, corpus in self.sources.items()}

    def pieces(self) -> Any:
        """The sources' texts one after another: for what reads a corpus without training on it."""
        for corpus in self.sources.values():
            yield from corpus.pieces()
