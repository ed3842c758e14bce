"""Processes for tests of several ranks: torchrun with whatever it starts, and this module run by it, which trains one config after another.

`start(...)` gives a `Ranks` to signal and to wait for; nothing of it outlives the `with`. `trained(...)` trains many configs in one
process a rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "faults.py"
PATIENCE = 240.0  # seconds: the machine may be doing something else
GRACE = "3"  # seconds between torchrun's SIGTERM and its SIGKILL


@dataclass
class Ranks:
    """A started command: torchrun (`ranks` of at least 1) or one process (0)."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """All that was printed so far, by whichever process."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code, once everything has ended; fails the test when that takes too long."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.output}") from None

    @property
    def codes(self) -> dict[int, int]:
        """Of each failed rank the exit code (of a signal: its number, negative), as torchrun's report has it."""
        found = re.findall(r"^  rank\s+: (\d+) .*\n\s+exitcode\s+: (-?\d+)", self.output, re.MULTILINE)
        return {int(rank): int(code) for rank, code in found}

    @property
    def said(self) -> list[str]:
        """The lines that gptlab itself printed in failing: torchrun's own report is left out."""
        return [line for line in self.output.splitlines() if line.startswith("gptlab: ")]

    @property
    def tracebacks(self) -> list[str]:
        """The lines of a traceback that a rank printed; torchrun's own, of its report, is left out."""
        return re.findall(r"^\[rank\d+\]:.*", self.output, re.MULTILINE)


@contextlib.contextmanager
def start(
    folder: Path, *arguments: str, ranks: int = 2, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()
) -> Iterator[Ranks]:
    """Start `python -m ARGUMENTS` under torchrun (`ranks`=0: without); what is left of it at the end is killed.

    Its output goes to a file in `folder`. The rendezvous takes a free port, so that tests may run side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"output-{time.monotonic_ns()}.txt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options] if ranks else []
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": GRACE, **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", *arguments],
            cwd=ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = Ranks(process, log)
    try:
        yield started
    finally:
        for child in [*_descendants(process.pid), process.pid]:  # torchrun gives each rank a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait()


def gptlab(folder: Path, *overrides: str, **settings: Any) -> contextlib.AbstractContextManager[Ranks]:
    """Start `gptlab --plugin tests/faults.py train OVERRIDES`; the rest as for `start`."""
    return start(folder, "gptlab", "--plugin", str(FAULTS), "train", *overrides, **settings)


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait for something; fail the test when it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {seconds:.0f} s"
        time.sleep(0.05)


def _descendants(pid: int) -> list[int]:
    """Every process that a process started, and those that they started."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, new = list[int](), [pid]
    while new:
        new = [child for parent in new for child in parents.get(parent, [])]
        found += new
    return found


@dataclass(frozen=True)
class Job:
    """One config to train: its overrides, and the folder for its run."""

    runs: Path
    overrides: Sequence[str]

    @property
    def directory(self) -> Path:
        """The run's folder; there must be one run."""
        (found,) = self.runs.glob("*/*/config.json")
        return found.parent


def trained(
    folder: Path, jobs: Sequence[Job], *, ranks: int = 2, environment: Mapping[str, str] | None = None
) -> list[list[dict[str, Any]]]:
    """Train configs one after another in the same processes; of each job what became of it, by rank: state, code, message.

    The processes must come to the end, whatever became of the jobs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"jobs-{time.monotonic_ns()}.json"
    file.write_text(json.dumps([{"runs": str(j.runs), "overrides": list(j.overrides)} for j in jobs]), encoding="utf-8")
    with start(folder, "tests.ranks", str(file), ranks=ranks, environment=environment) as started:
        assert started.wait() == 0, started.output
    parts = [json.loads(Path(f"{file}.{rank}").read_text(encoding="utf-8")) for rank in range(max(1, ranks))]
    return [list(outcomes) for outcomes in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Session:
    """What a test hands to submitit, and submitit to itself again when the session is over."""

    overrides: Sequence[str]

    def __call__(self) -> str:
        from gptlab import compose, train
        from gptlab.config.registry import add_plugin

        add_plugin(FAULTS)
        return train(compose(list(self.overrides))).state

    def checkpoint(self) -> Any:
        """Called by submitit after its signal."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _main(file: str) -> None:
    from gptlab import compose, train
    from gptlab.config.errors import GptlabError
    from gptlab.config.registry import add_plugin
    from gptlab.hardware.world import leave

    add_plugin(FAULTS)
    outcomes = []
    for job in json.loads(Path(file).read_text(encoding="utf-8")):
        os.environ["GPTLAB_RUNS"] = job["runs"]
        began = time.monotonic()
        try:
            outcome = train(compose(job["overrides"]))
            made = {"state": outcome.state, "code": outcome.code, "message": outcome.message}
        except GptlabError as error:
            made = {"state": type(error).__name__, "code": error.code, "message": str(error)}
        outcomes.append(made | {"seconds": time.monotonic() - began})
    Path(f"{file}.{os.environ.get('RANK', '0')}").write_text(json.dumps(outcomes), encoding="utf-8")
    leave()


if __name__ == "__main__":
    _main(sys.argv[1])
