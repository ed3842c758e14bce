"""From the losses of tokens to figures: perplexity and bits a byte, and what the loss depends on."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from gptlab.evaluate.losses import TokenLosses

SHARES = (0.01, 0.001, 0.0001)  # of the text, by which tokens are frequent or rare
LENGTHS = (64, 256, 1024)  # tokens of a document
BINS = 10  # of how sure the model was


@dataclass(frozen=True)
class Group:
    """Some of the tokens: which, how many, and their mean loss in nats."""

    name: str
    tokens: int
    loss: float


@dataclass(frozen=True)
class Bin:
    """Tokens of which the model was about equally sure: how sure on average, and how often rightly."""

    tokens: int
    sure: float
    right: float


@dataclass(frozen=True)
class Figures:
    """What was measured of one text. `calibration_error`: the mean distance of how sure the model was from how often rightly (Guo et al.,
    2017), its tokens in BINS bins. `by_length` is empty where there is one document."""

    tokens: int
    bytes: int
    documents: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    accuracy: float
    calibration_error: float
    by_place: list[Group]
    by_frequency: list[Group]
    by_length: list[Group]
    calibration: list[Bin]

    def to_json(self) -> dict[str, object]:
        """As JSON data."""
        return asdict(self)


def figures(losses: TokenLosses) -> Figures:
    """The figures of a text's tokens."""
    nats = losses.nats
    loss, bins = float(nats.mean()), _bins(losses)
    documents, index, sizes = np.unique(losses.document, return_inverse=True, return_counts=True)
    error = sum(b.tokens * abs(b.sure - b.right) for b in bins) / len(nats)
    return Figures(
        tokens=len(nats),
        bytes=losses.bytes,
        documents=len(documents),
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=float(nats.sum()) / (losses.bytes * math.log(2)) if losses.bytes else None,
        accuracy=float(losses.right.mean()),
        calibration_error=float(error),
        by_place=_by_place(losses),
        by_frequency=_by_frequency(losses),
        by_length=_by_edges(nats, sizes[index], LENGTHS, "tokens") if len(documents) > 1 else [],
        calibration=bins,
    )


def _by_place(losses: TokenLosses) -> list[Group]:
    """After 1 token, 2, 3 to 4, 5 to 8, … before it: a model that uses its context goes on falling."""
    found, low = [], 1
    while low <= int(losses.place.max()):
        high = low if low == 1 else 2 * (low - 1)
        chosen = (losses.place >= low) & (losses.place <= high)
        if chosen.any():
            name = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            found.append(Group(name, int(chosen.sum()), float(losses.nats[chosen].mean())))
        low = high + 1
    return found


def _by_frequency(losses: TokenLosses) -> list[Group]:
    """By the share that the token has of the text's tokens."""
    _, index, counts = np.unique(losses.token, return_inverse=True, return_counts=True)
    share = counts[index] / len(losses.token)
    found = []
    for name, low, high in zip(_share_names(), (*SHARES, 0.0), (math.inf, *SHARES), strict=True):
        chosen = (share >= low) & (share < high)
        if chosen.any():
            found.append(Group(name, int(chosen.sum()), float(losses.nats[chosen].mean())))
    return found


def _share_names() -> list[str]:
    shown = [f"{share:.4%}".rstrip("%").rstrip("0").rstrip(".") + " %" for share in SHARES]
    return [f"from {shown[0]}", *(f"{low} to {high}" for high, low in itertools.pairwise(shown)), f"below {shown[-1]}"]


def _by_edges(nats: npt.NDArray[np.float64], value: npt.NDArray[np.int64], edges: tuple[int, ...], unit: str) -> list[Group]:
    found = []
    for low, high in zip((0, *edges), (*edges, None), strict=True):
        chosen = (value >= low) & (True if high is None else value < high)
        if chosen.any():
            name = f"under {high:,}" if low == 0 else f"from {low:,}" if high is None else f"{low:,} to {high - 1:,}"
            found.append(Group(f"{name} {unit}", int(chosen.sum()), float(nats[chosen].mean())))
    return found


def _bins(losses: TokenLosses) -> list[Bin]:
    which = np.minimum((losses.sure * BINS).astype(int), BINS - 1)
    return [
        Bin(int(chosen.sum()), float(losses.sure[chosen].mean()), float(losses.right[chosen].mean()))
        for i in range(BINS)
        if (chosen := which == i).any()
    ]
