"""A sparse autoencoder of one activation of a model that was trained before, and stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register, suggest
from gptlab.config.schema import Config
from gptlab.data.loader import Batch, held_out_batches
from gptlab.data.prepared import Prepared
from gptlab.model.autoencoder import SparseAutoencoder
from gptlab.model.init import drawn_from
from gptlab.model.transformer import Transformer
from gptlab.objective.protocol import Objective, Training
from gptlab.tracker.protocol import Metrics

SEEN = 8192  # held-out tokens whose activations give center and scale
TOGETHER = 2048  # tokens of one forward pass without gradients


@register("objective", "sae")
class SAE(Objective):
    """A TopK sparse autoencoder (Gao et al., 2024) of one activation of the model of trainer.init_from, whose own weights stay.

    activation  what it reads, by a part's path: blocks.1 (the stream behind that block), blocks.0.ffn, blocks.0.attention, embedded
    features    how many directions; 0: eight times the activation's width
    active      how many of them a token has at most

    `train/loss` is the mean squared error in units of the activation's own deviation. `val/loss` is the model's next-token loss with what
    the autoencoder gives back in the activation's place, so that a comparison of autoencoders judges what each keeps of the model;
    `val/explained` the share of the held-out activation's variance that it gives back, `val/alive` the share of features that are ever
    active there. Whoever opens the run finds the model as it was; `gptlab.interpret.autoencoder` and `gptlab inspect` find the features.
    """

    def __init__(self, *, activation: str = "blocks.0", features: int = 0, active: int = 8) -> None:
        if features < 0 or active < 1 or 0 < features < active:
            raise ConfigError(f"objective.active={active} must be at least 1, and at most objective.features={features} (0: chosen)")
        self.activation, self.features, self.active = activation, features, active
        self._seen: Tensor | None = None
        self._autoencoder: list[SparseAutoencoder] = []  # in a list: it is the model's part, and not this objective's
        self._reading = False

    def check(self, data: Prepared, config: Config) -> None:
        super().check(data, config)
        if not config.trainer.init_from and not config.trainer.start:
            raise ConfigError("objective=sae looks into a model that is trained already: give trainer.init_from=RUN")

    def adapt(self, model: Transformer, seed: int, new_tokens: int) -> None:
        modules = {path: module for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList)}
        if self.activation not in modules:
            near = suggest(self.activation, modules, cutoff=0.4)
            raise ConfigError(f"objective.activation={self.activation}: this model has no such part{near}")
        modules[self.activation].register_forward_hook(self._hook)
        device = model.embedding.weight.device
        with torch.no_grad(), self._read(model):
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
        seen = self._seen
        if seen is None or seen.dim() != 3:
            shape = "nothing" if seen is None else tuple(seen.shape)
            raise ConfigError(f"objective.activation={self.activation} is no vector a token (it gives {shape}); blocks.0 is one")
        features = self.features or 8 * seen.shape[-1]
        if self.active > features:
            raise ConfigError(f"objective.active={self.active} is more than the {features} features there are")
        model.requires_grad_(False)
        made = SparseAutoencoder(seen.shape[-1], features, self.active, device)
        model.autoencoder = made.initialise(drawn_from(seed, "autoencoder.directions"))
        self._autoencoder = [made]

    def begin(self, training: Training) -> None:
        if training.number:
            return  # center and scale came with the checkpoint
        self._autoencoder[0].standardise(self._held_out(training, SEEN))

    def __call__(self, model: Transformer, batch: Batch) -> Tensor:
        with torch.no_grad(), self._read(model):
            model(batch.inputs, document=batch.document, reduce=_nothing)
        x, autoencoder = self._held(), self._autoencoder[0]
        each = ((autoencoder(x) - x) / autoencoder.scale).square().mean(-1)
        total: Tensor = each.sum() if batch.weight is None else (each * batch.weight).sum()
        return total

    @torch.no_grad()
    def measure(self, training: Training) -> Metrics:
        autoencoder, x = self._autoencoder[0], self._held_out(training, training.config.data.validation_tokens)
        error, active = 0.0, torch.zeros(len(autoencoder.directions), dtype=torch.bool, device=x.device)
        for part in torch.split(x, TOGETHER):
            features = autoencoder.encode(part)
            active |= (features > 0).any(0)
            error += float((autoencoder.decode(features) - part).square().sum())
        spread = float((x - x.mean(0)).square().sum())
        return {"val/explained": 1 - error / spread if spread else 1.0, "val/alive": float(active.float().mean())}

    @torch.no_grad()
    def _held_out(self, training: Training, limit: int) -> Tensor:
        """What the model has there of so many held-out tokens (0: all): (tokens, d), fp32."""
        data, model, context = training.data, training.trained, training.config.model.context_length
        found = []
        for batch in held_out_batches(data, data.validation_names[0], context, limit, max(1, TOGETHER // context)):
            batch = batch.to(training.device)
            with self._read(model):
                model(batch.inputs, document=batch.document, reduce=_nothing)
            found.append(self._held().flatten(0, 1))
        return torch.cat(found)

    def _held(self) -> Tensor:
        assert self._seen is not None
        seen, self._seen = self._seen, None
        return seen.float()

    @contextmanager
    def _read(self, model: Transformer) -> Iterator[None]:
        """Within, the activation is kept as the model has it, without dropout; elsewhere the autoencoder stands in its place."""
        was_training, self._reading, self._seen = model.training, True, None
        model.eval()
        try:
            yield
        finally:
            self._reading = False
            model.train(was_training)

    def _hook(self, module: nn.Module, inputs: Any, out: Any) -> Tensor | None:
        if self._reading:
            self._seen = out if isinstance(out, Tensor) else None
            return None
        through: Tensor = self._autoencoder[0](out.float()).to(out)
        return through


def _nothing(features: Tensor, within: Transformer) -> Tensor:
    return features
