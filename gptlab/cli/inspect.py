"""`gptlab inspect`: one page that shows what a model holds while it reads a text, and the key facts of it in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import component_of
from gptlab.data.loader import held_out_batches
from gptlab.data.reader import read_file
from gptlab.hardware.device import machine
from gptlab.interpret.embeddings import analogy, neighbours
from gptlab.interpret.features import autoencoder, has_autoencoder
from gptlab.interpret.inspection import Inspection, inspect
from gptlab.interpret.own_text import own_text
from gptlab.interpret.tuning import TunedLens, tune_lens
from gptlab.interpret.units import excited
from gptlab.model.transformer import count_parameters
from gptlab.runner.checkpoint import choose, step_of
from gptlab.runner.load import Loaded, load
from gptlab.study.inspection_page import Beside, inspection_page, write_inspection
from gptlab.tracker.console import console, say

PROMPT_TOKENS = 64  # of held-out text, where no prompt is given
ROW = 128  # tokens of a row of the text that units are looked for in
KINDS = {"induction": "induction", "previous_token": "previous-token", "duplicate_token": "duplicate-token"}
TOLD = 3  # heads of each kind
LEAST = 0.1  # the score below which a head is none of the kind
NEAR = 8  # tokens that are nearest to one


def inspect_run(
    run: str,
    *,
    prompt: str | None,
    file: Path | None,
    output: Path | None,
    text: Path | None,
    tokens: int,
    tuned: bool,
    analogies: Sequence[str],
    checkpoint: str,
    weights: str,
    device: str,
    force: bool,
) -> None:
    """Write the page. Raises ConfigError for a prompt that does not fit or a file that is something else, CheckpointError, DataError,
    IOFailure."""
    if device.split(":")[0] not in machine().devices:
        raise ConfigError(f"--device {device}: this machine has {', '.join(machine().devices)}")
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --prompt-file: one of them")
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens} must be at least 1")
    loaded = load(run, checkpoint=checkpoint, weights=weights, device=device)
    where = output or Path(f"inspect-{_slug(loaded, run)}.html")
    state, warnings = _state(loaded, checkpoint)
    with console.status("looking for text"):
        texts = _rows(loaded, text, tokens)
    told = prompt if file is None else _read(file)
    if told is None and texts.rows is None:
        raise ConfigError(f"{run} has no text of its own to read ({texts.source}): --prompt gives one")
    with console.status("reading"):
        lens = _tuned(loaded, texts, shown=told is None) if tuned else None
        found = inspect(loaded, texts.beginning() if told is None else told, tuned=lens)
    remarks = [(warning, True) for warning in warnings]
    if told is None:
        remarks.append((f"No prompt was given: this is the beginning of {texts.source}.", False))
        if tuned and texts.rows is not None and len(texts.rows) == 1:
            remarks.append(("The tuned lens is shown on the text that it learned from, its only row: it looks better than it is.", True))
    remarks += [(fact, False) for fact in facts(found)]
    with console.status("looking for what excites units"):
        features = autoencoder(loaded, checkpoint=checkpoint, weights=weights) if has_autoencoder(loaded) else None
        units = excited(loaded, found.tokens[None], texts.rows, document=texts.document, features=features)
    beside = Beside(
        title=_title(loaded, run),
        summary=_summary(loaded, state, len(found.tokens)),
        made=f"made by gptlab inspect · {loaded.weights} weights · {state}",
        remarks=remarks,
        units=units,
        corpus=texts.rows,
        source=texts.source,
        near=_near(loaded, found),
        analogies=[(asked, _pairs(analogy(loaded, asked, top=NEAR))) for asked in analogies],
    )
    made = inspection_page(found, loaded.tokenizer, beside)
    write_inspection(where, made, force=force)
    say(f"page: {where} ({len(made.encode()) / 1e6:.2f} MB)")
    say(("  " + beside.summary, "dim"))
    for warning in warnings:
        say(("  " + warning, "yellow"))
    for fact in facts(found):
        say("  " + fact)


# --- the run ----------------------------------------------------------------------------------------------------------


def _slug(loaded: Loaded, reference: str) -> str:
    """A file name's part that names the run: what was chosen for an imported one, else its study and identity."""
    if loaded.run is None:
        name = Path(reference).stem
    else:
        name = loaded.config.name if loaded.run.study == "imported" else f"{loaded.run.study}-{loaded.run.identity}"
    return re.sub(r"[^\w.=-]+", "_", name).strip("_") or "run"


def _title(loaded: Loaded, reference: str) -> str:
    if loaded.run is None:
        return Path(reference).name
    return f"{loaded.run.study}/{loaded.config.name or 'base'}"


def _state(loaded: Loaded, checkpoint: str) -> tuple[str, list[str]]:
    """What of the run is looked at, and what a reader must know of it."""
    if loaded.run is None:
        return "an exported file", []
    step = step_of(choose(loaded.run.checkpoints, checkpoint))
    state = loaded.run.state
    if state == "done":
        return f"step {step:,}", []
    warning = f"This run is not done ({state}): it is shown as it was at step {step:,} of {loaded.config.trainer.budget}."
    return f"step {step:,}, {state}", [warning]


