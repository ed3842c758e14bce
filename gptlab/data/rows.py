"""Rows of tokens: what every source of training rows is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gptlab.data.shard import Tokens


@dataclass
class Fetched:
    """n rows of context + 1 tokens; the number of each input's document in its row; which targets count (None: all).

    `extra`: what an objective wants to know besides, (n, …) by name.
    """

    tokens: Tokens
    document: Tokens | None = None
    scored: npt.NDArray[np.bool_] | None = None
    extra: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


class Rows(Protocol):
    """An endless sequence of training rows, each a pure function of its number."""

    context: int

    @property
    def tokens(self) -> int:
        """Tokens of the text, as far as it is there."""

    @property
    def epoch_rows(self) -> int:
        """Rows of one pass."""

    @property
    def known_length(self) -> bool:
        """Whether `epoch_rows` can be told now."""

    @property
    def settled(self) -> bool:
        """Whether the order of rows to come can be told without waiting for text."""

    def place(self, index: Tokens) -> Tokens:
        """Where the rows with these numbers lie: what `fetch` wants. Costs as much for one as for many."""

    def fetch(self, place: Tokens, documents: bool) -> Fetched:
        """The rows at these places."""
