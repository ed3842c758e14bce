"""What `gptlab runs` and `gptlab export` print."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gptlab.config import codec
from gptlab.config.errors import CheckpointError, GptlabError, IOFailure
from gptlab.config.folders import runs_root
from gptlab.config.registry import load_components
from gptlab.config.resolve import parse_budget
from gptlab.data.tokenizer import from_json
from gptlab.runner import checkpoint
from gptlab.runner.run import Run, all_runs, find_run, find_study, holder, members, remove_run
from gptlab.tracker.console import console, say

LISTED = 4  # unknown files of a checkpoint that are named
_COLOURS = {"done": "green", "failed": "red", "running": "cyan", "stopped": "yellow", "new": "dim"}


def list_runs(study: str | None) -> None:
    """A line a run: what it is, its state, how far it is, what it would resume from, its held-out loss, its age."""
    if study is not None:
        wanted = {m["identity"] for m in members(find_study(study))}
        runs = [r for r in all_runs() if r.identity in wanted]
    else:
        runs = all_runs()
    if not runs:
        say("no runs yet; `gptlab train` makes one")
        return
    for name in dict.fromkeys(r.study for r in runs):
        console.print(_run_table(name, [r for r in runs if r.study == name]))
    for run in runs:
        failure = run.read("failed.json") if run.state == "failed" else None
        if failure:
            say((run.identity, "red"), f" exit {failure['code']}: {failure['message']}")


def _run_table(study: str, runs: list[Run]) -> Table:
    states = {run.identity: run.state for run in runs}
    resumable = {"stopped", "failed"} & set(states.values())
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=study, title_justify="left", title_style="bold")
    for name in ("identity", "what differs", "state", "step", *(["checkpoint"] if resumable else []), "val/loss", "age"):
        shown.add_column(name, justify="left" if name in ("identity", "what differs", "state") else "right", no_wrap=name != "what differs")
    for run in runs:
        lines, state = run.metrics(), states[run.identity]
        losses = [m["val/loss"] for m in lines if "val/loss" in m]
        kept = checkpoint.checkpoints(run.checkpoints) if state in ("stopped", "failed") else []
        newest = (f"step {checkpoint.step_of(kept[0])}" if kept else "none") if state in ("stopped", "failed") else ""
        shown.add_row(
            run.identity,
            run.name.replace(",", " "),
            f"[{_COLOURS[state]}]{state}[/]",
            str(lines[-1].get("step", 0) if lines else 0) + (_of(run) if state != "done" else ""),
            *([newest] if resumable else []),
            f"{float(losses[-1]):.4f}" if losses else "",
            _age(run),
        )
    return shown


def _of(run: Run) -> str:
    """`/500`: the steps of a run's budget, where that says them."""
    trainer = (run.read("config.json") or {}).get("trainer", {})
    try:
        budget = parse_budget(trainer["budget"])
        size = {"steps": 1, "tokens": int(trainer["batch_tokens"])}.get(budget.unit)
    except (KeyError, ValueError, GptlabError):  # an older run's, or edited
        return ""
    return f"/{math.ceil(budget.amount / size)}" if size and not budget.beyond else ""


