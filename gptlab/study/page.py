"""A comparison as one self-contained page: curves to explore, verdicts, what differs, samples, cost, and how each arm is made again.

The page asks nothing of a network. Its data are a JSON text within it, with columns of numbers as `packed` makes them.
"""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptlab.config import codec
from gptlab.config.errors import IOFailure
from gptlab.runner.run import Run, find_study
from gptlab.study.compare import METRIC, Arm, Comparison, gather
from gptlab.study.report import remarks
from gptlab.tracker.jsonl import NOT_FINITE, finite

ASSETS = Path(__file__).with_name("assets")
AXES = ("step", "tokens", "flops", "seconds")
MOST_POINTS = 2_000  # of a curve; of more every second, third, … is taken, the last among them
LONG = 200  # points from which a column is written in steps
NONE = 65_535  # in such a column: not a number
LONGEST_SAMPLE = 1_500  # characters
NOT_COMPARED = ("seed", "seeds", "study", "name", "arm", "trainer.start")  # of a config: what tells runs apart, and not arms

Column = dict[str, float | int | str]


def page(study: str, found: Comparison | None, *, live: bool = False) -> str:
    """The HTML of a study's comparison. `live`: with the runs that are not done; `found` may then be None, where none is."""
    gathered, left_out = gather(study)
    order = {row.label: i for i, row in enumerate(found.rows if found else ())}
    shown = sorted((a for a in gathered if live or a.label in order), key=lambda a: order.get(a.label, len(order)))
    name = find_study(study)
    data = {
        "comparison": found.to_json() if found else {"study": name, "metric": METRIC, "rows": []},
        "remarks": remarks(found) if found else left_out,
        "axes": AXES,
        "arms": [_arm(arm, name, live) for arm in shown],
        "differences": differences({arm.label: _first(arm) for arm in shown}),
        "made": _made(shown),
        "live": live,
    }
    return assembled("page.html", name, data, styles=("page.css",), scripts=("common.js", "page.js"))


