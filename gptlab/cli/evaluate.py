"""`gptlab evaluate`: what runs make of their held-out sets, or of any text, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from gptlab.cli.benchmarks import Asked, score
from gptlab.cli.evaluate_chats import show_chats
from gptlab.cli.memory import show_by_heart
from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import component_of
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.data.reader import read_file
from gptlab.data.tokenizer import digest, to_json
from gptlab.evaluate.figures import Figures, Group, figures
from gptlab.evaluate.losses import of_set, of_text
from gptlab.evaluate.memory import NGRAM, Contamination, Copied
from gptlab.evaluate.memory import contamination as contaminated
from gptlab.evaluate.memory import memorised as longest_copies
from gptlab.generate.weights import PRECISIONS, for_generation
from gptlab.hardware.device import machine
from gptlab.runner.load import Loaded, load
from gptlab.tracker.console import PreparationProgress, console, say

ANSWER_TOKENS = 200  # of --chats
LONGEST = 24  # letters of a run's name in a table
HEAD = ("tokens", "loss", "perplexity", "bits/byte", "right", "off by")


def evaluate(
    runs: Sequence[str],
    *,
    files: Sequence[Path],
    stride: int,
    tokens: int,
    checkpoint: str,
    weights: str,
    device: str,
    precision: str,
    as_json: bool,
    tasks: str = "",
    folder: Path | None = None,
    shots: int | None = None,
    limit: int = 0,
    probes: str = "",
    memorised: bool = False,
    contamination: bool = False,
    ngram: int = NGRAM,
    chats: Path | None = None,
    answer_tokens: int = ANSWER_TOKENS,
) -> None:
    """Print the figures of each run on each of its held-out sets, on `files`, on benchmark `tasks` or on `probes`. Raises ConfigError,
    DataError, CheckpointError or IOFailure."""
    if device.split(":")[0] not in machine().devices:
        raise ConfigError(f"--device {device}: this machine has {', '.join(machine().devices)}")
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision} is not one of {', '.join(PRECISIONS)}")
    if tokens < 0:
        raise ConfigError(f"--tokens {tokens} must be at least 0 (0: all)")
    if stride and not files:
        raise ConfigError("--stride goes with --text: a held-out set is measured in the windows of training")
    if memorised or contamination:
        _by_heart(
            runs,
            files,
            stride,
            tokens,
            as_json,
            tasks=tasks,
            probes=probes,
            memorised=memorised,
            ngram=ngram,
            at=(checkpoint, weights, device),
            precision=precision,
        )
        return
    if chats is None and answer_tokens != ANSWER_TOKENS:
        raise ConfigError("--answer-tokens goes with --chats")
    if ngram != NGRAM:
        raise ConfigError("--ngram goes with --contamination")
    if (tasks or probes) and (files or tokens):
        raise ConfigError("--tasks and --probes go without --text and --tokens; --limit bounds the examples of each")
    if not tasks and (folder is not None or shots is not None):
        raise ConfigError("--task-folder and --shots go with --tasks")
    if limit and not (tasks or probes or chats):
        raise ConfigError("--limit goes with --tasks, --probes and --chats; --tokens bounds a text")
    if limit < 0 or (shots is not None and shots < 0):
        raise ConfigError(f"--limit {limit} and --shots {shots} must be at least 0")
    if chats is not None:
        if files or tokens or tasks or probes:
            raise ConfigError("--chats goes without --text, --tokens, --tasks and --probes; --limit bounds its questions")
        opened = _opened(runs, checkpoint, weights, device, precision)
        show_chats(opened, str(chats), limit=limit, max_tokens=answer_tokens, as_json=as_json)
        return
    if tasks or probes:
        asked = Asked(_listed(tasks), _listed(probes), folder, shots, limit)
        score(_opened(runs, checkpoint, weights, device, precision), asked, precision, as_json)
        return
    texts = {str(file): _documents(file) for file in files}
    found: list[tuple[str, str, Figures]] = []
    told: dict[str, dict[str, str]] = {}
    for reference in runs:
        loaded = load(reference, checkpoint=checkpoint, weights=weights, device=device)
        for_generation(loaded.model, precision)
        name = _name(loaded, reference, [one[0] for one in found])
        told[name] = {"tokenizer": digest(to_json(loaded.tokenizer)), "context": str(loaded.config.model.context_length)}
        if texts:
            for file, documents in texts.items():
                with console.status(f"{name} on {file}"):
                    losses = of_text(loaded.model, loaded.tokenizer, documents, stride=stride, limit=tokens)
                found.append((name, Path(file).name, figures(losses)))
        else:
            found += [(name, *one) for one in _held_out(loaded, reference, name, tokens, told[name])]
    if as_json:
        print(json.dumps([{"run": run, "text": text, **one.to_json()} for run, text, one in found], indent=1, allow_nan=False, default=str))
        return
    _show(found, told)


def _opened(runs: Sequence[str], checkpoint: str, weights: str, device: str, precision: str) -> dict[str, Loaded]:
    """The runs by the names they have in a table, all of them opened before any is made ready."""
    opened = [(reference, load(reference, checkpoint=checkpoint, weights=weights, device=device)) for reference in runs]
    named: dict[str, Loaded] = {}
    for reference, loaded in opened:
        for_generation(loaded.model, precision)
        named[_name(loaded, reference, list(named))] = loaded
    return named


def _by_heart(
    runs: Sequence[str],
    files: Sequence[Path],
    stride: int,
    tokens: int,
    as_json: bool,
    *,
    tasks: str,
    probes: str,
    memorised: bool,
    ngram: int,
    at: tuple[str, str, str],
    precision: str,
) -> None:
    if tasks or probes or tokens or stride:
        raise ConfigError("--memorised and --contamination go without --tasks, --probes, --tokens and --stride")
    if memorised and (files or ngram != NGRAM):
        raise ConfigError("--memorised looks at what the run itself writes: --text and --ngram go with --contamination alone")
    if not memorised and not files:
        raise ConfigError('--contamination needs --text FILE: a text, or a benchmark\'s examples as JSON lines, one {"text": …} each')
    texts = {Path(file).name: _documents(file) for file in files}
    checkpoint, weights, device = at
    found: list[tuple[str, Copied | tuple[str, Contamination]]] = []
    names: list[str] = []
    for reference in runs:
        loaded = load(reference, checkpoint=checkpoint, weights=weights, device=device)
        for_generation(loaded.model, precision)
        names.append(_name(loaded, reference, names))
        data = prepared_of(loaded, reference)
        with console.status(f"{names[-1]}: looking through its training text"):
            if memorised:
                found += [(names[-1], row) for row in longest_copies(loaded.model, data)]
            else:
                found += [(names[-1], (name, contaminated(data, documents, ngram))) for name, documents in texts.items()]
    show_by_heart(found, as_json)


def _listed(asked: str) -> list[str]:
    return [name.strip() for name in asked.split(",") if name.strip()]


def _documents(file: Path) -> list[str]:
    """The documents of a file; a row's is one, and a plain file is one."""
    if not file.is_file():
        raise ConfigError(f"--text {file}: there is no such file")
    made: list[str] = []
    begun = False
    for piece in read_file(file):
        if begun:
            made[-1] += piece.text
        else:
            made.append(piece.text)
        begun = not piece.last
    made = [text for text in made if text]
    if not made:
        raise DataError(f"--text {file} holds no text")
    return made