def _age(run: Run) -> str:
    seconds = time.time() - (run.directory / "config.json").stat().st_mtime
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_run(reference: str) -> None:
    """Everything a run says of itself."""
    load_components()
    run = find_run(reference)
    config = run.config()
    say((str(run.directory), "bold"), f"  {run.state}" + (f" by {holder(run.directory)}" if run.state == "running" else ""))
    if config.trainer.start:
        noted = run.read("start.json") or {}
        place = f" ({noted['study']}/{noted['name']})" if noted else ""
        identity, _, step = config.trainer.start.partition("@")
        say(f"began at step {step} of {identity}{place}; its steps, tokens and seconds count those before")
    if parent := run.read("parent.json"):
        say(f"began with the weights of step {parent['step']} of {parent['run']} ({parent['study']}/{parent['name']})")
    if came := run.read("imported.json"):
        say(f"imported from {came['source']} ({came['kind']})" + (f", commit {came['commit']}" if came.get("commit") else ""))
    done, failed, environment = run.read("done.json"), run.read("failed.json"), run.read("environment.json") or {}
    if done:
        say(f"done {done['finished']} by gptlab sources {done['source']}")
    if failed:
        say((f"failed {failed['time']}: {failed['message']} (exit {failed['code']}); the traceback is in log.txt", "red"))
    if environment:
        packages = environment.get("packages", {})
        hardware = environment.get("hardware", {})
        versions = f"gptlab {packages.get('gptlab')}, torch {packages.get('torch')}, python {environment.get('python')}"
        place = f"{hardware.get('gpu') or hardware.get('cpu')} ({hardware.get('device')}, {hardware.get('threads')} threads)"
        say((f"{versions}, {place}", "dim"))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("key")
    shown.add_column("value", overflow="fold")
    for key, value in codec.flatten(config).items():
        shown.add_row(key, _value(value))
    console.print(shown)
    latest: dict[str, Any] = {}
    for line in run.metrics():
        latest.update(line)
    for key, value in latest.items():
        say(f"  {key:<26} {value:,.6g}" if isinstance(value, float) else f"  {key:<26} {value}")


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (str, list, dict)) or value is None else str(value)


def remove(reference: str, *, yes: bool) -> None:
    """Delete a run, after asking."""
    run = find_run(reference)
    if not yes and not typer.confirm(f"delete {run.directory.resolve()} ({run.state})?"):
        say("kept")
        return
    remove_run(run)
    say(f"deleted {run.directory}")


def fetch(url: str, *, all_checkpoints: bool, force: bool) -> None:
    """Bring a mirrored run back, and say where it is."""
    from gptlab.runner.fetch import fetch as bring

    run = bring(url, runs_root(), all_checkpoints=all_checkpoints, force=force)  # says where the run is now
    say("it is done; `gptlab sample` lets it write" if run.state == "done" else "the command that trained it resumes it here")


@dataclass(frozen=True)
class _Checked:
    """A checkpoint: what is on the disk, what is wrong with it (None: every hash matches), files its manifest does not know."""

    name: str
    step: int
    files: int
    bytes: int
    problem: str | None
    unknown: list[str]


def verify(reference: str, *, as_json: bool) -> None:
    """Check every hash of every checkpoint of a run, and that its other files can be read. Raises CheckpointError for what is damaged."""
    load_components()
    run = _run_at(reference)
    state = run.state
    found = [c for d in checkpoint.checkpoints(run.checkpoints) if (c := _checked(d, state == "running")) is not None]
    files, notes = _files(run, state, bool(found))
    for one in found:
        more = f" and {len(one.unknown) - LISTED} more" if len(one.unknown) > LISTED else ""
        if one.unknown:
            notes.append(f"{one.name}: not in its manifest, and never read: {', '.join(one.unknown[:LISTED])}{more}")
    if state != "running":
        half = sorted(d.name for d in run.checkpoints.glob(".*.part"))
        notes += [f"checkpoints/{name}: left half-made by a crash; it is no checkpoint, and is never read" for name in half]
    newest = next((c.name for c in found if c.problem is None), None)
    said = _damage(run, state, found, files, newest)
    if as_json:
        told = {"run": str(run.directory), "state": state, "whole": said is None, "newest_whole": newest, "files": files, "notes": notes}
        print(json.dumps(told | {"checkpoints": [asdict(c) for c in found]}, indent=1))
    else:
        _print_checked(run, state, found, files, notes)
        if said is None and not found:
            say("no checkpoint yet")
        elif said is None:
            say(("✓", "green"), f" {len(found)} checkpoint{'s' * (len(found) > 1)}, whole; the newest is of step {found[0].step:,}")
    if said is not None:
        raise CheckpointError(said)


def _run_at(reference: str) -> Run:
    """As `find_run`; a folder with checkpoints is a run even when its config.json is damaged."""
    folder = Path(reference)
    return Run(folder) if (folder / "checkpoints").is_dir() else find_run(reference)


