"""A stream's preparation in a process of its own (`python -m gptlab.data`), while the data are used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from gptlab.config import codec
from gptlab.config.errors import ConfigError, DataError, GptlabError, IOFailure
from gptlab.config.schema import DataConfig
from gptlab.data.prepared import preparer

FAILED, LOG = "failed.json", "prepare.log"


class Background:
    """Calling it starts the preparation of a folder unless some process is at it, and raises what stopped the last one."""

    def __init__(self, config: DataConfig, folder: Path, source: str = "") -> None:
        self.config, self.folder, self.source = config, folder, source  # of a mix, which source
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        if preparer(self.folder) is not None:
            return
        if self._process is not None:
            self._raise_failure()
        (self.folder / FAILED).unlink(missing_ok=True)
        with (self.folder / LOG).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gptlab.data"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; we stop it
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdin is not None
        told = {"config": codec.encode(self.config), "folder": str(self.folder), "source": self.source}
        try:
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()  # and stays open: its end tells the process that we are gone
        except BrokenPipeError:
            pass  # it has failed already, and the next call says why

    def _raise_failure(self) -> None:
        """Raise what the process that has ended said; nothing where it came to its end."""
        process, self._process = self._process, None
        file = self.folder / FAILED
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            kind = next((k for k in (ConfigError, DataError, IOFailure) if k.code == found["code"]), GptlabError)
            raise kind(found["message"])
        if process is not None and process.returncode not in (0, -signal.SIGTERM):
            raise GptlabError(f"the preparation in the background ended with code {process.returncode}; see {self.folder / LOG}")

    def stop(self) -> None:
        """End the process; what it has recorded stays."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def __del__(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
