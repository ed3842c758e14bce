"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A directory, an identity, a unique prefix, or `latest`.")]

CheckpointOption = Annotated[str, typer.Option(help="latest, best, a step or a checkpoint's folder.", metavar="WHICH")]
WeightsOption = Annotated[
    str, typer.Option(help="trained, average (of callback=ema or optimizer=schedule_free), or what the run is used with.", metavar="WHICH")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def complete_overrides(context: typer.Context, incomplete: str) -> list[str]:
    """What an override that was begun may go on to."""
    from gptlab.cli import completion

    return completion.complete(incomplete)


OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDE]…", help="As for train: data=NAME, data.corpus.path=FILE, …", autocompletion=complete_overrides),
]
