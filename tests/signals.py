"""A callback that signals its own process: in a module of its own, since tests of several files register it."""

from __future__ import annotations

import os
import signal

from gptlab.config.registry import register
from gptlab.runner.callback import Callback
from gptlab.runner.trainer import Trainer


@register("callback", "signal_at")
class SignalAt(Callback):
    """Sends this process a signal after a step, once."""

    fired = False

    def __init__(self, *, step: int = 5) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step and not SignalAt.fired:
            SignalAt.fired = True
            os.kill(os.getpid(), signal.SIGINT)
