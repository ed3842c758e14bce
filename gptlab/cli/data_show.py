"""What `gptlab data show` prints: the very rows that a step of a run is trained on."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from gptlab.cli.data import print_rows
from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import component_of, load_components
from gptlab.config.resolve import parse_budget, start_step
from gptlab.config.schema import Config
from gptlab.data import report as figures
from gptlab.data.loader import Loader
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.data.sources import training_rows
from gptlab.model.transformer import count_parameters, flops_per_token, meta_model
from gptlab.runner import checkpoint
from gptlab.runner.passed import PASSED, batch_of_step, passed_batches
from gptlab.runner.run import Run, find_run
from gptlab.tracker.console import PreparationProgress, say
from gptlab.tracker.jsonl import read_metrics


def show(reference: str, *, step: int | None, batch: int | None, rows: int | None, tokens: bool, as_json: bool) -> None:
    """Print the rows that a step of a run is trained on, or those of a batch by its number (from 0): one that was passed over."""
    load_components()
    run = find_run(reference)
    config = run.config()
    if (step is None) == (batch is None):
        raise ConfigError("data show wants --step S, from 1, or --batch N, from 0: one of the two")
    if getattr(component_of(config.objective).factory, "answers_problems", False):
        raise ConfigError(f"{run.directory.name} learned from what the model itself answered, not from rows of its data: see its samples/")
    with PreparationProgress() as progress:
        data = prepare(config.data, report=progress.update, background=True)
    with contextlib.closing(data):  # a stream need not grow any more
        _check_hash(run, data)
        passed = passed_batches(run)
        last = _last_step(run, config, data)
        if not last:
            raise ConfigError(f"{run.directory.name} has come to no step yet, and its trainer.budget={config.trainer.budget} tells none")
        if step is not None:
            if not 1 <= step <= last:
                raise ConfigError(
                    f"--step {step}: {run.directory.name} has the steps 1 to {last:,} (trainer.budget={config.trainer.budget})"
                )
            batch = batch_of_step(step, passed)
        assert batch is not None
        batches = batch_of_step(last, passed)
        if not 0 <= batch <= batches:
            raise ConfigError(f"--batch {batch}: {run.directory.name} has the batches 0 to {batches:,}")
        context, seed = config.model.context_length, int(config.seeds.data or 0)
        size = int(config.trainer.batch_tokens) // context
        first, count = batch * size, size if rows is None else min(rows, size)
        found = figures.rows(data, context, config.data.packing, seed, count, first, config.data.too_long)
        noted = {line["batch"]: line for line in read_metrics(run.directory / PASSED)}  # once, however often it was come upon
        lines = [line for line in noted.values() if step is not None and line["step"] == step]
        if as_json:
            told = {"run": str(run.directory), "step": step, "batch": batch, "passed": lines, "rows_of_batch": size, "context": context}
            print(json.dumps(told | {"rows": [_row(row, tokens) for row in found]}, indent=1))
            return
        which = f"batch {batch:,}" if step is None else f"step {step:,} of {last:,}: batch {batch:,}"
        more = "" if count == size else ", the first of them" if count == 1 else f", the first {count:,} of them"
        say(
            (which, "bold"),
            f", rows {first:,} to {first + size - 1:,} of {context} tokens{more}",
            ("  ⏎ marks where a document begins", "dim"),
        )
        for line in lines:
            say((f"passed over at this step: batch {line['batch']:,} ({line['reason']}); --batch {line['batch']} shows it", "yellow"))
        if step is None and batch in passed:
            say(("no step takes this batch: it was passed over", "yellow"))
        say()
        print_rows(found, data.tokenizer, start=first, named=bool(data.parts), tokens=tokens)


def _check_hash(run: Run, data: Prepared) -> None:
    written = (run.read("data.json") or {}).get("hash")
    if written is None:
        raise DataError(
            f"{run.directory / 'data.json'} cannot be read, so that nobody knows which text {run.directory.name} was trained on"
        )
    if written != data.hash:
        raise DataError(
            f"{run.directory.name} was trained on data with hash {written[:12]}…, and its config.json now makes {data.hash[:12]}… "
            f"({data.folder}): the text has changed since; bring back the text of then"
        )


def _last_step(run: Run, config: Config, data: Prepared) -> int:
    """The last step of the run's budget; where the clock is the budget, the last that it has come to."""
    budget = parse_budget(config.trainer.budget)
    batch_tokens, context = int(config.trainer.batch_tokens), config.model.context_length
    if budget.unit == "min":
        kept = [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(run.checkpoints)]
        return max([0, *kept, *(int(line.get("step", 0)) for line in run.metrics())])
    parameters, flops, epoch = 0, 1.0, 0
    if budget.unit in ("x", "flops"):
        model = meta_model(config.model, data.vocabulary)
        parameters, flops = count_parameters(model)["total"], flops_per_token(model)
    if budget.unit == "epochs":
        source = training_rows(data, context, config.data.packing, int(config.seeds.data or 0), config.data.too_long)
        epoch = Loader(source, batch_tokens // context).epoch_tokens
    start = start_step(config)
    steps = budget.steps(batch_tokens=batch_tokens, epoch_tokens=epoch, parameters=parameters, flops_per_token=flops, start=start)
    assert steps is not None
    return steps


def _row(row: figures.Row, tokens: bool) -> dict[str, Any]:
    """A row as JSON data: its documents as text; of a task which targets are scored; `tokens`: its inputs and the last target."""
    told: dict[str, Any] = {"row": row.number, "source": row.source, "documents": row.parts}
    if row.scored is not None:
        told["scored"] = row.scored
    return told | ({"tokens": row.tokens} if tokens else {})