def prepared_of(loaded: Loaded, reference: str) -> Prepared:
    """The data that a run was trained on. Raises ConfigError where it has none, DataError where they are not what they were."""
    data = loaded.config.data
    if component_of(data.corpus).name == "none" or loaded.run is None:
        raise ConfigError(f"{reference} has no text of its own, held out or trained on: --text FILE names one to measure")
    with PreparationProgress() as progress:
        prepared = prepare(data, report=progress.update)
    written = (loaded.run.read("data.json") or {}).get("hash")
    if written is not None and written != prepared.hash:
        raise DataError(f"{reference} was trained on a text that has changed since: bring back the text of then, or --text FILE")
    return prepared


def _held_out(loaded: Loaded, reference: str, name: str, tokens: int, told: dict[str, str]) -> list[tuple[str, Figures]]:
    prepared = prepared_of(loaded, reference)
    data = loaded.config.data
    told["data"] = prepared.hash
    found = []
    for set_name in prepared.validation_names:
        if set_name == "val" and prepared.parts:
            continue  # its sources' sets together
        with console.status(f"{name} on {set_name}"):
            found.append((set_name, figures(of_set(loaded.model, prepared, set_name, limit=tokens or data.validation_tokens))))
    return found


def _name(loaded: Loaded, reference: str, known: Sequence[str]) -> str:
    """What a run is called in the tables: its arm, its name or what it was asked for by, the first that is short and its own."""
    if loaded.run is None:
        return Path(reference).name
    asked = "" if reference == "latest" or Path(reference).is_dir() else reference.rpartition("/")[2]
    names = (name for name in (loaded.config.arm, loaded.run.name, asked) if name and len(name) <= LONGEST and name not in known)
    return next(names, loaded.run.identity)


