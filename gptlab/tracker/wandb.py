"""Weights & Biases, online (`tracker=wandb`) or in offline files that `wandb sync` uploads (`tracker=offline`)."""

from __future__ import annotations

import contextlib
import html
import os
import sys
import time
import types
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptlab.config.errors import DivergedError
from gptlab.config.registry import register
from gptlab.tracker.guard import TrackerWarning
from gptlab.tracker.protocol import Histogram, Metrics, RunInfo

_LAUNCH = "wandb.sdk.launch.inputs.internal"
INIT_TIMEOUT, FINISH_TIMEOUT, PROBE_TIMEOUT = 15.0, 15.0, 3.0  # seconds; wandb waits minutes on a server that does not answer
KEPT = "its files are kept for `wandb sync`"


class _NoInputs:
    """In the place of the client's StagedLaunchInputs: nothing is staged, so nothing is applied."""

    def apply(self, run: Any) -> None:
        pass


@contextlib.contextmanager
def _without_launch() -> Iterator[None]:
    """Spare the client the import of `wandb launch`, in which it looks at every start for inputs that only a launched program stages:
    more than a second before the first step. Whoever has imported it already keeps it."""
    if _LAUNCH in sys.modules:
        yield
        return
    stand_in = types.ModuleType(_LAUNCH)
    stand_in.StagedLaunchInputs = _NoInputs  # type: ignore[attr-defined]
    sys.modules[_LAUNCH] = stand_in
    try:
        yield
    finally:
        sys.modules.pop(_LAUNCH, None)


class _Wandb:
    def __init__(self, project: str, entity: str | None, mode: str, *, checkpoints: bool) -> None:
        self.project, self.entity, self.mode, self.checkpoints = project, entity, mode, checkpoints
        self._run: Any = None
        self._directory = Path()
        self._online = mode == "online"
        self._texts: list[tuple[int, str, str]] = []
        self._tables: dict[str, tuple[int, list[str], list[list[Any]]]] = {}  # name -> the last step, columns, rows
        self._logged_to = -1

    def start(self, run: RunInfo) -> None:
        import wandb

        self._logged_to, self._directory = run.logged_to, run.directory
        try:
            self._run = self._init(run, self.mode)
        except Exception as error:  # wandb raises many kinds; none of them may cost the run
            if self.mode == "offline":
                self._warn("could not start", error, "metrics go to metrics.jsonl alone")
                return
            self._warn("could not be reached", error, KEPT)
            wandb.teardown()
            self._online = False
            self._run = self._init(run, "offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        # curves by what a step costs, too
        for axis in ("tokens", "flops", "seconds", "wall"):
            self._run.define_metric(axis, step_metric="step")

    def _init(self, run: RunInfo, mode: str) -> Any:
        import wandb

        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        with _without_launch():
            return self._begun(wandb, run, mode)

    def _begun(self, wandb: Any, run: RunInfo, mode: str) -> Any:
        return wandb.init(
            project=self.project,
            entity=self.entity,
            id=run.id,
            name=run.name,
            group=run.study,
            job_type=run.arm or None,
            tags=run.tags,
            config=run.config,
            dir=str(run.directory),
            mode=mode,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )

    def log(self, metrics: Metrics) -> None:
        if self._run is not None and int(metrics["step"]) > self._logged_to:
            self._run.log(metrics)

    def text(self, step: int, name: str, text: str) -> None:
        """As a page of its own at that step, and at the end all in one table: a table asks the server first, and training would wait."""
        import wandb

        if self._run is not None and step > self._logged_to:
            self._texts.append((step, name, text))
            self._run.log({"sample": wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False), "step": step})

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        import wandb

        if self._run is not None and step > self._logged_to:
            made = {name: wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist())) for name, (counts, edges) in found.items()}
            self._run.log({**made, "step": step})

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[float | int | str]]) -> None:
        """All of it at the end, as the samples: a table asks the server first."""
        if self._run is not None and step > self._logged_to:
            _, _, known = self._tables.get(name, (0, [], []))
            self._tables[name] = (step, list(columns), [*known, *map(list, rows)])

    def finish(self, summary: Metrics, code: int) -> None:
        if self._run is None:
            return
        began = time.monotonic()
        try:
            self._run.summary.update(summary)
            if code == DivergedError.code:
                after = f"after step {int(summary.get('step', 0))}"
                self._run.alert("The run diverged", f"{self._run.name}: the loss or a gradient is not finite {after}")
            if self._answers():
                self._keep_samples()
                if self.checkpoints and not code:
                    self._keep_checkpoint(summary)
            began = time.monotonic()
            self._run.finish(exit_code=code)
        except Exception as error:  # the server may die at any time; the data is on disk
            self._warn("did not finish", error, KEPT)
            return
        if self._online and time.monotonic() - began >= FINISH_TIMEOUT:  # the client says nothing then
            self._warn("has not everything yet", f"the server was waited for {FINISH_TIMEOUT:g} s", KEPT)

    def add(self, run: RunInfo, figures: Metrics) -> None:
        """To the run's summary: it is resumed by its id, and gets no new step. Offline that is another folder for `wandb sync`."""
        self.start(run)
        if self._run is None:
            return
        try:
            self._run.summary.update(figures)
            self._run.finish(exit_code=0)
        except Exception as error:  # the server may die at any time
            self._warn("did not finish", error, KEPT)

    def _answers(self) -> bool:
        """Whether the server is there: what is kept as an artifact asks it, and the client waits long for one that is gone."""
        if not self._online:
            return True
        try:
            with urllib.request.urlopen(self._run.settings.base_url, timeout=PROBE_TIMEOUT):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _keep_samples(self) -> None:
        import wandb

        if self._texts:
            table = wandb.Table(columns=["step", "sample", "text"], data=[list(row) for row in self._texts])
            self._run.log({"samples": table, "step": self._texts[-1][0]})
        for name, (step, columns, rows) in self._tables.items():
            self._run.log({name: wandb.Table(columns=columns, data=rows), "step": step})

    def _keep_checkpoint(self, summary: Metrics) -> None:
        import wandb

        made = sorted(folder for folder in (self._directory / "checkpoints").glob("step-*") if folder.is_dir())
        if made:
            described = {name: summary[name] for name in ("step", "val/loss", "parameters") if name in summary}
            artifact = wandb.Artifact(f"checkpoint-{self._run.id}", "model", metadata=described)
            artifact.add_dir(str(made[-1]))
            self._run.log_artifact(artifact)

    @staticmethod
    def _warn(what: str, error: Exception | str, then: str) -> None:
        sentence = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(TrackerWarning(f"W&B {what} ({sentence}); {then}"), stacklevel=3)


@register("tracker", "offline")
def offline(*, project: str = "gptlab", checkpoints: bool = False) -> _Wandb:
    """W&B's offline files in the run's folder; `wandb sync` uploads them, `wandb leet` shows them. `checkpoints`: the last one, too."""
    return _Wandb(project, None, "offline", checkpoints=checkpoints)


@register("tracker", "wandb")
def online(*, project: str = "gptlab", entity: str | None = None, checkpoints: bool = False) -> _Wandb:
    """W&B with the account that is logged in. `checkpoints`: the last one is kept there as an artifact.

    A server that cannot be reached costs one warning.
    """
    return _Wandb(project, entity, "online", checkpoints=checkpoints)
