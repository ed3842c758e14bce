"""`gptlab import`: a model from elsewhere becomes a run, with its config, tokeniser and one checkpoint, as if it had been trained here."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.config import codec
from gptlab.config.errors import ConfigError
from gptlab.config.folders import runs_root
from gptlab.config.registry import build, component
from gptlab.config.schema import Config
from gptlab.data.tokenizer import Tokenizer, digest, from_json, to_json
from gptlab.data.tokenizer_file import written_in
from gptlab.interop import hub
from gptlab.interop.huggingface import CHAT_TEMPLATE, FILES, Foreign, read_folder
from gptlab.interop.nanogpt import read_meta, read_nanogpt
from gptlab.runner import checkpoint
from gptlab.runner.environment import environment, source_hash
from gptlab.runner.run import Run, all_runs, locked, make_directory, now, remove_run
from gptlab.runner.state import State

STUDY = "imported"
NOTE = "imported.json"  # in the run's folder: where it came from


@dataclass(frozen=True)
class Imported:
    """What was made: the run, its parameters, and whether it was there already."""

    run: Run
    parameters: int
    kind: str
    known: bool = False


def import_run(
    source: str, base: Config, *, name: str = "", revision: str | None = None, tokenizer: str = "", force: bool = False
) -> Imported:
    """Make a run of a model: a folder of Hugging Face's, its name on the hub, or nanoGPT's ckpt.pt. None of its code is run.

    `base`: a resolved config, for all but the model. `tokenizer`: in place of the model's own: a registered name or a path.
    The same weights again are the run that is there (`force`: made anew). Raises ConfigError, CheckpointError or IOFailure.
    """
    given = _given(tokenizer) if tokenizer else None
    foreign, where = _read(source, revision, given)
    config = _config(base, foreign.model, foreign.tokenizer, name or _name(source))
    with_tokens = to_json(foreign.tokenizer)
    content = hashlib.sha256((_digest(foreign.weights) + digest(with_tokens)).encode()).hexdigest()
    identity = codec.identity(config, content, {})
    run = Run(runs_root() / STUDY / f"{config.name}-{identity}")
    known = next((r for r in all_runs() if r.identity == identity), None)
    parameters = sum(t.numel() for t in foreign.weights.values())
    if known is not None:
        if not force:
            return Imported(known, parameters, foreign.kind, known=True)
        remove_run(known)
    make_directory(run)
    with locked(run):
        try:
            _write(run, config, foreign, with_tokens, {"source": source, **where, "content": content, "parameters": parameters})
        except BaseException:
            (run.directory / "config.json").unlink(missing_ok=True)  # half a run is none
            raise
    return Imported(run, parameters, foreign.kind)


def _read(source: str, revision: str | None, tokenizer: Tokenizer | None) -> tuple[Foreign, dict[str, Any]]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".pt":
            raise ConfigError(f"{path} is a file, and no ckpt.pt of nanoGPT's; of a Hugging Face model give the folder")
        return read_nanogpt(path, tokenizer), {}
    if path.is_dir():
        return read_folder(path, tokenizer), {}
    if not hub.is_name(source):
        raise ConfigError(f"{source} is no folder or file here, and no name on the hub (gpt2, gpt2-medium, OWNER/MODEL)")
    folder, commit = hub.fetch(source, FILES, revision)
    return read_folder(folder, tokenizer), {"commit": commit}


def _given(reference: str) -> Tokenizer:
    """The tokeniser that --tokenizer names."""
    path = Path(reference).expanduser()
    if path.suffix == ".pkl":
        return read_meta(path)
    if path.exists():
        return from_json(written_in(reference), reference)
    tokenizer: Tokenizer = build(component("data/tokenizer", reference).options())
    if not tokenizer.vocabulary or getattr(tokenizer, "learns", False):
        raise ConfigError(f"--tokenizer {reference} knows nothing before it has learned: give the file that it was learned to")
    return tokenizer


def _config(base: Config, model: Any, tokenizer: Tokenizer, name: str) -> Config:
    corpus: Any = component("data/corpus", "none").options()
    options: Any = component("data/tokenizer", tokenizer.name).options()
    data = replace(base.data, corpus=corpus, tokenizer=options)
    trainer = replace(base.trainer, budget="1steps")
    return replace(base, model=model, data=data, trainer=trainer, study=STUDY, name=name, arm="", callbacks={})


def _name(source: str) -> str:
    path = Path(source)
    last = path.resolve().parent.name if path.is_file() else path.resolve().name if path.is_dir() else path.name
    return re.sub(r"[^\w.+-]+", "_", last) or "model"


def _digest(weights: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name}{tuple(weights[name].shape)}".encode())
        found.update(weights[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _write(run: Run, config: Config, foreign: Foreign, tokenizer: dict[str, Any], told: dict[str, Any]) -> None:
    run.write("tokenizer.json", tokenizer)
    if foreign.chat_template is not None:
        (run.directory / CHAT_TEMPLATE).write_text(foreign.chat_template, encoding="utf-8")
    run.write("data.json", {"hash": told["content"]})
    run.write("environment.json", environment(torch.device("cpu")))
    run.write(NOTE, {"kind": foreign.kind, **told, **foreign.told})
    run.metrics_file.touch()
    state = {"state": State().to_json(), "optimizer": {"groups": [], "scalars": {}}, "scaler": {}}
    checkpoint.save(run.checkpoints, 0, foreign.weights, {}, state)
    run.write("config.json", codec.to_json(config))
    summary = {"parameters": told["parameters"]}
    run.write("done.json", {"summary": summary, "finished": now(), "source": source_hash()})


def note_of(run: Run) -> dict[str, Any] | None:
    """Where an imported run came from; None for one that was trained here."""
    return run.read(NOTE)
