"""The `gptlab` command: which subcommands there are. Each imports what it needs when it runs, so that `gptlab --help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gptlab.cli.arguments import CheckpointOption, JsonOption, OverridesArgument, RunArgument, WeightsOption, complete_overrides
from gptlab.cli.commands import bench_app, chat, data_app, serve
from gptlab.cli.exchange import evaluate_runs, export_model, import_model
from gptlab.cli.inspecting import inspect_model
from gptlab.cli.runs_commands import runs_app
from gptlab.config.errors import GptlabError

app = typer.Typer(
    name="gptlab",
    help="Build, train and compare GPT-2-class language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
components_app = typer.Typer(help="List the components; check one of your own.", invoke_without_command=True)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(bench_app, name="bench")
app.add_typer(components_app, name="components")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"gptlab {version('gptlab')}")
        raise typer.Exit


@app.callback()
def options(
    plugin: Annotated[list[Path] | None, typer.Option(help="A Python file that registers components of your own.", metavar="FILE")] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)] = False,
) -> None:
    """Build, train and compare GPT-2-class language models."""
    if plugin:
        from gptlab.config.registry import add_plugin

        for file in plugin:
            add_plugin(file)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDE]…", help="Hydra overrides and options.", autocompletion=complete_overrides)
    ] = None,
) -> None:
    """Compose a config with Hydra overrides and train it; -m sweeps; --help lists everything."""
    try:
        from gptlab.cli.train import train as run_train

        raise typer.Exit(run_train(arguments or []))
    except KeyboardInterrupt:  # before or after training, which stops by itself
        print("gptlab: interrupted outside training; nothing was lost", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDE]…", help="As for train; a sweep too.", autocompletion=complete_overrides),
    ] = None,
    card: Annotated[str | None, typer.Option(help="Plan for this GPU and not for this machine: A100 40GB, H100, …", metavar="NAME")] = None,
    mfu: Annotated[float, typer.Option(help="Of a card: the share of its peak that training reaches.")] = 0.4,
    price: Annotated[str | None, typer.Option(help="Of an hour: 1.29/h or $1.29/h.", metavar="PRICE")] = None,
    as_json: JsonOption = False,
    measure: Annotated[bool, typer.Option("--measure", help="Train a few steps, and show the forecast beside what they took.")] = False,
    multirun: Annotated[bool, typer.Option("--multirun", "-m", help="As for train; a list of values is a sweep without it, too.")] = False,
) -> None:
    """Forecast parameters, FLOPs, memory, time and cost of a run or a sweep; nothing is trained."""
    from gptlab.cli.plan import plan as run

    run(overrides or [], card=card, mfu=mfu, price=price, as_json=as_json, measure=measure)


@app.command()
def ablate(
    overrides: OverridesArgument = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="An axis, the baseline's value first: model/norm=layernorm,rmsnorm.", metavar="KEY=VALUE,…")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help='An arm of several changes: modern="model/norm=rmsnorm optimizer=muon".', metavar="NAME=…")
    ] = None,
    design: Annotated[
        str | None, typer.Option(help="grid (every combination), single (one change at a time), ladder (each added to the last).")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many, from 0; what is done is not trained again. 3 unless given.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm the others are judged against; the first, unless named.")] = None,
    effect: Annotated[float | None, typer.Option(help="The smallest difference of val/loss worth knowing. 0.01 unless given.")] = None,
    until_decided: Annotated[
        str | None, typer.Option(help="Add seeds until every arm is decided: at most so many, or for so long (24, 2h).", metavar="MOST")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Train the arms to equal budgets too: tokens,flops,seconds; a verdict for each.", metavar="UNIT,…")
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="Widen or narrow each arm's feed-forward to the baseline's params, flops or seconds.", metavar="WHAT")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(help="Give each arm its own best of these, on other seeds: optimizer.learning_rate=3e-4,1e-3.", metavar="KEY=VALUE,…"),
    ] = None,
    scales: Annotated[int | None, typer.Option(help="Repeat at so many sizes, each half as wide as the next, the given one last.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the arms and what they will take; train nothing.")] = False,
) -> None:
    """Train the arms of an ablation over several seeds, and give the verdict on each."""
    from gptlab.cli.ablate import ablate as run

    code = run(
        overrides or [],
        vary=vary or [],
        arms=arm or [],
        design=design,
        seeds=seeds,
        baseline=baseline,
        effect=effect,
        until_decided=until_decided,
        budgets=budgets,
        match=match,
        tune=tune,
        scales=scales,
        dry_run=dry_run,
    )
    raise typer.Exit(code)


@app.command()
def cooldown(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDE]…", help="What is to differ: study=NAME, schedule.shape=sqrt, tracker=none, …"),
    ] = None,
    at: Annotated[str, typer.Option(help="Steps, comma-separated; or latest, best, or all that are kept.")] = "latest",
    length: Annotated[str, typer.Option(help="Beyond each: a share of the steps before, or 100steps, 1Mtokens, 2min.")] = "20%",
    rerun: Annotated[bool, typer.Option("--rerun", help="Train again what is done.")] = False,
) -> None:
    """Cool a run at a constant rate down from its checkpoints: a finished model from each."""
    from gptlab.cli.cooldown import cooldown as cool

    raise typer.Exit(cool(run, at=at, length=length, overrides=overrides or [], rerun=rerun))


@app.command()
def compare(
    study: Annotated[str, typer.Argument(help="The study to compare.")],
    baseline: Annotated[str | None, typer.Option(help="The arm the others are compared with; the first, unless named.")] = None,
    target: Annotated[float | None, typer.Option(help="A loss: test whether each arm's mean is at most that.", metavar="LOSS")] = None,
    effect: Annotated[float | None, typer.Option(help="The smallest difference worth knowing; unless given, the study's own.")] = None,
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A markdown table.")] = False,
    png: Annotated[Path | None, typer.Option(help="Save the loss curves here.", metavar="FILE")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="What --png draws instead; several one above the other.", metavar="NAME")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="The table as comma-separated values.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page: curves, verdicts, samples.", metavar="FILE")] = None,
    pairing: Annotated[bool, typer.Option("--pairing", help="Also what pairing by seed gains, at every step that was measured.")] = False,
    power: Annotated[bool, typer.Option("--power", help="Also how often the seeds that a verdict asks for find the effect.")] = False,
    inspect: Annotated[bool, typer.Option("--inspect", help="Also what the models hold: induction, entropy, lens depth, norms.")] = False,
) -> None:
    """Compare the arms of a study: each against the baseline, on paired seeds."""
    from gptlab.cli.show import compare as show

    forms = {"json": as_json, "markdown": as_markdown, "csv": as_csv}
    also = {"paired": pairing, "resampled": power, "inspected": inspect}
    show(study, baseline=baseline, target=target, effect=effect, forms=forms, png=png, html=html, metrics=metric or (), **also)


@app.command()
def watch(
    study: Annotated[str, typer.Argument(help="The study to watch.")],
    port: Annotated[int, typer.Option(help="Of 127.0.0.1; 0: a free one.")] = 8420,
    baseline: Annotated[str | None, typer.Option(help="The arm the others are compared with.")] = None,
) -> None:
    """Serve the page of `compare --html` on this machine, with the runs that still go on."""
    from gptlab.cli.watch import watch as serve

    serve(study, port=port, baseline=baseline)


@app.command()
def dashboard(
    study: Annotated[str, typer.Argument(help="The study to show.")],
    changes: Annotated[list[str] | None, typer.Argument(help="dashboard=NAME, and Hydra's overrides of its sections.")] = None,
    entity: Annotated[str | None, typer.Option(help="Whose W&B project: a user or a team. [the account's own]")] = None,
    project: Annotated[str | None, typer.Option(help="The W&B project. [that of the study's runs]")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="Write the workspace's JSON here, and save nothing.")] = None,
) -> None:
    """Save a W&B workspace of a study: its runs by arm with bands over seeds, its settings, its verdict."""
    from gptlab.cli.dashboard import dashboard as make

    given = changes or []
    names = [c.partition("=")[2] for c in given if c.startswith("dashboard=")]
    make(
        study,
        names[-1] if names else "ablation",
        [c for c in given if not c.startswith("dashboard=")],
        entity=entity,
        project=project,
        file=file,
    )


@app.command()
def sample(
    run: RunArgument,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from; a new line, unless given.", show_default=False)] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with it; - reads standard input.", metavar="FILE")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of --prompt-file is a prompt of its own.")] = False,
    samples: Annotated[int, typer.Option(help="Texts for each prompt, with seeds one after the other.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Tokens to make.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; 1: as the model believes.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0: from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that together have this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out what is less than this share as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what the text holds already becomes less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: text, tokens, log-probabilities, why it ended.")] = False,
    show_probabilities: Annotated[bool, typer.Option("--show-probabilities", help="Colour each token by its probability.")] = False,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = "default",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 as trained; bf16 or int8: weights rounded, and read faster.")] = "fp32",
    draft: Annotated[str | None, typer.Option(help="A smaller run that proposes tokens; the texts stay this run's.", metavar="RUN")] = None,
    lookup: Annotated[bool, typer.Option("--lookup", help="Propose what followed the same words before.")] = False,
    beams: Annotated[int, typer.Option(help="Search for the likeliest text with so many at once; 0: draw.")] = 0,
) -> None:
    """Let a trained run write."""
    from gptlab.cli.sample import sample as write
    from gptlab.generate.sampling import Sampling

    settings = Sampling(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()))
    write(
        run,
        prompt=prompt,
        file=prompt_file,
        lines=lines,
        samples=samples,
        settings=settings,
        as_json=as_json,
        probabilities=show_probabilities,
        checkpoint=checkpoint,
        weights=weights,
        device=device,
        precision=precision,
        draft=draft,
        lookup=lookup,
        beams=beams,
    )


app.command("inspect")(inspect_model)
app.command()(chat)
app.command()(serve)


@components_app.callback()
def components(
    context: typer.Context,
    slot: Annotated[str | None, typer.Option(help="This slot alone, such as model/norm.")] = None,
) -> None:
    """List each slot, its components, their options and defaults."""
    if context.invoked_subcommand is None:
        from gptlab.cli.components import components as show

        show(slot)


@components_app.command("check")
def components_check(file: Annotated[Path, typer.Argument(help="A Python file that registers components.")]) -> None:
    """Run the contract tests on the components a file registers."""
    from gptlab.cli.components import check

    raise typer.Exit(check(file))


app.command("import")(import_model)
app.command("export")(export_model)
app.command("evaluate")(evaluate_runs)


def main() -> None:
    """Run the command; a user's error is one sentence and the right exit code. GPTLAB_DEBUG=1 shows the traceback."""
    try:
        app()
    except GptlabError as error:
        if os.environ.get("GPTLAB_DEBUG"):
            raise
        rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
        if str(error) and (rank == "0" or not error.everywhere or _alone()):
            print(f"gptlab: {f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("gptlab: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f"gptlab: {error.filename or 'what it prints'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(74)


def _alone() -> bool:
    """Whether rank 0 has not come to the same error: when it ends, torchrun ends this rank too, without a word."""
    import time

    from gptlab.hardware.world import joined

    if joined():  # all leave together, and rank 0 has said it
        return False
    time.sleep(5)
    return True
