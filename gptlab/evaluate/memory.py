"""What a model has by heart: the longest stretch of its training text in what it writes; and how much of a text was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from gptlab.config.errors import ConfigError
from gptlab.data.ngrams import hashes, seen, stretches
from gptlab.data.prepared import Prepared
from gptlab.data.shard import TokenStream
from gptlab.data.tokenizer import Tokenizer
from gptlab.evaluate.probes import begin_ids
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling
from gptlab.model.transformer import Transformer

Ids = npt.NDArray[np.int64]
TEMPERATURES = (0.5, 0.8, 1.0)
SAMPLES, SAMPLE_TOKENS = 8, 256
NGRAM = 13  # words: an example that shares so many in a row with the training text counts as seen (Brown et al., 2020, appendix C)
SHARED = 256  # tokens that parts of a text have in common, where it is decoded in parts
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Copied:
    """How long the longest stretches are that texts share with the training text: of all of them, and mean of each's longest, in tokens."""

    source: str  # a temperature, or the held-out text
    longest: int
    mean: float
    text: str  # the longest
    samples: int
    tokens: int

    def to_json(self) -> dict[str, object]:
        """As JSON data."""
        return asdict(self)


def training_streams(data: Prepared) -> list[TokenStream]:
    """The tokens a run is trained on, one stream a source. Raises ConfigError for a task, whose rows are made on the fly."""
    if data.task is not None:
        raise ConfigError(f"data/corpus={data.task.name} makes its rows on the fly: there is no training text to have by heart")
    return [part.stream("train") for part in data.parts.values()] if data.parts else [data.stream("train")]


def memorised(
    model: Transformer,
    data: Prepared,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    samples: int = SAMPLES,
    tokens: int = SAMPLE_TOKENS,
    seed: int = 0,
) -> list[Copied]:
    """A row for each temperature, of texts drawn from nothing, and one of as much held-out text: what is shared by chance and by style.

    The longest stretches are found by halving: where a stretch of n tokens is in the training text, so is each within it.
    """
    streams, tokenizer = training_streams(data), data.tokenizer
    held_out = data.stream("val")
    begin = begin_ids(tokenizer) or held_out.window(0, 1).tolist()
    written: dict[str, list[Ids]] = {}
    for temperature in temperatures:
        drawn: list[list[int]] = [[] for _ in range(samples)]
        settings = Sampling(max_tokens=tokens, temperature=temperature, top_k=0, seed=seed)
        for made in generate(model, [begin], settings, samples=samples):
            drawn[made.row].append(made.token)
        written[f"temperature {temperature:g}"] = [np.array(row, np.int64) for row in drawn]
    count = max(1, min(samples, len(held_out) // tokens))
    starts = np.linspace(0, max(0, len(held_out) - tokens), count, dtype=np.int64)
    written["the held-out text"] = [held_out.window(int(start), min(tokens, len(held_out))) for start in starts]
    lengths = iter(longest(streams, [row for rows in written.values() for row in rows]))
    found = []
    for source, rows in written.items():
        here = [next(lengths) for _ in rows]
        most = int(np.argmax([length for length, _ in here]))
        length, place = here[most]
        text = tokenizer.decode(rows[most][place : place + length].tolist())
        found.append(Copied(source, length, float(np.mean([n for n, _ in here])), text, len(rows), sum(map(len, rows))))
    return found


def longest(streams: Sequence[TokenStream], rows: Sequence[Ids]) -> list[tuple[int, int]]:
    """Of each row the length of its longest stretch that stands in one of the streams, and where in the row that begins."""
    known: dict[int, list[tuple[bool, int]]] = {}

    def at(n: int) -> list[tuple[bool, int]]:
        if n not in known:
            own = [hashes(row, n) for row in rows]
            sought = np.unique(np.concatenate(own))
            there = np.zeros(len(sought), bool)
            for stream in streams:
                there |= seen(stretches(stream, n), sought, n)
            hits = [there[np.searchsorted(sought, one)] for one in own]
            known[n] = [(bool(hit.any()), int(hit.argmax()) if len(hit) else 0) for hit in hits]
        return known[n]

    found = []
    for i, row in enumerate(rows):
        low, high = 0, len(row) + 1  # a stretch of `low` is there, and none of `high`
        while high - low > 1:
            middle = min((low + high) // 2, max(1, 2 * low))  # short ones first: they are shared by most rows
            low, high = (middle, high) if at(middle)[i][0] else (low, middle)
        found.append((low, at(low)[i][1] if low else 0))
    return found


@dataclass(frozen=True)
class Contamination:
    """Of a text's examples and n-grams of words, how many stand in the training text. An example does when one of its n-grams does."""

    ngram: int
    examples: int
    examples_seen: int
    ngrams: int
    ngrams_seen: int
    too_short: int  # examples of fewer words, which are not counted

    @property
    def share(self) -> float:
        return self.ngrams_seen / self.ngrams

    @property
    def share_of_examples(self) -> float:
        return self.examples_seen / self.examples


def contamination(data: Prepared, texts: Sequence[str], ngram: int = NGRAM) -> Contamination:
    """How much of `texts`, each an example, stands in the training text word by word, whatever its case and punctuation.

    Raises ConfigError where no text is as long as an n-gram.
    """
    if ngram < 1:
        raise ConfigError(f"--ngram {ngram} must be at least 1: words in a row")
    told = [_words(text) for text in texts]
    number = {word: i for i, word in enumerate(dict.fromkeys(word for words in told for word in words), 1)}
    own = [hashes(np.array([number[word] for word in words], np.int64), ngram) for words in told]
    if not any(len(one) for one in own):
        raise ConfigError(
            f"--ngram {ngram}: no text has so many words; --ngram {max(map(len, told), default=1) or 1} is the longest there is"
        )
    sought = np.unique(np.concatenate(own))
    there = np.zeros(len(sought), bool)
    for stream in training_streams(data):
        parts = (
            np.array([number.get(word, 0) for word in _words(text)], np.int64) for text in _decoded(stream, data.tokenizer)
        )  # 0: no word of theirs
        there |= seen((part for part in parts if len(part) >= ngram), sought, ngram)
    hits = [there[np.searchsorted(sought, one)] for one in own if len(one)]
    return Contamination(
        ngram, len(hits), sum(bool(h.any()) for h in hits), sum(map(len, hits)), sum(int(h.sum()) for h in hits), len(own) - len(hits)
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _decoded(stream: TokenStream, tokenizer: Tokenizer) -> Iterable[str]:
    for tokens in _parts(stream):
        yield tokenizer.decode([token for token in tokens.tolist() if token != tokenizer.end_of_text])


def _parts(stream: TokenStream) -> Iterator[Ids]:
    yield from stretches(stream, min(SHARED, len(stream)))
