"""`gptlab import`, `gptlab export` and `gptlab evaluate`: models from elsewhere and for elsewhere, and what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gptlab.cli.arguments import CheckpointOption, JsonOption, RunArgument, WeightsOption


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, OWNER/MODEL on the hub, a model's folder, or nanoGPT's ckpt.pt."
        ),
    ],
    name: Annotated[str, typer.Option(help="Of the run; the source's unless given.", metavar="NAME")] = "",
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub: a branch, tag or commit.", metavar="WHICH")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="In place of the model's own: gpt2, byte, …, a tokenizer.json, or nanoGPT's meta.pkl.", metavar="NAME|PATH")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Make the run anew, should it be there.")] = False,
) -> None:
    """Make a run of a pretrained GPT-2 or Llama: to sample, evaluate, train on, compare and look into."""
    from gptlab.config.compose import compose
    from gptlab.config.resolve import resolve
    from gptlab.hardware.device import machine
    from gptlab.interop.importing import import_run
    from gptlab.tracker.console import console, say

    base = resolve(compose([]), machine())
    with console.status(f"reading {source}"):
        made = import_run(source, base, name=name, revision=revision, tokenizer=tokenizer, force=force)
    run, model = made.run, made.run.config().model
    say((str(run.directory), "bold"), "  is there already; --force makes it anew" if made.known else f"  {made.parameters:,} parameters")
    say(
        (f"{made.kind}: width {model.width}, depth {model.depth}, heads {model.heads}, context {model.context_length:,}; ", "dim"),
        (f"gptlab sample {run.identity} talks to it", "dim"),
    )


def export_model(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="safetensors (gptlab's own), hf (for transformers and vLLM), gguf, onnx.")] = "safetensors",
    output: Annotated[Path | None, typer.Option(help="Unless named: the run's folder name, here.", metavar="PATH")] = None,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = "default",
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there already.")] = False,
    push: Annotated[str, typer.Option(help="With --to hf: send the folder to the hub, too.", metavar="OWNER/MODEL")] = "",
    public: Annotated[bool, typer.Option("--public", help="With --push: a new model there is seen by everybody.")] = False,
) -> None:
    """Write a run for use elsewhere, its tokeniser inside."""
    from rich.filesize import decimal

    from gptlab.config.errors import ConfigError
    from gptlab.runner.run import find_run
    from gptlab.tracker.console import say

    if push and to != "hf":
        raise ConfigError(f"--push sends a folder of --to hf, not of --to {to}")
    found = find_run(run)
    if to == "safetensors":
        from gptlab.runner.export import export

        made = export(found, output, which=checkpoint, weights=weights, dtype=dtype, force=force)
        loss = f", val {made.loss:.4f}" if made.loss is not None else ""
        loss += f" (of step {made.loss_step:,})" if made.loss_step not in (None, made.step) else ""
        average = " (an average)" if made.weights == "average" else ""
        say(
            (str(made.file), "bold"),
            f"  {made.parameters:,} parameters{average} in {dtype}, {decimal(made.bytes)}, step {made.step:,}{loss}",
        )
        return
    from gptlab.interop.exporting import export_to

    written = export_to(found, to, output, which=checkpoint, weights=weights, dtype=dtype, force=force)
    say((str(written.path), "bold"), f"  {written.shape}, {written.parameters:,} parameters in {dtype}, {decimal(written.bytes)}")
    say((written.opens, "dim"))
    if push:
        from gptlab.interop.hub import push as send

        say(f"sent to {send(written.path, push, private=not public)}")


def evaluate_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Directories, identities, unique prefixes, `latest`, exported files.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="This text in place of a run's held-out sets; may be given several times.", metavar="FILE")
    ] = None,
    stride: Annotated[int, typer.Option(help="Of --text: tokens from one window to the next; 0: the whole context.")] = 0,
    tokens: Annotated[int, typer.Option(help="Of each text at most so many; 0: all.")] = 0,
    tasks: Annotated[
        str, typer.Option(help="Benchmarks of lm-evaluation-harness instead: hellaswag,arc_easy,…; or core.", metavar="NAME,…")
    ] = "",
    task_folder: Annotated[
        Path | None, typer.Option(help="Tasks of your own: YAML over files, no network needed.", metavar="FOLDER")
    ] = None,
    probes: Annotated[
        str,
        typer.Option(
            help="What it knows and can do, no download: all, english, german, facts, arithmetic, addition, recall, induction, copying.",
            metavar="NAME,…",
        ),
    ] = "",
    shots: Annotated[int | None, typer.Option(help="Of --tasks: examples shown before each; as the task has it, unless given.")] = None,
    limit: Annotated[int, typer.Option(help="Of --tasks and --probes: examples of each at most; 0: all.")] = 0,
    memorised: Annotated[bool, typer.Option("--memorised", help="The longest stretch of its training text in what it writes.")] = False,
    contamination: Annotated[
        bool, typer.Option("--contamination", help="How much of each --text stands in its training text: a benchmark it has seen?")
    ] = False,
    ngram: Annotated[int, typer.Option(help="Of --contamination: words in a row that count as seen.")] = 13,
    checkpoint: CheckpointOption = "latest",
    weights: WeightsOption = "default",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or int8.")] = "fp32",
    as_json: JsonOption = False,
) -> None:
    """Measure runs on held-out sets or any text (loss, bits a byte, by place and frequency, calibration), on benchmarks, by probes."""
    from gptlab.cli.evaluate import evaluate

    evaluate(
        runs,
        files=text or [],
        stride=stride,
        tokens=tokens,
        checkpoint=checkpoint,
        weights=weights,
        device=device,
        precision=precision,
        as_json=as_json,
        tasks=tasks,
        folder=task_folder,
        shots=shots,
        limit=limit,
        probes=probes,
        memorised=memorised,
        contamination=contamination,
        ngram=ngram,
    )