def _checked(folder: Path, running: bool) -> _Checked | None:
    """A checkpoint, every file hashed; None for one that its trainer deleted meanwhile."""
    wrong = checkpoint.problem(folder)
    files = [f for f in folder.rglob("*") if f.is_symlink() or not f.is_dir()]
    size = sum(f.lstat().st_size for f in files if f.is_symlink() or f.exists())
    if running and not (folder / checkpoint.MANIFEST).exists():
        return None
    try:
        known = {checkpoint.MANIFEST, *checkpoint.manifest_of(folder)["files"]}
        unknown = sorted({str(f.relative_to(folder)) for f in files} - known)
    except CheckpointError:  # `wrong` says so
        unknown = []
    return _Checked(folder.name, checkpoint.step_of(folder), len(files), size, wrong, unknown)


def _files(run: Run, state: str, kept: bool) -> tuple[dict[str, str | None], list[str]]:
    """What is wrong with a run's config, tokeniser and metrics (None: nothing), and what is only worth a note."""
    found: dict[str, str | None] = {"config.json": None}
    notes: list[str] = []
    config, tokenizer, metrics = (run.directory / name for name in ("config.json", "tokenizer.json", "metrics.jsonl"))
    try:
        codec.from_json(json.loads(config.read_text(encoding="utf-8")), "config.json")
    except (GptlabError, OSError, ValueError, AttributeError) as error:
        found["config.json"] = _told(error)
    if kept or tokenizer.exists():  # it is written when training begins
        found["tokenizer.json"] = None
        try:
            from_json(json.loads(tokenizer.read_text(encoding="utf-8")), "tokenizer.json")
        except IOFailure as error:  # a known tokeniser's vocabulary cannot be fetched now: nothing of the run is damaged
            notes.append(str(error))
        except (GptlabError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found["tokenizer.json"] = _told(error)
    if state == "done" or metrics.exists():
        found["metrics.jsonl"] = None
        try:
            lines = metrics.read_text(encoding="utf-8").splitlines()
            bad = [number for number, line in enumerate(lines, 1) if not _is_json(line)]
        except (OSError, ValueError) as error:
            found["metrics.jsonl"] = _told(error)
            return found, notes
        if bad == [len(lines)] and state != "done":
            notes.append("metrics.jsonl: its last line was cut off, and is passed over")
        elif bad:
            found["metrics.jsonl"] = f"line {bad[0]} is not JSON"
    return found, notes


def _told(error: Exception) -> str:
    if isinstance(error, GptlabError):
        return str(error)
    if isinstance(error, OSError):
        return "it is missing" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error.strerror})"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start:,})"
    return "it is not JSON" if isinstance(error, json.JSONDecodeError) else "it is JSON, but not what gptlab writes"


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _damage(run: Run, state: str, found: list[_Checked], files: dict[str, str | None], newest: str | None) -> str | None:
    """What is damaged or missing, and what a resume would take, in a sentence; None if all is well."""
    said = [f"{c.name} is damaged: {c.problem}" for c in found if c.problem is not None]
    if said:
        none = "no whole one is left to resume from: the command that trained the run, with --rerun, starts over"
        said.append(f"resume, sample and export take {newest}, the newest whole one" if newest else none)
    elif not found and state not in ("new", "running"):
        said.append(f"{run.directory} is {state} and holds no checkpoint: there is nothing to resume, sample or export")
    said += [f"{name}: {wrong}" for name, wrong in files.items() if wrong is not None]
    return "; ".join(said) or None


def _print_checked(run: Run, state: str, found: list[_Checked], files: dict[str, str | None], notes: list[str]) -> None:
    say((str(run.directory), "bold"), f"  {state}")
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("checkpoint", "files", "size", "result"):
        shown.add_column(name, justify="right" if name in ("files", "size") else "left", no_wrap=name != "result")
    for one in found:
        result = Text("whole", "green") if one.problem is None else Text(one.problem, "red")
        shown.add_row(one.name, str(one.files), decimal(one.bytes), result)
    for name, wrong in files.items():
        size = decimal((run.directory / name).stat().st_size) if (run.directory / name).exists() else ""
        shown.add_row(name, "", size, Text("can be read", "green") if wrong is None else Text(wrong, "red"))
    console.print(shown)
    for note in notes:
        say((f"note: {note}", "yellow"))