def _summary(loaded: Loaded, state: str, count: int) -> str:
    model, config = loaded.model, loaded.config.model
    shape = f"{config.depth} layers of {config.heads} heads" if config.depth else "no layers (a bigram)"
    parts = {slot: component_of(getattr(config, slot)).name for slot in ("attention", "position", "kernel", "norm", "ffn")}
    told = ", ".join(f"{slot} {name}" for slot, name in parts.items()) if config.depth else f"position {parts['position']}"
    parameters = count_parameters(model)["total"]
    return f"{count} tokens in {shape}, width {config.width}, {parameters:,} parameters; {told}; {state}"


def facts(found: Inspection) -> list[str]:
    """What the page shows, in a few sentences."""
    told = [f"Mean loss {float(found.loss.mean()):.3f} nats a token."]
    depth = len(found.places) - 1
    if depth:
        told.append(f"Lens depth: the guess is the model's own after {found.depth:.1f} of {depth} layers, on average.")
    heads = [(layer, head) for layer, scores in found.scores.get("induction", {}).items() for head in range(len(scores))]
    for name, kind in KINDS.items() if heads else ():
        best = sorted(heads, key=lambda at: -float(found.scores[name][at[0]][at[1]]))[:TOLD]
        scores = [float(found.scores[name][layer][head]) for layer, head in best]
        shown = ", ".join(f"layer {layer} head {head} ({score:.2f})" for (layer, head), score in zip(best, scores, strict=True))
        told.append(f"Strongest {kind} heads: {shown}." if scores[0] >= LEAST else f"No {kind} head: the best has {scores[0]:.2f}.")
    if found.patterns is None:
        told.append(f"No attention pattern: {found.notes['attention']}.")
    elif not heads:
        told.append(f"No scores of heads: {found.notes['scores']}.")
    if found.patterns is not None and found.patterns.note:
        told.append(f"{found.patterns.note[0].upper()}{found.patterns.note[1:]}.")
    return told


def _near(loaded: Loaded, found: Inspection) -> dict[int, list[tuple[int, float]]]:
    return {token: _pairs(neighbours(loaded, token, top=NEAR)) for token in dict.fromkeys(found.tokens.tolist())}


def _pairs(frame: Any) -> list[tuple[int, float]]:
    return [(int(token), float(cosine)) for token, cosine in zip(frame["token"], frame["cosine"], strict=True)]


# --- texts ------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {file} cannot be read ({error})") from error


@dataclass(frozen=True)
class _Texts:
    """Rows of text (r, t) and what they are of; without rows, why there are none. `document`: of each token, where the model is told."""

    rows: Tensor | None
    source: str
    document: Tensor | None = None

    def beginning(self) -> list[int]:
        """The first row's first tokens; of a row of several texts the first of at least two tokens, which saw no other."""
        assert self.rows is not None
        row: list[int] = self.rows[0].tolist()
        first = 0
        for _, same in groupby([] if self.document is None else self.document[0].tolist()):
            length = len(list(same))
            if length >= 2:
                return row[first : first + length][:PROMPT_TOKENS]
            first += length
        return row[:PROMPT_TOKENS]


def _rows(loaded: Loaded, text: Path | None, tokens: int) -> _Texts:
    """Rows of `text`, or of the run's held-out text."""
    length = min(ROW, loaded.config.model.context_length)
    if text is not None:
        if not text.is_file():
            raise ConfigError(f"--text {text}: there is no such file")
        ids: list[int] = []
        for piece in read_file(text):
            ids += loaded.tokenizer.encode(piece.text).tolist()
            if len(ids) >= tokens:
                break
        length = min(length, len(ids))
        if length < 2:
            raise DataError(f"--text {text} holds fewer than two tokens")
        count = min(len(ids), tokens) // length or 1
        return _Texts(torch.tensor(ids[: count * length]).view(count, length), text.name)
    try:
        prepared, name = own_text(loaded)
    except DataError as error:
        return _Texts(None, str(error))
    count = max(1, tokens // length)
    batch = next(held_out_batches(prepared, name, length, count * length, count, documents=loaded.model.sees_documents))
    return _Texts(batch.inputs.long(), "its held-out text", batch.document)


def _tuned(loaded: Loaded, texts: _Texts, *, shown: bool) -> TunedLens:
    """A tuned lens, learned on the rows; without the first where that is shown and there are others, since it would be judged on it.

    Raises ConfigError where there are no rows, or no layers.
    """
    if texts.rows is None:
        raise ConfigError(f"--tuned-lens needs a text to learn from ({texts.source}): --text FILE names one")
    first = 1 if shown and len(texts.rows) > 1 else 0
    return tune_lens(loaded, texts.rows[first:], document=None if texts.document is None else texts.document[first:])
