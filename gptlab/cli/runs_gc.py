"""`gptlab runs gc`: what lies in the runs' folder and is of no use to anybody."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from rich import box
from rich.filesize import decimal
from rich.table import Table

from gptlab.config.folders import runs_root
from gptlab.runner import checkpoint
from gptlab.runner.run import Run, all_runs, holder, remove_run
from gptlab.tracker.console import console, say


@dataclass(frozen=True)
class _Useless:
    """Something to delete, and why: a whole run, or a folder of one."""

    run: Run
    folder: Path | None  # None: the run
    why: str

    @property
    def path(self) -> Path:
        return self.folder or self.run.directory

    @property
    def bytes(self) -> int:
        return sum(f.lstat().st_size for f in self.path.rglob("*") if f.is_symlink() or f.is_file())


def collect_garbage(*, checkpoints: bool, yes: bool) -> None:
    """Show what is of no use, and delete it after asking. `checkpoints`: of runs that are done, all but the newest and the best."""
    found = [one for run in all_runs() if not holder(run.directory) for one in _of(run, checkpoints)]
    if not found:
        say("nothing to delete")
        return
    sizes = [one.bytes for one in found]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("what", overflow="fold")
    shown.add_column("why")
    shown.add_column("size", justify="right", no_wrap=True)
    for one, size in zip(found, sizes, strict=True):
        shown.add_row(str(one.path.relative_to(runs_root())), one.why, decimal(size))
    console.print(shown)
    many = f"{len(found)} folder{'s' if len(found) > 1 else ''}, {decimal(sum(sizes))}, in {runs_root().resolve()}"
    if not yes and not typer.confirm(f"delete {many}?"):
        say("kept")
        return
    deleted = 0
    for one, size in zip(found, sizes, strict=True):
        if holder(one.run.directory):  # begun while we asked
            say((f"kept {one.path}: it is being trained now", "yellow"))
            continue
        if one.folder is None:
            remove_run(one.run)
        else:
            shutil.rmtree(one.folder)
        deleted += size
    say(f"deleted {decimal(deleted)}")


def _of(run: Run, checkpoints: bool) -> Iterator[_Useless]:
    """The useless parts of a run that nobody trains."""
    state, kept = run.state, checkpoint.checkpoints(run.checkpoints)
    if state in ("new", "failed") and not kept:
        failed = run.read("failed.json") or {}
        yield _Useless(
            run, None, f"failed before its first checkpoint: {failed.get('message')}" if failed else "never came to a checkpoint"
        )
        return
    for half in sorted(run.checkpoints.glob(".*.part")):
        yield _Useless(run, half, "a checkpoint left half-made by a crash")
    newest = checkpoint.newest_good(run.checkpoints) if checkpoints and state == "done" else None
    if newest is not None:  # of a run without a whole one everything is kept
        stay = {newest, checkpoint.best_of(run.checkpoints)}
        for old in (c for c in kept if c not in stay):
            yield _Useless(run, old, "neither the newest nor the best checkpoint of a run that is done")
