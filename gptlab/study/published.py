"""What is published of GPT-2's four sizes, to stand beside one's own scores."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

SIZES = ("gpt2 124M", "gpt2 355M", "gpt2 774M", "gpt2 1.5B")
PAPER = "Radford et al. 2019, table 3: zero-shot"


@dataclass(frozen=True)
class Published:
    """One figure of each size (None: not published there), under the name of the score that it stands beside, and how it was measured."""

    name: str
    values: tuple[float | None, float | None, float | None, float | None]
    source: str


KNOWN = (
    Published("hellaswag/acc", (0.2892, None, None, 0.4004), "the harness, as build-nanogpt's hellaswag.py tells it"),
    Published("hellaswag/acc_norm", (0.3114, None, None, 0.5089), "the harness, as build-nanogpt's hellaswag.py tells it"),
    Published("core/centred", (None, None, None, 0.2565), "nanochat's README: 0.256525"),
    Published("lambada_openai/acc", (0.4599, 0.5548, 0.6012, 0.6324), f"{PAPER}, behind a filter of stop words that the harness lacks"),
    Published("lambada_openai/perplexity", (35.13, 15.60, 10.87, 8.63), f"{PAPER}"),
    Published("wikitext/word_perplexity", (37.50, 26.37, 22.05, 17.48), f"{PAPER}, WikiText-103 with its own de-tokenisers"),
)


def published(names: Collection[str]) -> list[Published]:
    """What is known beside these scores."""
    return [one for one in KNOWN if one.name in names]
