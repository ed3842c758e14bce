"""A study's saved workspace in W&B: its runs grouped by arm, with bands over seeds. Library: wandb-workspaces."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptlab.config.dashboard import Panel, Section
from gptlab.config.errors import ConfigError, IOFailure

NEEDED = "gptlab dashboard needs wandb-workspaces: pip install 'gptlab[dashboard]'"


@dataclass(frozen=True)
class Dashboard:
    """What is shown: a study's runs in a W&B project, the settings in which its arms differ, and the verdict as markdown."""

    study: str
    project: str
    sections: list[Section]
    differing: list[str]
    verdict: str


def spec(dashboard: Dashboard, entity: str = "") -> dict[str, Any]:
    """The workspace as the JSON that W&B keeps of it. Raises ConfigError where the library is missing."""
    # the library has no public way to see what it would save
    described = _workspace(dashboard, entity)._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    found: dict[str, Any] = json.loads(described)
    return found


def save(dashboard: Dashboard, entity: str | None = None) -> str:
    """Save it with the account that is logged in; its address. Raises IOFailure with W&B's reason."""
    import wandb

    _library()
    try:
        workspace = _workspace(dashboard, entity or str(wandb.Api().default_entity))
        workspace.save()
        return str(workspace.url)
    except ConfigError:
        raise
    except Exception as error:  # its client raises many kinds: no rights, no network, a proxy's page
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise IOFailure(f"W&B did not take the dashboard ({type(error).__name__}: {reason})") from error


def logged_in() -> bool:
    """Whether there is a key for W&B: in the environment, or in the file that `wandb login` writes."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _library() -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it speaks of its own versions
            import wandb_workspaces.reports.v2 as reports
            import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError(NEEDED) from error
    return workspaces, reports


def _workspace(dashboard: Dashboard, entity: str) -> Any:
    ws, _ = _library()
    sections = [
        ws.Section(name=section.title, panels=[_panel(panel, dashboard) for panel in section.panels], is_open=True)
        for section in dashboard.sections
    ]
    shown = ws.RunsetSettings(filters=[ws.Metric("Group") == dashboard.study], groupby=[ws.Metric("JobType")])
    return ws.Workspace(
        entity=entity, project=dashboard.project, name=f"Ablation {dashboard.study}", sections=sections, runset_settings=shown,
        settings=ws.WorkspaceSettings(x_axis="step", group_by_prefix="first", remove_legends_from_panels=False),
    )  # fmt: skip


def _panel(panel: Panel, dashboard: Dashboard) -> Any:
    _, wr = _library()
    first = panel.metrics[0] if panel.metrics else ""
    title = panel.title or None
    if panel.kind == "line":
        return wr.LinePlot(
            title=title or f"{', '.join(panel.metrics)} by {panel.x}", x=panel.x, y=list(panel.metrics), log_x=panel.log_x or None,
            log_y=panel.log_y or None, groupby_aggfunc="mean", groupby_rangefunc="stddev",
        )  # fmt: skip
    if panel.kind == "bar":
        return wr.BarPlot(title=title or first, metrics=list(panel.metrics), groupby_aggfunc="mean", groupby_rangefunc="stddev")
    if panel.kind == "parallel":
        columns: Sequence[Any] = [wr.Config(key) for key in dashboard.differing] + [wr.SummaryMetric(name) for name in panel.metrics]
        return wr.ParallelCoordinatesPlot(title=title, columns=[wr.ParallelCoordinatesPlotColumn(column) for column in columns])
    if panel.kind == "importance":
        return wr.ParameterImportancePlot(with_respect_to=first)
    if panel.kind == "differences":
        return wr.RunComparer(diff_only="split")
    if panel.kind == "media":
        return wr.MediaBrowser(title=title, media_keys=list(panel.metrics))
    return wr.MarkdownPanel(dashboard.verdict)
