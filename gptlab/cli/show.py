"""What `gptlab compare` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptlab.config.errors import ConfigError
from gptlab.config.registry import load_components
from gptlab.study.compare import collect
from gptlab.study.compare import compare as compare_study
from gptlab.study.page import write_page
from gptlab.study.pairing import markdown as pairing_markdown
from gptlab.study.pairing import pairing
from gptlab.study.pairing import table as pairing_table
from gptlab.study.power import markdown as power_markdown
from gptlab.study.power import power_of
from gptlab.study.power import table as power_table
from gptlab.study.report import check_curves, csv_table, draw_curves, markdown, show
from gptlab.tracker.console import console, say
from gptlab.tracker.jsonl import finite


def compare(
    study: str,
    *,
    baseline: str | None,
    target: float | None,
    effect: float | None,
    forms: Mapping[str, bool],
    png: Path | None,
    html: Path | None,
    paired: bool,
    resampled: bool,
    inspected: bool,
    metrics: Sequence[str] = (),
) -> None:
    """Print a comparison as a table, or in the one of `forms` (json, markdown, csv) that was asked for. Raises ConfigError for several."""
    asked = [name for name, wanted in forms.items() if wanted]
    if len(asked) > 1:
        raise ConfigError(f"--{' and --'.join(asked)}: one form at a time goes to standard output")
    form = asked[0] if asked else "table"
    if metrics and png is None:
        raise ConfigError("--metric goes with --png FILE, and says what is drawn there")
    found = compare_study(study, baseline=baseline, target=target, effect=effect)
    if png is not None:
        check_curves(study, collect(study)[0], png, metrics)
    gains = pairing(found.study, baseline=baseline) if paired else []
    powers = power_of(found.study, baseline=baseline, effect=effect) if resampled else []
    within, within_notes = _within(found.study, baseline) if inspected else ([], [])
    if form == "json":
        told = found.to_json() | ({"pairing": [asdict(g) for g in gains]} if paired else {})
        told |= {"power": [asdict(p) for p in powers]} if resampled else {}
        told |= {"inspect": [asdict(m) for m in within], "inspect_notes": within_notes} if inspected else {}
        print(json.dumps(finite(told), indent=1, allow_nan=False))
    elif form == "markdown":
        print(markdown(found) + (pairing_markdown(gains) if paired else "") + (power_markdown(powers) if resampled else ""), end="")
        if inspected:
            from gptlab.study.inspected import markdown as within_markdown

            print(within_markdown(within), end="")
    elif form == "csv":
        print(csv_table(found), end="")
    else:
        show(found)
        if paired:
            console.print(pairing_table(gains))
        if resampled:
            console.print(power_table(powers))
        if inspected:
            from gptlab.study.inspected import table as within_table

            console.print(within_table(within))
            for note in within_notes:
                say(("  " + note, "dim"))
    said = form in ("table", "markdown")
    if png is not None:
        draw_curves(study, png, metrics=metrics)
        if said:
            say(f"loss curves: {png}")
    if html is not None:
        write_page(html, study, found)
        if said:
            say(f"page: {html}")


def _within(study: str, baseline: str | None) -> tuple[list[Any], list[str]]:
    from gptlab.study.inspected import inspect_study  # which opens models: a comparison of losses does without

    load_components()
    with console.status("looking into the runs"):
        return inspect_study(study, baseline=baseline)
