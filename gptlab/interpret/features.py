"""Sparse autoencoders that objective=sae has trained: opened, and judged by what a model keeps when it goes through one."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.interpret.activations import forward, losses
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.interpret.sizes import collect
from gptlab.interpret.taps import Edit, Place, places
from gptlab.model.autoencoder import PREFIX, SparseAutoencoder
from gptlab.runner.averages import fill, kept_in, wants_average
from gptlab.runner.checkpoint import choose, load_tensors
from gptlab.runner.load import Loaded


@dataclass(frozen=True)
class Features:
    """An autoencoder, and the name of the activation that it was trained on."""

    name: str
    autoencoder: SparseAutoencoder

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
        """The features of the activation."""
        return self.autoencoder.encode(x.float())


@dataclass(frozen=True)
class Judged:
    """What an autoencoder is worth on a corpus.

    `explained`: the share of the activation's variance that it gives back. `frequency`: the share of tokens at which a feature is active.
    Next-token losses in nats: `loss` of the model, `loss_through` with what the autoencoder gives back in the activation's place,
    `loss_without` with its center there.
    """

    explained: float
    frequency: Float[Tensor, " f"]
    loss: float
    loss_through: float
    loss_without: float

    @property
    def alive(self) -> float:
        """The share of features that are ever active."""
        return float((self.frequency > 0).float().mean())


def has_autoencoder(loaded: Loaded) -> bool:
    """Whether this is a run of objective=sae."""
    return loaded.run is not None and component_of(loaded.config.objective).name == "sae"


def autoencoder(loaded: Loaded, *, checkpoint: str = "latest", weights: str = "default") -> Features:
    """The autoencoder of a run of objective=sae, at one of its checkpoints; `checkpoint` and `weights` as of `load`.

    Raises ConfigError for any other run or an average that it does not keep, CheckpointError.
    """
    if not has_autoencoder(loaded) or loaded.run is None:
        raise ConfigError(
            "this is no run of objective=sae, and has no autoencoder; "
            "gptlab train objective=sae trainer.init_from=RUN objective.activation=blocks.0 makes one"
        )
    chosen = choose(loaded.run.checkpoints, checkpoint)
    kept = kept_in(chosen)
    tensors, others = load_tensors(chosen)
    if wants_average(kept, weights, str(chosen)) and kept is not None:
        tensors |= {name.removeprefix(kept.tensors): tensor for name, tensor in others.items() if name.startswith(kept.tensors)}
    found = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    options = loaded.config.objective
    made = SparseAutoencoder(found["directions"].shape[1], found["directions"].shape[0], options.active)  # type: ignore[attr-defined]
    fill(made.state_dict(), found, chosen)
    made.requires_grad_(False).to(loaded.model.embedding.weight.device)
    return Features(options.activation, made)  # type: ignore[attr-defined]


def judge_autoencoder(model: Model, tokens: Tokens, features: Features) -> Judged:
    """Over rows of a corpus (n, t), of at least two tokens each. Raises ConfigError for rows that do not fit."""
    inside, ids = model_of(model), tokens_of(model, tokens, "the corpus")
    made, x = features.autoencoder, collect(model, ids, features.name).float().flatten(0, 1)
    spread = (x - x.mean(0)).square().sum()
    explained = 1 - float((made(x) - x).square().sum() / spread) if spread else 1.0
    (place,) = places(inside, features.name)
    edits: tuple[dict[Place, Edit], ...] = (
        {},
        {place: lambda value: made(value.float()).to(value)},
        {place: lambda value: made.center.to(value)},
    )
    three = [float(losses(forward(inside, ids, [], edit)[1], ids).mean()) for edit in edits]
    return Judged(explained, (made.encode(x) > 0).float().mean(0), *three)
