"""Composing costs a tenth of a second: what several tests compose is composed once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest

from gptlab.config.compose import compose
from gptlab.config.schema import Config


@pytest.fixture(scope="session")
def composed() -> Callable[..., Config]:
    """`composed("model=char", "seed=1")`: as `compose`, remembered."""
    remembered = functools.cache(lambda *overrides: compose(overrides))
    return lambda *overrides: copy.deepcopy(remembered(*overrides))
