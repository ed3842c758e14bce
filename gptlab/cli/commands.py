"""`gptlab chat` and `serve`, and the subcommands of `gptlab bench` and `data`. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gptlab.cli.arguments import CheckpointOption, JsonOption, OverridesArgument, RunArgument, WeightsOption, complete_overrides

bench_app = typer.Typer(help="Time gptlab on this machine.", no_args_is_help=True)
data_app = typer.Typer(help="Prepare data ahead of training; look at it.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train tokenisers; compare them.", no_args_is_help=True)
data_app.add_typer(tokenizer_app, name="tokenizer")


def chat(
    run: RunArgument,
    system: Annotated[str, typer.Option(help="What a model with chat tokens is told before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; 1: as the model believes.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0: from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that together have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same conversation.")] = 0,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = "default",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 as trained; bf16 or int8: weights rounded, and read faster.")] = "fp32",
) -> None:
    """Talk to a run in the terminal; one without chat tokens goes on with your text."""
    from gptlab.cli.chat import chat as talk
    from gptlab.generate.sampling import Sampling

    settings = Sampling(max_tokens, temperature, top_k, top_p, seed=seed)
    talk(run, system=system, settings=settings, checkpoint=checkpoint, weights=weights, device=device, precision=precision)


def serve(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Directories, identities, unique prefixes, or `latest`.")],
    host: Annotated[str, typer.Option(help="The address; another than this machine's own takes a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8421,
    token: Annotated[
        str | None,
        typer.Option(help="What clients must send as their key; made up for an address that others reach.", envvar="GPTLAB_TOKEN"),
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another name that this server answers to.", metavar="NAME")] = None,
    rows: Annotated[int | None, typer.Option(help="Texts that are made side by side; unless given, what fits, up to 32.")] = None,
    queue: Annotated[int, typer.Option(help="Requests of each model that may wait.")] = 64,
    threads: Annotated[int | None, typer.Option(help="CPU cores of a step; unless given, 1 for a small model, else all.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, whatever a request asks for.")] = 4096,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = "default",
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 as trained; bf16 or int8: weights rounded, and read faster.")] = "fp32",
) -> None:
    """Serve runs to OpenAI's clients, with a page to talk to them and to tell them apart."""
    from gptlab.cli.serve import serve as run

    run(
        runs,
        host=host,
        port=port,
        token=token,
        allow_hosts=allow_host or [],
        rows=rows,
        queue=queue,
        threads=threads,
        max_tokens=max_tokens,
        checkpoint=checkpoint,
        weights=weights,
        device=device,
        precision=precision,
    )


