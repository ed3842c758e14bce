"""Change one value of a config by its dotted path."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from gptlab.config.schema import Config


def transform(config: Config, path: str, change: Callable[[Any], Any]) -> Config:
    """A copy of the config with the value at the dotted path replaced by `change(value)`."""

    def walk(value: Any, parts: list[str]) -> Any:
        if not parts:
            return change(value)
        name, *rest = parts
        return dataclasses.replace(value, **{name: walk(getattr(value, name), rest)})

    return typing.cast(Config, walk(config, path.split(".")))
