"""A finished (or stopped) run as a model to use: `load("latest")`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptlab.config.errors import CheckpointError, ConfigError
from gptlab.config.registry import load_components
from gptlab.config.schema import Config
from gptlab.data.tokenizer import Tokenizer, from_json
from gptlab.generate.sampling import Sampling
from gptlab.generate.text import complete
from gptlab.model.linear import undrawn
from gptlab.model.transformer import Transformer
from gptlab.runner.averages import check_weights, load_weights
from gptlab.runner.checkpoint import choose, fill
from gptlab.runner.export import read_export
from gptlab.runner.run import Run, find_run


@dataclass(frozen=True)
class Loaded:
    """A trained model with its tokeniser and config; of an exported file there is no `run`. `weights`: trained, or average."""

    run: Run | None
    config: Config
    model: Transformer
    tokenizer: Tokenizer
    weights: str = "trained"

    def sample(self, prompt: str = "\n", *, max_tokens: int = 200, temperature: float = 0.8, top_k: int = 50, seed: int = 0) -> str:
        """Text after a prompt. Raises ConfigError for settings that mean nothing or a prompt the tokeniser does not know."""
        settings = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
        return complete(self.model, self.tokenizer, [prompt], settings)[0].text


def load(run: str | Run, *, checkpoint: str = "latest", weights: str = "default", device: str = "cpu") -> Loaded:
    """Open a run (directory, identity, unique prefix, or `latest`) at its newest good checkpoint, or an exported file, in evaluation mode.

    `checkpoint` is another one: `best`, a step, or its folder. `weights`: `trained`; `average`, which callback=ema and
    optimizer=schedule_free make; or `default`: the average of schedule_free, whose trained weights are no model to use, else the trained.
    Raises ConfigError if there is no such run or average or a component is not registered, CheckpointError if no checkpoint is usable.
    """
    load_components()
    if isinstance(run, str) and run.endswith(".safetensors"):
        config, tokenizer, tensors, metadata = read_export(Path(run))
        held = metadata.get("weights", "trained")  # those of an older gptlab do not say
        check_weights(weights)
        if weights not in ("default", held):
            raise ConfigError(
                f"weights={weights}: {run} holds its {held} weights alone; `gptlab export --weights {weights}` writes the others"
            )
        return Loaded(None, config, _filled(config, tokenizer, tensors, run).to(torch.device(device)).eval(), tokenizer, held)
    found = run if isinstance(run, Run) else find_run(run)
    config = found.config()
    chosen = choose(found.checkpoints, checkpoint)
    held, tensors, _ = load_weights(chosen, weights)
    file = found.directory / "tokenizer.json"
    try:
        tokenizer = from_json(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    return Loaded(found, config, _filled(config, tokenizer, tensors, str(chosen)).to(torch.device(device)).eval(), tokenizer, held)


def _filled(config: Config, tokenizer: Tokenizer, weights: dict[str, Tensor], where: str) -> Transformer:
    with undrawn():
        model = Transformer(config.model, tokenizer.vocabulary)
    fill(model, weights, where)
    return model