def assembled(body: str, title: str, data: dict[str, Any], *, styles: Sequence[str], scripts: Sequence[str]) -> str:
    """One HTML text of the assets named, with the data as a JSON text within it."""
    text = json.dumps(finite(data), separators=(",", ":"), allow_nan=False, default=str)
    text = text.replace("<", "\\u003c")  # no tag can end the script
    style, script = ("\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names) for names in (styles, scripts))
    filled = (ASSETS / body).read_text(encoding="utf-8").replace("{{title}}", html.escape(title)).replace("{{style}}", style)
    return filled.replace("{{script}}", script).replace("{{data}}", text)  # the data last: nothing in them is a place to fill


def write_page(file: Path, study: str, found: Comparison) -> Path:
    """Write the page, whole or not at all. Raises IOFailure."""
    return write_whole(file, page(study, found))


def write_whole(file: Path, made: str) -> Path:
    """Write a page, whole or not at all, in a folder that is made where there is none. Raises IOFailure."""
    partial = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(made, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise IOFailure(f"{file} could not be written ({error.strerror})") from error
    return file


def _first(arm: Arm) -> Run:
    runs = arm.runs or arm.open
    return runs[min(runs)]


def _arm(arm: Arm, study: str, live: bool) -> dict[str, Any]:
    runs = {**arm.runs, **(arm.open if live else {})}
    first = min(arm.runs or runs)
    samples = sorted((runs[first].directory / "samples").glob("*.txt"))
    sample = samples[-1].read_text(encoding="utf-8", errors="replace").strip("\n")[:LONGEST_SAMPLE] if samples else ""
    return {
        "label": arm.label,
        "command": command(arm, study),
        "sample": sample,
        "sample_seed": first,
        "runs": [
            {"seed": seed, "identity": run.identity, "state": "done" if seed in arm.runs else run.state, "curves": curves(run)}
            for seed, run in sorted(runs.items())
        ],
    }


def command(arm: Arm, study: str) -> str | None:
    """The command that trains an arm with all its seeds again, of an experiment's arm a line a seed, since the experiment sweeps over the
    other arms as well. None where no `gptlab train` made it."""
    if not arm.overrides:
        return None
    kept = [o for o in arm.overrides if o.lstrip("+~").partition("=")[0] not in ("seed", "study", "trainer.mirror")]
    seeds = [str(seed) for seed in sorted(arm.runs or arm.open)]
    if any(o.startswith("experiment=") for o in kept):
        calls = [["hydra.mode=RUN", *kept, f"seed={seed}"] for seed in seeds]
    else:
        calls = [[*(["-m"] if len(seeds) > 1 else []), *kept, f"seed={','.join(seeds)}"]]
    return "\n".join(shlex.join(["gptlab", "train", *call, f"study={study}"]) for call in calls)


def curves(run: Run) -> dict[str, dict[str, Column]]:
    """By metric the columns of its curve: the axes, and `y`. Rates and memory, which the tables tell, are left out."""
    columns: dict[str, list[list[float]]] = {}
    for line in run.metrics():
        axes = [float(line.get(axis, "nan")) for axis in AXES]
        for name, value in line.items():
            if name in AXES or "/" not in name or name.startswith(("memory/", "data/", "machine/", "train/learning_rate")):
                continue
            if name != "train/tokens_per_second" and (not isinstance(value, str) or value in NOT_FINITE):
                columns.setdefault(name, []).append([*axes, float(value)])
    return {name: _curve(np.array(rows)) for name, rows in columns.items()}


def _curve(rows: npt.NDArray[np.float64]) -> dict[str, Column]:
    if len(rows) > MOST_POINTS:
        rows = rows[::-1][:: -(-len(rows) // MOST_POINTS)][::-1]
    return {name: packed(rows[:, i], exact=name == "step") for i, name in enumerate((*AXES, "y"))}


def packed(values: npt.NDArray[np.float64], *, exact: bool = False) -> Column:
    """A column in few bytes: equal steps by their ends; a short one, or one that has to be `exact` (seeds are matched by their steps), in
    float32; a long one in 65,535 steps from its lowest value to its highest. What is not a number stays none."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    if len(finite) == len(values) and np.allclose(values, np.linspace(values[0], values[-1], len(values)), rtol=1e-7, atol=0):
        return {"n": len(values), "first": float(values[0]), "last": float(values[-1])}
    if exact or len(values) < LONG:
        return {"f4": encoded(np.where(np.isfinite(values), values, np.nan).astype("<f4"))}
    steps = np.where(np.isfinite(values), (values - low) / ((high - low) or 1.0) * (NONE - 1), NONE)
    return {"low": low, "high": high, "u2": encoded(steps.round().astype("<u2"))}


def encoded(values: npt.NDArray[Any] | bytes) -> str:
    """Base64 of an array's bytes, as they lie."""
    return base64.b64encode(values if isinstance(values, bytes) else values.tobytes()).decode()


def differences(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """The settings in which the arms differ: of each its key and its values in the order of the arms (None: the arm has no such key)."""
    flat = [codec.flatten_written((run.read("config.json") or {}).get("config", {})) for run in runs.values()]
    keys = [key for key in dict.fromkeys(key for settings in flat for key in settings) if not _told_elsewhere(key)]
    found = [{"key": key, "values": [settings.get(key) for settings in flat]} for key in keys]
    return [row for row in found if len({json.dumps(v) for v in row["values"]}) > 1]


def _told_elsewhere(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NOT_COMPARED) or key.startswith(("tracker", "callbacks"))


def _made(arms: Sequence[Arm]) -> dict[str, Any]:
    """Where and by what the runs were made; several answers to a question stand side by side."""
    environments = [run.read("environment.json") or {} for arm in arms for run in (*arm.runs.values(), *arm.open.values())]
    hardware = [e.get("hardware", {}) for e in environments]
    told = {
        "gptlab": [e.get("packages", {}).get("gptlab") for e in environments],
        "torch": [e.get("packages", {}).get("torch") for e in environments],
        "hardware": [f"{h.get('gpu') or h.get('cpu')} ({h.get('device')})" for h in hardware],
        "sources": [str(e.get("source"))[:12] for e in environments],
    }
    return {name: ", ".join(sorted({str(v) for v in values if v})) for name, values in told.items()}
