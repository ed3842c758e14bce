"""`gptlab inspect` as it is typed: its options, and nothing that takes time to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gptlab.cli.arguments import CheckpointOption, RunArgument, WeightsOption


def inspect_model(
    run: RunArgument,
    prompt: Annotated[str | None, typer.Option(help="The text to read; some held-out text, unless given.", show_default=False)] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with it.", metavar="FILE")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the page goes. [inspect-RUN.html]", show_default=False, metavar="FILE")] = None,
    text: Annotated[Path | None, typer.Option(help="Where to look for what excites units. [held-out text]", metavar="FILE")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of that text are read.")] = 8192,
    tuned_lens: Annotated[bool, typer.Option("--tuned-lens", help="Also a tuned lens, learned from that text.")] = False,
    analogy: Annotated[list[str] | None, typer.Option(help='Of embeddings: "king - man + woman".', metavar="TEXT")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no such page.")] = False,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = "default",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Look inside a model while it reads a text: one page of its lens, attention, attribution, norms, units and embeddings."""
    from gptlab.cli.inspect import inspect_run

    inspect_run(
        run,
        prompt=prompt,
        file=prompt_file,
        output=output,
        text=text,
        tokens=tokens,
        tuned=tuned_lens,
        analogies=analogy or [],
        checkpoint=checkpoint,
        weights=weights,
        device=device,
        force=force,
    )
