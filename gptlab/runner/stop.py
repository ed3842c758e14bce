"""Why a run leaves before its end: a signal, or its time limit. Both are flags that are acted on where a step ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

from gptlab.config.errors import Stopped
from gptlab.hardware.world import World, launched

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_LIMIT = -1  # in the place of a signal's number
# torchrun passes on a Ctrl-C that its ranks got already, and a cluster sends SIGTERM beside its own signal: a second one comes later.
SECOND_AFTER = 1.0  # seconds


class Waiting(Exception):
    """A signal came while the next batch was waited for."""


class Requeued(SystemExit):
    """A launcher took the signal after us: it has put the job back into its queue, and this process ends with its code."""


class Stop:
    """Catches signals while it is entered, and knows the time limit (seconds, counted by `clock`, which its owner sets)."""

    def __init__(self, limit: float) -> None:
        self.limit, self.clock = limit, 0.0
        self.waiting = False  # for text, where a signal need not wait for the step's end
        self._number = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            self._previous = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is not None and self._previous and (launched() or World()).size > 1:
            # torchrun sends SIGTERM as soon as another rank has ended: what happened here is still to be written down and told
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def ask(self, number: int) -> None:
        """Ask to leave, as that signal would."""
        self._number = self._number or number

    @property
    def asked(self) -> int:
        """0: nobody asked to leave; the number of the signal; TIME_LIMIT."""
        return self._number or (TIME_LIMIT if self.clock >= self.limit else 0)

    def leave(self, why: int, step: int) -> NoReturn:
        """Leave after the checkpoint of a step, all ranks for one reason. A launcher that waits for this signal (submitit) gets it now."""
        handler = self._previous.get(why)
        if _is_launchers(handler):
            assert handler is not None
            try:
                handler(why, None)
            except SystemExit as error:
                raise Requeued(error.code) from None
        by = "its time limit (trainer.time_limit)" if why == TIME_LIMIT else signal.Signals(why).name
        raise Stopped(f"stopped at step {step} by {by}; the same command resumes it")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number and number in (signal.SIGINT, signal.SIGTERM) and now - self._since > SECOND_AFTER:  # leave at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._since = self._since if self._number else now
        if not self._number or _is_launchers(self._previous.get(number)):  # a launcher's own signal goes before a plain SIGTERM
            self._number = number
        if self.waiting:
            raise Waiting


def _is_launchers(handler: Any) -> bool:
    """Whether a handler from before waits to put this job back into a queue; other programs have handlers that only end the process."""
    return "SUBMITIT_EXECUTOR" in os.environ and callable(handler) and handler is not signal.default_int_handler
