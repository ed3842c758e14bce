"""The subcommands of `gptlab runs`. Each imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from gptlab.cli.arguments import JsonOption, RunArgument

runs_app = typer.Typer(help="List, show, compare, check, fetch and delete runs.", no_args_is_help=True)


@runs_app.command("list")
def runs_list(study: Annotated[str | None, typer.Argument(help="This study alone.")] = None) -> None:
    """List runs: state, progress, held-out loss."""
    from gptlab.cli.runs import list_runs

    list_runs(study)


@runs_app.command("show")
def runs_show(run: RunArgument) -> None:
    """Show a run: its config, where and how it was made, and its last metrics."""
    from gptlab.cli.runs import show_run

    show_run(run)


@runs_app.command("rm")
def runs_rm(run: RunArgument, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Delete a run."""
    from gptlab.cli.runs import remove

    remove(run, yes=yes)


@runs_app.command("gc")
def runs_gc(
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Of runs that are done, all but the newest and the best one.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete what is of no use: half-made checkpoints, and runs that failed or were left before their first."""
    from gptlab.cli.runs_gc import collect_garbage

    collect_garbage(checkpoints=checkpoints, yes=yes)


@runs_app.command("diff")
def runs_diff(run: RunArgument, other: RunArgument, as_json: JsonOption = False) -> None:
    """Show in what two runs differ: settings, circumstances, last metrics."""
    from gptlab.cli.runs_diff import diff

    diff(run, other, as_json=as_json)


@runs_app.command("lineage")
def runs_lineage(
    run: RunArgument,
    price: Annotated[float, typer.Option("--price", help="Dollars an hour of the machine, for the cost.")] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Show the runs that a run's weights came through: data, tokens, time and cost of each."""
    from gptlab.cli.lineage import lineage

    lineage(run, price=price, as_json=as_json)


@runs_app.command("verify")
def runs_verify(run: RunArgument, as_json: JsonOption = False) -> None:
    """Check every hash of a run's checkpoints, and its other files."""
    from gptlab.cli.runs import verify

    verify(run, as_json=as_json)


@runs_app.command("fetch")
def runs_fetch(
    url: Annotated[str, typer.Argument(metavar="URL", help="trainer.mirror; of several runs there, URL/STUDY/FOLDER.")],
    all_checkpoints: Annotated[bool, typer.Option("--all-checkpoints", help="Every checkpoint; without it the newest alone.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is here already.")] = False,
) -> None:
    """Bring a run back from its mirror; its own command resumes it."""
    from gptlab.cli.runs import fetch

    fetch(url, all_checkpoints=all_checkpoints, force=force)
