"""A run knows whether it had the machine to itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptlab.hardware.load import OtherLoad

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc/stat")


def busy(seconds: float) -> str:
    return f"import time; end = time.time() + {seconds}\nwhile time.time() < end: pass"


def test_own_work_is_not_others_and_others_is() -> None:
    cores = os.cpu_count() or 1
    with OtherLoad() as before:
        time.sleep(0.5)
    quiet = before.metrics()["machine/other_load"]
    with OtherLoad() as own:
        end = time.time() + 1.0
        while time.time() < end:
            pass
    other = subprocess.Popen([sys.executable, "-c", busy(3)])
    try:
        time.sleep(0.3)
        with OtherLoad() as theirs:
            time.sleep(1.5)
    finally:
        other.kill()
        other.wait()
    found = theirs.metrics()["machine/other_load"]
    assert found > 0.6 / cores
    assert own.metrics()["machine/other_load"] < max(quiet, 0.0) + 0.6 / cores + 0.5 * (cores > 2)


def test_where_the_system_does_not_say_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherLoad, "_now", staticmethod(lambda: None))
    with OtherLoad() as load:
        pass
    assert load.metrics() == {}
