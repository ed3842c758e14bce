"""A comparison as a table: in the terminal, as markdown, and as a picture of its loss curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from gptlab.config.errors import ConfigError
from gptlab.config.registry import suggest
from gptlab.study import scores, votes
from gptlab.study.compare import ACCURACY, METRIC, PER_BYTE, SOLVED, Arm, Comparison, Row, collect, tokenizers
from gptlab.study.statistics import Interval
from gptlab.tracker.console import console, say
from gptlab.tracker.jsonl import curve

HEADERS = ("arm", "seeds", "val/loss", "difference, 95 %", "verdict", "parameters", "tokens/s")
_WORDS = {"better": "better", "worse": "worse", "same": "no difference", "undecided": "undecided", "none": "none"}
_COLOURS_OF = {"better": "green", "worse": "red", "same": "cyan"}
SHARES = (SOLVED, ACCURACY)  # of what is right: of whole answers, of scored tokens; the table has a column for the first that is there
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp")
LONGEST_NAME = 34  # of a metric, in a narrow terminal


def headers(comparison: Comparison) -> tuple[str, ...]:
    """The table's columns: how long each arm trained where that differs, and of a generated task the share of right answers."""
    rows = comparison.rows
    lengths = ["steps"] if len({row.steps for row in rows}) > 1 else []
    if len({row.tokens / max(1.0, row.steps) for row in rows}) > 1:
        lengths.append("tokens")
    if lengths:
        lengths.append("seconds")
    last = next((share for share in SHARES if any(share in row.extra for row in rows)), HEADERS[-1])
    middle: tuple[str, ...] = HEADERS[2:-1] if not lengths or len({row.parameters for row in rows}) > 1 else HEADERS[2:-2]
    middle = tuple(h for h in middle if h != "verdict" or len(rows) > 1)
    return (*HEADERS[:2], *lengths, *middle, last)  # of one model the parameters would only take the arms' names their place


