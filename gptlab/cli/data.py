"""What `gptlab data prepare` and `report` do and print."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich import box
from rich.padding import Padding
from rich.table import Table

from gptlab.cli import data_tokenizer
from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError, Stopped
from gptlab.config.registry import build, component, components
from gptlab.config.schema import Config
from gptlab.data import report as figures
from gptlab.data.learn import learned_tokenizer, sample, tokenizer_file
from gptlab.data.mix import Mix
from gptlab.data.pipeline import pieces_from
from gptlab.data.prepare import prepare as prepare_data
from gptlab.data.prepared import Prepared
from gptlab.data.tokenizer import Tokenizer, from_json
from gptlab.data.tokenizer_report import SAMPLE_BYTES, tokens_of
from gptlab.tracker.console import PreparationProgress, console, say

BAR = 24  # characters of the longest bar of a histogram
SHOWN = 300  # characters of a document


def _composed(overrides: Sequence[str]) -> Config:
    return compose(list(overrides))


def prepare(overrides: Sequence[str]) -> None:
    """Prepare the data of a config, all of it, and say what there is now."""
    config = _composed(overrides)
    signal.signal(signal.SIGTERM, _stop)
    started = time.perf_counter()
    with PreparationProgress(lines=True) as progress:
        try:
            made = prepare_data(config.data, report=progress.update)
        except KeyboardInterrupt:
            raise Stopped("stopped; what is written of a large text is kept, and the same command goes on from there") from None
    seconds = time.perf_counter() - started
    if made.task is not None:
        say(f"{made.task.name} is generated while it is trained on; there is nothing to prepare")
        return
    for part in _parts(made).values():
        for split in part.splits:
            part.stream(split)  # what was damaged since is told now, not when it is trained on
    console.print(_splits(made))
    for name, part in _parts(made).items():
        there = part.split_counts("train")["tokens"]
        if part.limit is not None and there > part.limit:
            say(f"{name}: training uses the first {part.limit:,} of these tokens (data.corpus.tokens)")
        for what, title in (("skipped", "rows without text"), ("removed", "documents taken out")):
            counts: Counter[str] = Counter()
            for split in part.splits:
                counts.update(part.split_counts(split)[what])
            if counts:
                say(f"{name}: " if made.parts else "", f"{title}: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()))
    speed = f", {progress.bytes / progress.seconds / 1e6:.1f} MB/s while tokenising" if progress.seconds > 1 else ""
    say(f"{made.folder}  ", (f"{seconds:.1f} s{speed}" if progress.worked else "was there already", "dim"))


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parts(made: Prepared) -> dict[str, Prepared]:
    return made.parts or {made.manifest["corpus"]: made}


def _splits(made: Prepared) -> Table:
    tokenizer = made.manifest["tokenizer"]
    title = f"{tokenizer['name']}, {tokenizer['vocabulary']:,} tokens"
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("set", "documents", "tokens", "bytes", "bytes/token", "weight"):
        if name != "weight" or made.parts:
            shown.add_column(name, justify="left" if name == "set" else "right", no_wrap=True)
    rows = [(f"{n} " if made.parts else "", p, s) for n, p in _parts(made).items() for s in p.splits]
    rows += [("", made, s) for s in made.extra_sets if made.parts]
    for source, part, split in rows:
        counts = part.split_counts(split)
        weight = [f"{made.weights[source.strip()]:.3f}" if split == "train" else ""] if made.parts and source else []
        ratio = f"{counts['bytes'] / counts['tokens']:.2f}" if counts["tokens"] else ""
        shown.add_row(f"{source}{split}", *(f"{counts[k]:,}" for k in ("documents", "tokens", "bytes")), ratio, *weight)
    return shown


def report(overrides: Sequence[str], *, as_json: bool, documents: int, rows: int) -> None:
    """Say what the data of a config are, and show some."""
    config = _composed(overrides)
    with PreparationProgress() as progress:
        made = prepare_data(config.data, report=progress.update)
    context, packing, seed = config.model.context_length, config.data.packing, config.seeds.data or config.seed
    if made.task is not None and as_json:
        best = made.task.best_loss(context)
        told = {"hash": made.hash, "tokenizer": made.manifest["tokenizer"], "task": made.task.fingerprint(), "best_loss": best}
        print(json.dumps(told, indent=1))
        return
    if made.task is not None:
        _report_task(made, context, seed, rows)
        return
    found = figures.describe(made, context, packing, seed)
    if as_json:
        print(json.dumps({"hash": made.hash, "tokenizer": made.manifest["tokenizer"], "sources": [asdict(f) for f in found]}, indent=1))
        return
    console.print(_splits(made))
    for source in found:
        _print_source(source, context, bool(made.parts))
    if documents:
        say(("\na few documents", "bold"))
        for name, number, text in figures.documents(made, documents, seed):
            say((f"{name} {number:,}", "cyan"), (f"  {len(text):,} characters", "dim"))
            console.print(text[:SHOWN].strip() + ("…" if len(text) > SHOWN else ""), markup=False, highlight=False)
            say()
    if rows:
        said = f"  packing={packing}; ⏎ marks where a document begins"
        said = "  whole chats; what is scored is bright, ⏎ marks where a chat begins" if made.chat else said
        say((f"\nthe first {rows} training rows of {context} tokens", "bold"), (said, "dim"))
        found_rows = figures.rows(made, context, packing, seed, rows)
        print_rows(found_rows, made.tokenizer, most=SHOWN, named=len({row.source for row in found_rows}) > 1)


def _report_task(made: Prepared, context: int, seed: int, rows: int) -> None:
    task = made.task
    assert task is not None
    say((task.name, "bold"), f"  generated; {len(task.alphabet)} symbols: {task.alphabet}")
    say(f"the best possible loss at context {context}: {task.best_loss(context):.4f} nats per scored token")
    found = figures.rows(made, context, "concatenate", seed, max(rows, 1))
    say(f"scored: {np.mean([row.scored for row in found]):.1%} of the tokens, the answers (^)")
    for row in found:
        print_scored(row, made.tokenizer)


def _print_source(source: figures.SourceFigures, context: int, mixed: bool) -> None:
    say((f"\n{source.name}", "bold"), f"  {source.share:.1%} of the training tokens" if mixed else "")
    if source.documents == 1:
        say(f"  one document of {source.tokens:,} tokens")
    else:
        _print_lengths(source, context)
    say(
        f"  duplicates: {source.duplicates:,} of {source.searched:,} documents are token for token an earlier one"
        + ("" if source.searched == source.documents else f" (the first {source.searched:,} were compared)")
    )
    for name, share in source.overlap.items():
        if share or name == "val":
            said = "none of it stands" if share == 0 else f"{share:.1%} of its stretches stand"
            say(f"  held-out set {name}: {said} in the training text", "" if share <= 0.01 else (" (leaked, or said often)", "yellow"))
    for what, counts in (("rows without text", source.skipped), ("documents taken out", source.removed)):
        if counts:
            say(f"  {what}: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()))
    if source.chats:
        say(f"  {source.chats}; the assistant wrote {source.written:.1%} of the tokens, which alone are scored")
    if source.dropped is not None:
        say(f"  best_fit packing drops {source.dropped:.1%} of the tokens: what of a document does not fit its row")


def _print_lengths(source: figures.SourceFigures, context: int) -> None:
    lengths = source.lengths
    say(
        f"  a document has {lengths['0.5']:,.0f} tokens (median), {lengths['mean']:,.0f} (mean), "
        f"{lengths['0.05']:,.0f} to {lengths['0.95']:,.0f} (nine in ten), at most {lengths['1']:,.0f}; "
        f"{source.longer:.1%} are longer than a row of {context:,}"
    )
    most = max((n for _, n in source.histogram), default=1)
    for up_to, count in source.histogram:
        say(f"  up to {up_to:>9,}  {count:>11,}  ", ("█" * max(1 if count else 0, round(BAR * count / most)), "cyan"))


def print_rows(
    rows: Sequence[figures.Row], tokenizer: Tokenizer, *, start: int = 1, most: int | None = None, named: bool = False, tokens: bool = False
) -> None:
    """Rows with ⏎ before each further document, numbered from `start`; of a task with what is scored.

    `most`: characters of a document that are shown; None: all. `named`: with the source. `tokens`: token by token, with their ids.
    """
    for number, row in enumerate(rows, start):
        said = "" if row.scored is not None else f"  {len(row.parts)} document{'s' * (len(row.parts) > 1)}"
        say((f"{number}" + (f" {row.source}" if named else ""), "cyan"), (said, "dim"))
        if row.scored is not None and row.cuts is not None and getattr(tokenizer, "special", None):
            print_chats(row, tokenizer)
        elif row.scored is not None:
            print_scored(row, tokenizer)
        elif not tokens:
            parts: list[str | tuple[str, str]] = []
            for place, part in enumerate(row.parts):
                shown = part if most is None or len(part) <= most else f"{part[: most // 2]} […] {part[-most // 2 :]}"
                parts += [("⏎", "bold yellow"), shown] if place else [shown]
            say(*parts)
        if tokens:
            _print_tokens(row, tokenizer)
        say()


def print_scored(row: figures.Row, tokenizer: Tokenizer) -> None:
    """A row of a task, and under it a ^ for each scored token."""
    assert row.scored is not None
    say("  " + tokenizer.decode(row.tokens))
    say(("   " + "".join("^" if scored else " " for scored in row.scored), "dim"))


def print_chats(row: figures.Row, tokenizer: Tokenizer) -> None:
    """A row of chats, what the assistant wrote in bright green; without colours between ›these‹."""
    assert row.scored is not None
    scored, borders = [False, *row.scored], set(row.cuts)
    parts: list[str | tuple[str, str]] = []
    plain = console.color_system is None or console.no_color
    begin = 0
    for at in range(1, len(row.tokens) + 1):
        if at < len(row.tokens) and at not in borders and scored[at] == scored[begin]:
            continue
        text = tokenizer.decode(row.tokens[begin:at])
        if begin in borders:
            parts.append(("⏎", "bold yellow"))
        parts.append((f"›{text}‹" if plain else text, "bold green") if scored[begin] else (text, "dim"))
        begin = at
    say(*parts)


def _print_tokens(row: figures.Row, tokenizer: Tokenizer) -> None:
    borders = [0, *row.cuts, len(row.tokens)]
    for begin, end in pairwise(borders):
        ids = row.tokens[begin:end]
        if begin:
            say(("⏎", "bold yellow"))
        shown = data_tokenizer.coloured(tokens_of(tokenizer, ids), colour=console.color_system is not None and not console.no_color)
        console.print(Padding(shown, (0, 0, 0, 2), expand=False), soft_wrap=False)
        console.print(Padding(" ".join(map(str, ids)), (0, 0, 0, 2), expand=False), style="dim", soft_wrap=False)


def tokenizer_train(overrides: Sequence[str], *, out: Path | None, as_json: bool) -> None:
    """Train the tokeniser of a config on its corpus, and say what it learned."""
    config = _composed(overrides)
    corpus = build(config.data.corpus)
    sources = corpus.sources if isinstance(corpus, Mix) else {"": corpus}
    tokenizer: Tokenizer = build(config.data.tokenizer)
    file = out or tokenizer_file(config.data, sources)
    with PreparationProgress() as progress:
        if getattr(tokenizer, "learns", False):
            texts: Iterator[str] = sample(config.data, sources, int(tokenizer.characters), progress.reading)  # type: ignore[attr-defined]
        else:
            texts = (piece.text for source in sources.values() for piece, _ in pieces_from(source, None))
        data_tokenizer.train(texts, tokenizer, config.data.tokenizer, out=file, as_json=as_json)


def tokenizer_report(overrides: Sequence[str], *, compare: str, show: str, as_json: bool) -> None:
    """Compare tokenisers over the text of a config: its own, and those named."""
    config = _composed(overrides)
    corpus = build(config.data.corpus)
    sources = corpus.sources if isinstance(corpus, Mix) else {"": corpus}
    texts = [piece.text for piece in _beginning(sources)]
    found: dict[str, Tokenizer] = {}
    for name in ["", *filter(None, compare.split(","))]:
        path = Path(name)
        if name and path.suffix == ".json":
            found[path.stem] = data_tokenizer.read(path)
            continue
        known = [c.name for c in components("data/tokenizer")]
        if name and name not in known:
            raise ConfigError(
                f"--compare {name}: no such tokeniser; there are {', '.join(known)}, and files of `data tokenizer train` (.json)"
            )
        options: Any = component("data/tokenizer", name).options() if name else config.data.tokenizer
        data = replace(config.data, tokenizer=options)
        with PreparationProgress() as progress:
            learned = learned_tokenizer(data, sources, {}, shared=False, report=progress.reading)
        tokenizer: Tokenizer = from_json(learned, name) if learned else build(options)
        if not learned:
            tokenizer.fit(texts)
        found[tokenizer.name if tokenizer.name not in found else f"{tokenizer.name} ({tokenizer.vocabulary:,})"] = tokenizer
    if not texts:
        raise ConfigError("the corpus holds no text")
    data_tokenizer.report(texts, found, show=show, as_json=as_json)


def _beginning(sources: dict[str, Any]) -> Iterator[Any]:
    """The text a report looks at: the first megabytes of each source."""
    share = SAMPLE_BYTES // len(sources)
    for corpus in sources.values():
        at = 0
        for piece, _ in pieces_from(corpus, None):
            at += len(piece.text)
            yield piece
            if at >= share:
                break
