"""`gptlab dashboard STUDY`: the study's saved workspace in W&B, or its JSON where there is no account."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlab.config import codec
from gptlab.config.dashboard import sections_of
from gptlab.config.errors import ConfigError, IOFailure
from gptlab.config.folders import study_folder
from gptlab.config.registry import load_components
from gptlab.runner.run import find_study
from gptlab.study.compare import Arm, compare, gather
from gptlab.study.report import markdown
from gptlab.tracker.console import complain, say
from gptlab.tracker.workspace import Dashboard, logged_in, save, spec

FILE = "dashboard.json"  # in the study's folder


def dashboard(study: str, name: str, overrides: Sequence[str], *, entity: str | None, project: str | None, file: Path | None) -> None:
    """Save the workspace with the account that is logged in; else, or with a `file`, write its JSON. Raises ConfigError, IOFailure."""
    study = find_study(study)
    load_components()
    sections = sections_of(name, overrides)
    arms, left_out = gather(study)
    if not any(arm.runs for arm in arms):
        raise ConfigError(f"study {study} has no run that is done{f' ({left_out[0]})' if left_out else ''}; a dashboard needs one")
    if left_out:
        say(
            (
                f"{len(left_out)} run{'s' * (len(left_out) > 1)} not done yet: the verdict is of the others; make the dashboard again then",
                "yellow",
            )
        )
    trackers = [_tracker(arm) for arm in arms]
    known = {t["project"] for t in trackers if "project" in t}
    if project is None and len(known) > 1:
        raise ConfigError(f"the runs of {study} went to several W&B projects, {', '.join(sorted(known))}; give --project")
    if not known:
        say(("none of its runs went to W&B: train with tracker=wandb, or `wandb sync` those of tracker=offline", "yellow"))
    entities = {t.get("entity") for t in trackers} - {None}
    entity = entity or (entities.pop() if len(entities) == 1 else None)
    made = Dashboard(study, project or (known.pop() if known else "gptlab"), sections, _differing(arms), markdown(compare(study)))
    failure = None
    if file is None and logged_in():
        try:
            say(f"saved: {save(made, entity)}")
            return
        except IOFailure as error:
            failure = error
    target = file or study_folder(study) / FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(spec(made, entity or ""), indent=1), encoding="utf-8")
    except OSError as error:
        raise IOFailure(f"{target}: {error.strerror}") from error
    if failure is not None:
        complain(f"its JSON is in {target}")
        raise failure
    why = "" if file else "; no W&B account is logged in here: `wandb login`, then the same command saves it there"
    say(f"the workspace as JSON: {target}{why}")


def _tracker(arm: Arm) -> dict[str, Any]:
    return next(
        ({k.removeprefix("tracker."): v for k, v in _flat(run).items() if k.startswith("tracker.")} for run in arm.runs.values()), {}
    )


def _flat(run: Any) -> dict[str, Any]:
    return codec.flatten(run.config())


def _differing(arms: Sequence[Arm]) -> list[str]:
    """The settings in which the arms differ, by the names they have in W&B."""
    configs = [_flat(next(iter(arm.runs.values()))) for arm in arms if arm.runs]
    keys = sorted(set().union(*configs))
    private = ("seed", "seeds", "name", "arm", "study", "callbacks", "tracker")
    return [
        k
        for k in keys
        if k.partition(".")[0] not in private and len({json.dumps(c.get(k), default=str, sort_keys=True) for c in configs}) > 1
    ]
