"""What is known of GPUs beforehand: their peak and their memory, for a run that is planned where they are not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gptlab.config.errors import ConfigError
from gptlab.config.registry import suggest

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """A GPU: the word its driver names it by, its dense bf16 peak in FLOP/s (the vendor's; FP8 is never mixed in), its memory in bytes.

    The memory is what CUDA reports, somewhat less than the label says. `fp8`: whether it multiplies in 8 bits.
    """

    name: str
    word: str
    peak_flops: float
    memory: int
    fp8: bool = False


CARDS = (
    Card("H200", "H200", 989e12, int(139.8 * GIB), True),
    Card("H100 PCIe", "H100 PCIe", 756e12, int(79.1 * GIB), True),
    Card("H100", "H100", 989e12, int(79.1 * GIB), True),
    Card("B200", "B200", 2250e12, int(178.3 * GIB), True),
    Card("A100 40GB", "A100", 312e12, int(39.4 * GIB)),
    Card("A100 80GB", "A100", 312e12, int(79.1 * GIB)),
    Card("A10G", "A10G", 70e12, int(22.0 * GIB)),
    Card("A10", "A10", 125e12, int(22.0 * GIB)),
    Card("L40S", "L40S", 362e12, int(44.3 * GIB), True),
    Card("L4", "L4", 121e12, int(22.0 * GIB), True),
    Card("RTX 4090", "RTX 4090", 165e12, int(23.5 * GIB), True),
    Card("RTX 3090", "RTX 3090", 71e12, int(23.6 * GIB)),
)


def known_card(device_name: str) -> Card | None:
    """The card of a driver's name for a device (its memory may be another variant's); None for one that is not in the table."""
    return next((card for card in CARDS if card.word in device_name), None)


def card_named(name: str) -> Card:
    """The card a user means: `H100`, `a100-40gb`, `RTX 4090`. Raises ConfigError, naming those that are known."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]|nvidia|geforce|sxm\d?", "", text.lower())

    wanted = plain(name)
    found = [card for card in CARDS if plain(card.name) == wanted] or [c for c in CARDS if wanted and plain(c.word) == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"--card {name}: there are {' and '.join(c.name for c in found)}; say which")
    known = [card.name for card in CARDS]
    raise ConfigError(f"--card {name} is not known{suggest(name, known)}; there are {', '.join(known)}")
