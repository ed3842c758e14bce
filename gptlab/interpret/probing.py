"""Linear probes: what can be read from an activation by a linear map, and what from labels that mean nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.interpret.fitting import fit
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.interpret.lenses import stream_names
from gptlab.interpret.sizes import collect
from gptlab.interpret.taps import tapped

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT = 0.25  # of the rows


@dataclass(frozen=True)
class Probe:
    """A trained probe: shares of held-out labels that it, one trained on shuffled labels, and the commonest label get right.

    `control` is of a probe whose labels were shuffled over the tokens, on both sides of the split: what labels that mean nothing give.
    """

    accuracy: float
    control: float
    commonest: float
    held_out: int
    weight: Float[Tensor, "classes d"]


def probe(
    features: Float[Tensor, "n t d"],
    labels: Int[Tensor, "n t"],
    *,
    held_out: float = HELD_OUT,
    steps: int = 200,
    learning_rate: float = 0.02,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> Probe:
    """Logistic regression from vectors to labels (classes from 0; those below 0 are left out), judged on rows that it was not trained on.

    Whole rows are held out: neighbours in a text know each other's labels. Features are standardised by the training rows.
    Raises ConfigError where shapes do not fit, where there is one class to train on, and where a side of the split has no label.
    """
    if labels.shape != features.shape[:2] or features.dim() != 3:
        raise ConfigError(
            f"labels {tuple(labels.shape)} must be one for each vector of features {tuple(features.shape)}, (n, t) and (n, t, d)"
        )
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out={held_out} must be between 0 and 1")
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    split = max(1, round(held_out * len(labels)))
    sides = [order[split:], order[:split]]
    x, y = zip(*((features[rows][labels[rows] >= 0].float(), labels[rows][labels[rows] >= 0]) for rows in sides), strict=True)
    classes, distinct = int(labels.max()) + 1, len(y[0].unique())
    if not len(y[0]) or not len(y[1]) or distinct < 2:
        found = f"{len(y[0])} labels to train on, {len(y[1])} held out, {distinct} classes"
        raise ConfigError(f"a probe needs at least two rows with labels of at least two classes: there are {found}")
    mean, deviation = x[0].mean(0), x[0].std(0).clamp(min=1e-6) if len(x[0]) > 1 else torch.ones_like(x[0][0])
    x = tuple((part - mean) / deviation for part in x)

    def trained(own: Tensor) -> nn.Linear:
        linear = nn.Linear(x[0].shape[1], classes).to(x[0].device)
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        fit(linear, lambda step: F.cross_entropy(linear(x[0]), own), steps=steps, learning_rate=learning_rate, weight_decay=weight_decay)
        return linear.requires_grad_(False)

    shuffled = [part[torch.randperm(len(part), generator=draw).to(part.device)] for part in y]
    real, control = trained(y[0]), trained(shuffled[0])
    right = [float((map_(x[1]).argmax(-1) == own).float().mean()) for map_, own in ((real, y[1]), (control, shuffled[1]))]
    commonest = float((y[1] == y[0].bincount().argmax()).float().mean())
    return Probe(right[0], right[1], commonest, len(y[1]), real.weight.detach())


def probes(
    model: Model, tokens: Tokens, labels: Int[Tensor, "n t"], names: str | Iterable[str] | None = None, *, seed: int = 0, steps: int = 200
) -> pd.DataFrame:
    """A probe for each activation that `names` mean (the stream at each layer, unless given): name, accuracy, control, commonest, held_out.

    Errors as of `probe` and `capture`.
    """
    import pandas as pd

    inside, ids = model_of(model), tokens_of(model, tokens, "the corpus")
    chosen = [place.name for place in tapped(inside, stream_names(inside) if names is None else names)]
    lines = []
    for name in chosen:
        one = probe(collect(model, ids, name), labels.to(ids.device), steps=steps, seed=seed)
        lines.append((name, one.accuracy, one.control, one.commonest, one.held_out))
    return pd.DataFrame(lines, columns=["name", "accuracy", "control", "commonest", "held_out"])
