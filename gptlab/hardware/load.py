"""Whether a run has the machine to itself: what other processes take of its processors meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_IDLE = (3, 4)  # of /proc/stat's figures: idle, and waiting for a disk


class OtherLoad:
    """Measures, while it is entered, the share of all processors that other processes are busy on; nothing where the system does not say.

    W&B's own process counts as another. A GPU's other users are not seen.
    """

    def __enter__(self) -> OtherLoad:
        self._began = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = self._now()

    def metrics(self) -> dict[str, float]:
        """`machine/other_load`: 0 alone, 1 where all processors were busy with something else."""
        if self._began is None or self._ended is None:
            return {}
        seconds, busy, own = (after - before for before, after in zip(self._began, self._ended, strict=True))
        if seconds <= 0:
            return {}
        return {"machine/other_load": min(1.0, max(0.0, (busy - own) / (seconds * (os.cpu_count() or 1))))}

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds by the clock, busy seconds of all processors, and of this process and its children."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            figures = [int(f) for f in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
            busy = sum(f for i, f in enumerate(figures) if i not in _IDLE) / os.sysconf("SC_CLK_TCK")
            own = os.times()
            return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system
        return None
