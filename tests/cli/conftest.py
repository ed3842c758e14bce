"""The command line, called in this process (fast) or as a process of its own (signals, workers)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptlab import cli


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def gptlab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`gptlab("runs", "list")` in this process."""

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["gptlab", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        code: object = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run


def start(*arguments: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """`python -m gptlab …` as a process in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "gptlab", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Result:
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out, err)
