"""gptlab: compose, train and compare GPT-2-class language models.

from gptlab import compose, train, load, record, register
outcome = train(compose(["model/norm=rmsnorm", "trainer.budget=200steps"]))
print(load("latest").sample("The "))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlab.config.compose import compose as compose
    from gptlab.config.record import record as record
    from gptlab.config.registry import register as register
    from gptlab.runner.load import load as load
    from gptlab.runner.train import train as train

__all__ = ["compose", "load", "record", "register", "train"]
_HOMES = {
    "compose": "gptlab.config.compose",
    "record": "gptlab.config.record",
    "register": "gptlab.config.registry",
    "load": "gptlab.runner.load",
    "train": "gptlab.runner.train",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `gptlab --help` must not wait for torch.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gptlab' has no attribute {name!r}")