def cells(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """One line of the table as text."""
    values = (
        row.label,
        str(len(row.seeds)),
        f"{row.loss.mean:.4f}",
        "baseline" if row.baseline else difference(row.difference),
        _WORDS[row.verdict.kind] if row.verdict else "",
        f"{row.parameters:,}",
        f"{row.tokens_per_second:,.0f}",
    )
    found = dict(zip(HEADERS, values, strict=True))
    found |= {"steps": f"{row.steps:,.0f}", "tokens": f"{row.tokens:,.0f}", "seconds": f"{row.seconds:,.1f}"}
    found |= {share: f"{row.extra[share]:.1%}" if share in row.extra else "" for share in SHARES}
    return tuple(found[column] for column in columns)


def difference(interval: Interval | None) -> str:
    """`-0.0123 ± 0.0045`, signed; without an interval where there is one seed."""
    if interval is None:
        return "no common seed"
    return f"{interval.mean:+.4f}" + (f" ± {interval.half:.4f}" if interval.half is not None else "")


def table(comparison: Comparison) -> Table:
    """The comparison for a terminal: better is green, worse red, undecided plain."""
    shown = Table(
        title=f"{comparison.study}: {comparison.metric} at the last step",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = headers(comparison)
    for i, header in enumerate(columns):
        shown.add_column(
            comparison.metric if header == METRIC else header,
            justify="left" if i == 0 else "right",
            no_wrap=i > 0,
            overflow="fold",
            min_width=16 if i == 0 else None,
        )
    for row in comparison.rows:
        values: list[str | Text] = list(cells(row, columns))
        if row.verdict and row.verdict.kind in _COLOURS_OF:
            for name in HEADERS[3:5]:
                place = columns.index(name)
                values[place] = Text(str(values[place]), style=_COLOURS_OF[row.verdict.kind])
        shown.add_row(*values)
    return shown


def extras(comparison: Comparison) -> Table | None:
    """What else was measured at the end (further validation sets, kernels), a row a metric; None if nothing was."""
    names = sorted({name for row in comparison.rows for name in row.extra} - set(SHARES))
    if not names:
        return None
    title = "also measured, mean of the seeds"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("metric", overflow="fold", min_width=min(LONGEST_NAME, max(map(len, names))))  # cut off, one is like the other
    for row in comparison.rows:
        shown.add_column(row.label, justify="right", overflow="fold")
    for name in names:
        shown.add_row(name, *(f"{row.extra[name]:.4g}" if name in row.extra else "" for row in comparison.rows))
    return shown


def _scores(comparison: Comparison) -> list[tuple[str, dict[str, scores.Estimate]]]:
    return [(row.label, row.scores) for row in comparison.rows]


def show(comparison: Comparison) -> None:
    """Print the comparison: its table, what else was measured, and its remarks."""
    console.print(table(comparison))
    more = extras(comparison)
    if more is not None:
        console.print(more)
    judged = scores.table(_scores(comparison))
    if judged is not None:
        console.print(judged)
        for source in scores.lines(_scores(comparison))[2]:
            say((f"  {source}", "dim"))
    if comparison.votes:
        console.print(votes.table(comparison.votes))
    for remark in remarks(comparison):
        say((f"  {remark}", "dim"))


def remarks(comparison: Comparison) -> list[str]:
    """What the table does not say: which arms are undecided and what pairing gained."""
    found = [_against_target(row, comparison.target) for row in comparison.rows if comparison.target is not None]
    for row in comparison.rows:
        if row.verdict is not None:
            drawn = f"; by bootstrap {row.verdict.bootstrap[0]:+.4f} to {row.verdict.bootstrap[1]:+.4f}" if row.verdict.bootstrap else ""
            over = row.text
            text = f"; over {over.units} {over.kind} of the text {over.low:+.4f} to {over.high:+.4f}" if over else ""
            found.append(f"{row.label}: {row.verdict.sentence}{drawn}{text}")
    found += _method(comparison)
    gains = [row.pairing_gain for row in comparison.rows if row.pairing_gain]
    if gains:
        most = f"{max(gains):.1f}" if max(gains) < 1000 else "over 1,000"  # of an arm that is the baseline but for rounding
        times = most if len(gains) == 1 else f"{min(gains):.1f} to {most}"
        found.append(f"pairing by seed: the spread of the differences is {times} times smaller than unpaired")
    return found + [told.sentence for told in comparison.votes] + comparison.notes


def _method(comparison: Comparison) -> list[str]:
    """How the verdicts were reached."""
    verdicts = [row.verdict for row in comparison.rows if row.verdict is not None and row.verdict.p is not None]
    if not verdicts:
        return []
    methods = " and ".join(dict.fromkeys(v.method for v in verdicts))
    many = f"; p corrected for {len(verdicts)} arms (Holm)" if len(verdicts) > 1 else ""
    return [f"verdicts: {methods} over seeds, 5 % false{many}; the smallest difference worth knowing is {verdicts[0].effect:g}"]


def _against_target(row: Row, target: float) -> str:
    mean = f"{row.label}: {row.loss.mean:.4f} over {row.loss.n} seed{'s' if row.loss.n > 1 else ''}"
    if row.p_target is None:
        return f"{mean} against {target:g}; at least two seeds that differ are needed to say more"
    return f"{mean} is {'at most' if row.loss.mean <= target else 'above'} {target:g}; one-sided p of a mean above it: {row.p_target:.2g}"


def markdown(comparison: Comparison) -> str:
    """The comparison as a markdown table with its remarks."""
    columns = headers(comparison)
    names = [comparison.metric if column == METRIC else column for column in columns]
    lines = [" | ".join(("", *names, "")).strip(), "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|"]
    lines += [" | ".join(("", *cells(row, columns), "")).strip() for row in comparison.rows]
    notes = remarks(comparison)
    for name in sorted({name for row in comparison.rows for name in row.extra} - set(SHARES)):
        values = ", ".join(f"{row.label} {row.extra[name]:.4g}" for row in comparison.rows if name in row.extra)
        notes.append(f"{name}: {values}")
    written = "\n".join([*lines, "", *(f"- {n}" for n in notes)]).rstrip() + "\n"
    return written + scores.markdown(_scores(comparison)) + (votes.markdown(comparison.votes) if comparison.votes else "")


def csv_table(comparison: Comparison) -> str:
    """The comparison as comma-separated values, every number in full: a line an arm, what else was measured in columns of its own."""
    extra = sorted({name for row in comparison.rows for name in row.extra})
    plain = ("parameters", "steps", "tokens", "flops", "seconds", "tokens_per_second", "peak_memory", "pairing_gain")
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    judged = list(dict.fromkeys(name for row in comparison.rows for name in row.scores))
    with_errors = [column for name in judged for column in (f"eval/{name}", f"eval/{name}_stderr")]
    lines.writerow(["arm", "seeds", comparison.metric, "difference", "half_width", "verdict", "p", *plain, *extra, *with_errors])
    for row in comparison.rows:
        gap, verdict = row.difference, row.verdict
        told = [gap.mean if gap else "", gap.half if gap else "", verdict.kind if verdict else "baseline", verdict.p if verdict else ""]
        values = [getattr(row, name) for name in plain] + [row.extra.get(name) for name in extra]
        values += [getattr(row.scores.get(name), part, None) for name in judged for part in ("value", "error")]
        lines.writerow([row.label, " ".join(map(str, row.seeds)), row.loss.mean, *told, *("" if v is None else v for v in values)])
    return written.getvalue()


# Okabe & Ito's palette, told apart by the colour-blind; black is the baseline's.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_STYLES = ("-", (0, (6, 3)), (0, (2, 2)), (0, (6, 2, 1, 2)))
_REFERENCE = "#777777"  # published losses


def check_curves(study: str, arms: Sequence[Arm], file: Path, metrics: Sequence[str]) -> None:
    """What `draw_curves` refuses, before it takes its time. Raises ConfigError."""
    known = {name for arm in arms for summary in arm.summaries.values() for name in summary}
    for name in (n for n in metrics if n not in known):
        raise ConfigError(f"--metric {name}: no run of {study} has measured it{suggest(name, sorted(known))}")
    if file.suffix.lower() not in PICTURES:
        raise ConfigError(f"{file}: curves cannot be saved as {file.suffix or 'a file without ending'}; use {', '.join(PICTURES)}")


def draw_curves(study: str, file: Path, *, arms: Sequence[Arm] | None = None, metrics: Sequence[str] = ()) -> Path:
    """Save the held-out loss over the steps (of a generated task the share of right answers): a line an arm, the mean of its seeds,
    in a band from its lowest to its highest seed. `metrics` draws these instead, one above the other.

    Raises ConfigError for a metric that no run has, naming the nearest, or an ending that is no picture's.
    """
    found = list(arms) if arms is not None else collect(study)[0]
    check_curves(study, found, file, metrics)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summaries = [s for arm in found for s in arm.summaries.values()]
    metric = next((share for share in SHARES if summaries and all(share in s for s in summaries)), METRIC)
    if metric == METRIC and len(tokenizers(found)) > 1:
        metric = PER_BYTE
    asked = list(metrics) or [metric]
    size = (8, 4.8) if len(asked) == 1 else (8, 2.6 * len(asked))
    figure, panels = pyplot.subplots(len(asked), figsize=size, dpi=150, layout="constrained", squeeze=False, sharex=True)
    for axes, name in zip(panels[:, 0], asked, strict=True):
        _draw_metric(axes, found, name)
    seeds = max((len(arm.runs) for arm in found), default=0)
    panels[0, 0].set_title(f"{study}: mean of {seeds} seeds, band from lowest to highest" if seeds > 1 else study, loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("step")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(file)
    finally:
        pyplot.close(figure)
    return file


def _draw_metric(axes: Any, found: Sequence[Arm], metric: str) -> None:
    """One panel: a line an arm, named at its end."""
    ends: list[tuple[float, str, str]] = []
    lowest, highest = float("inf"), float("-inf")
    for i, arm in enumerate(found):
        by_step: dict[int, list[float]] = {}
        for run in arm.runs.values():
            for step, value in zip(*curve(run.metrics(), metric), strict=True):
                by_step.setdefault(step, []).append(value)
        steps = [s for s in sorted(by_step) if len(by_step[s]) == len(arm.runs)]
        if not steps:
            continue
        mean = [sum(by_step[s]) / len(by_step[s]) for s in steps]
        colour = _COLOURS[i % len(_COLOURS)]
        # Dashes let a line that lies on another be seen.
        axes.plot(steps, mean, linestyle=_STYLES[i % len(_STYLES)], color=colour, linewidth=1.6, marker="o", markersize=2.5)
        axes.fill_between(steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=colour, alpha=0.15, linewidth=0)
        ends.append((mean[-1], f"{arm.label}  {mean[-1]:.3f}", colour))
        lowest, highest = min(lowest, *mean), max(highest, *mean)
    if metric == METRIC:
        for text, value in _draw_references(axes, found):
            ends.append((value, text, _REFERENCE))
            lowest, highest = min(lowest, value), max(highest, value)
    axes.set_ylabel(f"{metric} (nats a token)" if metric == METRIC else metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    # Each line is named at its end; names that would overlap are pushed apart.
    gap = (highest - lowest or 1.0) * 0.055 * 4.8 / (axes.figure.get_figheight() / len(axes.figure.axes))
    place = float("-inf")
    for value, text, colour in sorted(ends):
        place = max(value, place + gap)
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=8, annotation_clip=False)


def _draw_references(axes: Any, arms: Sequence[Arm]) -> list[tuple[str, float]]:
    """Published losses that runs were held against, with their bands, as far as the runs went; the text and last loss of each."""
    import numpy as np

    drawn: dict[str, tuple[str, float]] = {}
    for run, summary in ((run, arm.summaries[seed]) for arm in arms for seed, run in arm.runs.items()):
        config = (run.read("config.json") or {}).get("config", {})
        curve_ = run.read("reference.json")
        held = any(callback.get("name") == "reference" for callback in config.get("callbacks", {}).values())
        if not curve_ or not held or curve_["name"] in drawn:
            continue
        batch, last = config["trainer"]["batch_tokens"], float(summary["step"])
        places = [(step * curve_["batch_tokens"] / batch, loss) for step, loss in curve_["points"]]
        shown = [(step, loss) for step, loss in places if step <= last] if places else [(0.0, curve_["mark"]), (last, curve_["mark"])]
        if not shown:
            continue
        steps, losses = [np.array(column) for column in zip(*shown, strict=True)]
        if places:
            axes.plot(steps, losses, "D", color=_REFERENCE, markersize=4, fillstyle="none")
        between = np.geomspace(steps[0], steps[-1], 100) if places else steps  # as runs are judged: linear in the logarithm of the tokens
        line = np.interp(np.log(between), np.log(steps), losses) if places else losses
        axes.plot(between, line, color=_REFERENCE, linewidth=1.0, linestyle=":")
        axes.fill_between(between, line - curve_["below"], line + curve_["above"], color=_REFERENCE, alpha=0.12, linewidth=0)
        if len(shown) == 1:  # a band needs a width
            axes.errorbar(steps, losses, yerr=[[curve_["below"]], [curve_["above"]]], color=_REFERENCE, linewidth=1.0, capsize=3)
        drawn[curve_["name"]] = (f"published  {losses[-1]:.3f}", float(losses[-1]))
    return list(drawn.values())
