"""Amounts as people write them: `100M`, `1.5G`, `20_000`."""

from __future__ import annotations

import re
from decimal import Decimal

from gptlab.config.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_FORM = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?) ?([kKMGBT]?)")


def amount(key: str, text: str) -> int:
    """The whole number above zero that `text` says: `20_000`, `100M`, `1.5G` (k, M, G or B, T: powers of a thousand), `1e9`.

    Raises ConfigError naming `key` for anything else, a fraction such as `0.5` included.
    """
    match = _FORM.fullmatch(text.strip())
    if match:
        value = Decimal(match[1].replace("_", "")) * _UNITS["k" if match[2] == "K" else match[2]]
        if value >= 1 and value == int(value):
            return int(value)
    raise ConfigError(f"{key}={text} is not an amount; write a whole number above zero such as 20000, 500k, 100M or 1.5G")
