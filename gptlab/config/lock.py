"""A lock that dies with its holder, and says who that is."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(file: Path) -> Iterator[bool]:
    """Hold a lock file: True, or False where another process holds it now. A dead holder's lock is free."""
    with file.open("a+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        opened.seek(0)
        opened.truncate()
        opened.write(f"process {os.getpid()} on {socket.gethostname()}")
        opened.flush()
        yield True


def holder(file: Path) -> str | None:
    """Who holds a lock file now; None if nobody does."""
    try:
        with file.open("r") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return opened.read().strip() or "another process"
    except OSError:
        return None
    return None
