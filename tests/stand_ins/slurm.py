"""SLURM's commands on one machine, enough of them for submitit's executor to submit, signal, requeue and end the jobs of an array.

`install` puts sbatch, srun, scontrol, sacct and scancel into a folder for PATH. GPTLAB_SLURM is where they keep their state; every session
of a job is sent SIGUSR2 after GPTLAB_SLURM_SESSION seconds, as `#SBATCH --signal=USR2@…` asks for before the time is up.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "sacct", "scancel")


def install(folder: Path) -> Path:
    """The folder with the commands."""
    folder.mkdir(parents=True)
    for name in COMMANDS:
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n', encoding="utf-8")
        file.chmod(0o755)
    return folder


def _state() -> Path:
    folder = Path(os.environ["GPTLAB_SLURM"])
    folder.mkdir(exist_ok=True)
    return folder


def sbatch(file: str) -> None:
    text = Path(file).read_text(encoding="utf-8")
    array = re.search(r"#SBATCH --array=0-(\d+)", text)
    job = str(len(list(_state().glob("*.sh"))) + 1)
    (_state() / f"{job}.sh").write_text(text, encoding="utf-8")
    for index in range(int(array[1]) + 1 if array else 1):
        with (_state() / f"{job}_{index}.out").open("a") as log:
            subprocess.Popen([sys.executable, __file__, "task", job, str(index)], start_new_session=True, stdout=log, stderr=log)
    print(f"Submitted batch job {job}")


def task(job: str, index: str) -> None:
    """One job of an array, from session to session."""
    name = f"{job}_{index}"
    ids = {"JOB_ID": job, "ARRAY_JOB_ID": job, "ARRAY_TASK_ID": index, "NTASKS": "1", "JOB_NUM_NODES": "1", "NODEID": "0", "PROCID": "0"}
    environment = os.environ | {f"SLURM_{key}": value for key, value in ids.items()} | {"SLURM_LOCALID": "0"}
    while True:
        batch = subprocess.Popen(["bash", str(_state() / f"{job}.sh")], env=environment)
        began, signalled = time.monotonic(), False
        while batch.poll() is None:
            time.sleep(0.05)
            if not signalled and time.monotonic() - began > float(os.environ["GPTLAB_SLURM_SESSION"]):
                signalled = True
                os.kill(int((_state() / f"{name}.pid").read_text()), signal.SIGUSR2)  # steps get it, the batch script does not
        requeued = _state() / f"{name}.requeue"
        if not requeued.exists():
            (_state() / f"{name}.state").write_text("COMPLETED" if batch.returncode == 0 else "FAILED")
            return
        requeued.unlink()


def srun(*arguments: str) -> None:
    rest, files = list(arguments), {"--output": -1, "--error": -1}
    while rest[0].startswith("-"):
        option = rest.pop(0)
        if option in files:
            value = rest.pop(0)
            for pattern, known in {"%A": "ARRAY_JOB_ID", "%a": "ARRAY_TASK_ID", "%j": "JOB_ID", "%t": "PROCID"}.items():
                value = value.replace(pattern, os.environ[f"SLURM_{known}"])
            files[option] = os.open(value, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    running = subprocess.Popen(rest, stdout=files["--output"], stderr=files["--error"])
    (_state() / f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}.pid").write_text(str(running.pid))
    sys.exit(running.wait())


def scontrol(verb: str, job: str) -> None:
    assert verb == "requeue"
    (_state() / f"{job}.requeue").touch()
    with (_state() / "requeued").open("a") as told:
        told.write(job + "\n")


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for job in arguments[arguments.index("-j") + 1 :: 2]:
        for file in _state().glob(f"{job}_*.pid"):
            state = file.with_suffix(".state")
            print(f"{file.stem}|{state.read_text() if state.exists() else 'RUNNING'}|here")


def scancel(job: str, *_: str) -> None:
    os.kill(int((_state() / f"{job}.pid").read_text()), signal.SIGTERM)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