@bench_app.command("train")
def bench_train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OVERRIDE]…",
            help="As for train: optimizer=muon, hardware.compile=true, experiment=NAME, …",
            autocompletion=complete_overrides,
        ),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="A nanoGPT checkout to time in turn.", metavar="FOLDER")] = None,
    model: Annotated[
        str | None, typer.Option(help="The recipe to time: nano (unless named) or char for a nanoGPT setting.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each; the median counts.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Time our training step, by phase and by operator, and that of a nanoGPT checkout in the same run."""
    from gptlab.cli.bench import train as bench

    bench(against, overrides=overrides or [], model=model, rounds=rounds, as_json=as_json)


@bench_app.command("generate")
def bench_generate(
    model: Annotated[str, typer.Option(help="A recipe of model/.", metavar="NAME")] = "gpt2",
    batch: Annotated[list[int] | None, typer.Option(help="Rows side by side; may be given several times.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of each row.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often each is timed, in turn.")] = 5,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or int8.")] = "bf16",
    as_json: JsonOption = False,
) -> None:
    """Time generation, beside transformers' generate where that is installed."""
    from gptlab.cli.bench_generate import bench

    bench(model=model, batches=batch or [1, 8], tokens=tokens, rounds=rounds, precision=precision, as_json=as_json)


@bench_app.command("serve")
def bench_serve(
    run: RunArgument = "latest",
    clients: Annotated[int, typer.Option(help="How many ask at once.")] = 32,
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 200,
    rounds: Annotated[int, typer.Option(help="How often one client and many are timed, in turn.")] = 3,
    requests: Annotated[int, typer.Option(help="Short requests after that, over which memory is watched.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Time a server of a run: one client, many at once, and its memory over many requests."""
    from gptlab.cli.bench_serve import bench

    bench(run, clients=clients, tokens=tokens, rounds=rounds, requests=requests, as_json=as_json)


@bench_app.command("data")
def bench_data(
    text: Annotated[Path | None, typer.Option(help="The text to tokenise; Python's documentation unless named.", metavar="FILE")] = None,
    megabytes: Annotated[int, typer.Option(help="How much of it; a shorter text is repeated.")] = 100,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each; the median counts.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Time preparation beside the bare tokeniser, and the loader over two billion tokens."""
    from gptlab.cli.bench_data import data as bench

    bench(text, megabytes=megabytes, rounds=rounds, as_json=as_json)


@bench_app.command("checkpoint")
def bench_checkpoint(
    model: Annotated[str, typer.Option(help="The recipe to time.")] = "gpt2",
    rounds: Annotated[int, typer.Option(help="Checkpoints to write.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Time what a checkpoint costs training, a resume a start, and the guards a step."""
    from gptlab.cli.bench_checkpoint import checkpoint as bench

    bench(model, rounds=rounds, as_json=as_json)


@bench_app.command("coordinates")
def bench_coordinates(
    overrides: OverridesArgument = None,
    widths: Annotated[str, typer.Option(help="The widths to train at; heads keep theirs.")] = "64,128,256,512",
    steps: Annotated[int, typer.Option(help="Steps at each width.")] = 5,
    seeds: Annotated[int, typer.Option(help="Seeds whose mean is taken.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show whether a model's parts move alike at every width, by muP and by the standard parametrisation."""
    from gptlab.cli.bench_coordinates import coordinates as bench

    bench(overrides or [], widths=widths, steps=steps, seeds=seeds, as_json=as_json)


@data_app.command("prepare")
def data_prepare(overrides: OverridesArgument = None) -> None:
    """Tokenise a corpus into shards; go on with what was stopped."""
    from gptlab.cli.data import prepare

    prepare(overrides or [])


@data_app.command("report")
def data_report(
    overrides: OverridesArgument = None,
    documents: Annotated[int, typer.Option(help="Documents to show of each source.", min=0)] = 3,
    rows: Annotated[int, typer.Option(help="Training rows to show.", min=0)] = 3,
    as_json: JsonOption = False,
) -> None:
    """Say what a corpus holds: documents, lengths, duplicates, shares, leaks, rows as training sees them."""
    from gptlab.cli.data import report

    report(overrides or [], as_json=as_json, documents=documents, rows=rows)


@data_app.command("show")
def data_show(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(help="A step of the run, from 1.")] = None,
    batch: Annotated[int | None, typer.Option(help="Or a batch, from 0: one that was passed over.")] = None,
    rows: Annotated[int | None, typer.Option(help="Its first rows alone; without it all.", min=1)] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Token by token, with their ids.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the very documents that a step of a run is trained on."""
    from gptlab.cli.data_show import show

    show(run, step=step, batch=batch, rows=rows, tokens=tokens, as_json=as_json)


@tokenizer_app.command("train")
def tokenizer_train(
    overrides: OverridesArgument = None,
    out: Annotated[Path | None, typer.Option(help="Write it to this file; unless named, where data look for it.", metavar="FILE")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train data/tokenizer=bpe on a corpus."""
    from gptlab.cli.data import tokenizer_train as run

    run(overrides or [], out=out, as_json=as_json)


@tokenizer_app.command("report")
def tokenizer_report(
    overrides: OverridesArgument = None,
    compare: Annotated[str, typer.Option(help="Others to compare: gpt2,cl100k,byte or files of `tokenizer train`.")] = "",
    show: Annotated[str, typer.Option(help="A text to show in tokens.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Measure a tokeniser on a corpus, beside others."""
    from gptlab.cli.data import tokenizer_report as run

    run(overrides or [], compare=compare, show=show, as_json=as_json)