def _show(found: Sequence[tuple[str, str, Figures]], told: dict[str, dict[str, str]]) -> None:
    several = len({text for _, text, _ in found}) > 1
    table = Table(title=None if several else f"on {found[0][1]}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("run", *(["text"] if several else [])):
        table.add_column(head, overflow="fold")
    for head in HEAD:
        table.add_column(head, justify="right", no_wrap=True)
    for run, text, one in found:
        per_byte = "" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"
        cells = f"{one.tokens:,}", f"{one.loss:.4f}", _perplexity(one.perplexity), per_byte, f"{one.accuracy:.1%}"
        table.add_row(run, *([text] if several else []), *cells, f"{one.calibration_error:.1%}")
    console.print(table)
    say(("right: the token was the likeliest; off by: how sure the model was, from how often rightly, on average", "dim"))
    if len({t["tokenizer"] for t in told.values()}) > 1:
        say(("the runs have different tokenisers: a loss is of a run's own tokens; compare bits/byte", "yellow"))
    if len({t["context"] for t in told.values()}) > 1:
        say(("the runs have different contexts: a longer one sees more before each token", "yellow"))
    if len({t.get("data", "") for t in told.values()}) > 1:
        say(("the runs were trained on different data: their held-out sets are different texts; --text FILE gives all the same", "yellow"))
    for text in dict.fromkeys(text for _, text, _ in found):
        here = [(run, one) for run, name, one in found if name == text]
        beside = f" of {text}" if several else ""
        _groups(f"loss{beside} by how many tokens came before", [(run, one.by_place) for run, one in here])
        _groups(f"loss{beside} by the token's share of the text", [(run, one.by_frequency) for run, one in here])
        if any(one.by_length for _, one in here):
            _groups(f"loss{beside} by the length of the document", [(run, one.by_length) for run, one in here])
        _calibration(f"how sure the model was{beside}, and how often rightly", here)


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}" if math.isfinite(value) else "∞"


def _groups(title: str, columns: Sequence[tuple[str, Sequence[Group]]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("tokens", justify="right")
    for run, _ in columns:
        table.add_column(run, justify="right", overflow="fold")
    names = dict.fromkeys(group.name for _, groups in columns for group in groups)
    by_run: list[dict[str, Group]] = [{group.name: group for group in groups} for _, groups in columns]
    for name in names:
        counts = sorted({groups[name].tokens for groups in by_run if name in groups})
        shown = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        table.add_row(name, shown, *(f"{groups[name].loss:.4f}" if name in groups else "" for groups in by_run))
    console.print(table)


def _calibration(title: str, columns: Sequence[tuple[str, Any]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("sure")
    for run, _ in columns:
        table.add_column(run, justify="right", overflow="fold")
    names = [f"{i * 10} to {i * 10 + 10} %" for i in range(10)]
    rows: dict[str, list[str]] = {name: [""] * len(columns) for name in names}
    for i, (_, one) in enumerate(columns):
        for bin_ in one.calibration:
            rows[names[min(9, int(bin_.sure * 10))]][i] = f"{bin_.right:.1%} of {bin_.tokens:,}"
    for name, cells in rows.items():
        if any(cells):
            table.add_row(name, *cells)
    console.print(table)
