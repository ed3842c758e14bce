"""The process that prepares a stream while it is trained on: told what by `gptlab.data.background` on standard input."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from gptlab.config import codec
from gptlab.config.errors import GptlabError
from gptlab.config.registry import load_components
from gptlab.config.schema import DataConfig
from gptlab.data.background import FAILED
from gptlab.data.prepare import prepare
from gptlab.data.shard import write_json

NICENESS = 10  # training comes first


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Prepare what standard input says; leave word in the folder of what goes wrong."""
    signal.signal(signal.SIGTERM, _leave)
    os.nice(NICENESS)
    told = json.loads(sys.stdin.readline())
    folder = Path(told["folder"])

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        load_components()
        prepare(codec.decode(DataConfig, told["config"], "standard input"), only=told["source"])
    except KeyboardInterrupt:
        return 0
    except GptlabError as error:
        write_json(folder / FAILED, {"code": error.code, "message": str(error)})
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
