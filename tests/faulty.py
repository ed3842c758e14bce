"""What the tests of faults share: the callbacks of tests/faults.py in this process or another, and what became of a run."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from gptlab import compose, train
from gptlab.config import registry
from gptlab.config.errors import GptlabError
from gptlab.runner import checkpoint
from gptlab.runner.run import Run, all_runs

FAULTS = Path(__file__).with_name("faults.py")
COMMAND = (sys.executable, "-m", "gptlab", "--plugin", str(FAULTS), "train")


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """The callbacks of tests/faults.py are registered in here."""
    taken = registry._COMPONENTS.pop(("callback", "signal_at"), None)  # another test file has one of its own
    sys.modules.pop("faults", None)
    registry.load_plugin(FAULTS)
    try:
        yield
    finally:
        if taken is not None:
            registry._COMPONENTS["callback", "signal_at"] = taken


def forked(overrides: Sequence[str]) -> multiprocessing.process.BaseProcess:
    """A copy of this process, started, that trains and ends with the run's exit code: it can be killed for real, and starts at once."""

    def work() -> None:
        try:
            code = train(compose(overrides)).code
        except GptlabError as error:
            code = error.code
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def ended(process: multiprocessing.process.BaseProcess, timeout: float = 120) -> int:
    """Its exit code, negative for a signal."""
    process.join(timeout)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def only_run() -> Run:
    """The one run there is."""
    (found,) = all_runs()
    return found


def weights(run: Run, which: str = "latest") -> dict[str, Tensor]:
    """A checkpoint's model. Copies: what is loaded is a view of the file, which a test may damage."""
    return {k: v.clone() for k, v in checkpoint.load_model(checkpoint.choose(run.checkpoints, which)).items()}


def weights_hash(run: Run, which: str = "latest") -> str:
    """SHA-256 over the names and values of a checkpoint's model."""
    found = hashlib.sha256()
    for name, value in sorted(weights(run, which).items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def losses(run: Run) -> list[tuple[int, object, object]]:
    """Each line of metrics.jsonl: step, training loss, held-out loss."""
    return [(m["step"], m.get("train/loss"), m.get("val/loss")) for m in run.metrics()]


def left_over(run: Run) -> list[Path]:
    """Temporary things below a run's folder."""
    return [f for f in run.directory.rglob("*") if f.name.endswith((".part", ".tmp", ".old"))]
