"""Parametrisation: what a width changes beside the shapes: the size of fresh weights, of logits and scores, and of updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register


@dataclass(frozen=True)
class Parametrisation:
    """How a model of some width is drawn, read and updated, by the width whose numbers are meant (`init_width`).

    `multiple`: how many times wider the model is than that. A sum over the width then has so many more terms: fresh matrices are
    multiplied by multiple^-1/2 (their terms add up at random), the features that the head reads by 1/multiple, and each optimizer
    corrects its updates, whose terms add up in one direction (gptlab/optimizer/groups.py).
    `score`: a factor on attention's scores, beside 1/sqrt(head width).
    """

    init_width: int
    multiple: float = 1.0
    score: float = 1.0


@register("model/parametrisation", "standard")
def standard(width: int) -> Parametrisation:
    """As the init says, and one rate for all: what is found at one width must be looked for again at another."""
    return Parametrisation(width)


@register("model/parametrisation", "mup")
def mup(width: int, head_width: int, *, base_width: int = 64, base_head_width: int | None = None) -> Parametrisation:
    """Maximal update parametrisation (Yang & Hu, 2021; Yang et al., 2022): a rate found at `base_width` holds at every width.

    With m = width / base_width, and everything at m = 1 as in `standard`, bit for bit:

    - a matrix (attention's and feed-forward's products, those that write to the stream too) is drawn as the init draws it at
      base_width, times 1/sqrt(m): variance ∝ 1/inputs; Adam's rate is divided by m, and its weight decay multiplied by m, since
      AdamW shrinks by their product, which so stays as it is;
    - embeddings, gains and biases are drawn and updated as at base_width (what sums over the width all the same says so: `sums`);
    - the head, tied or not, reads features / m, and is drawn and updated as at base_width;
    - where the heads' number grows and not their width, scores stay as they are. Who widens the heads instead gives
      `base_head_width`: scores are divided by sqrt(head width · head width / base_head_width), which goes as 1/head width.

    The numbers that hold are rates, decays, the init's deviation and the schedule; the depth, the batch and the length of a run are
    no part of it. Raises ConfigError for a width below 1.
    """
    for name, value in (("base_width", base_width), ("base_head_width", base_head_width)):
        if value is not None and value < 1:
            raise ConfigError(f"model.parametrisation.{name}={value} must be at least 1")
    score = 1.0 if base_head_width is None else (base_head_width / head_width) ** 0.5
    return Parametrisation(base_width, width / base_width, score)


def widening(model: nn.Module, roles: Mapping[str, str], multiple: float) -> dict[str, float]:
    """Parameter path -> `multiple` where its product sums over the width: matrices, and what a module lists in `sums`; else 1."""
    summing = {f"{prefix}.{name}" for prefix, module in model.named_modules() for name in getattr(module, "sums", ())}
    return {path: multiple if role == "matrix" or path in summing else 1.0 for path, role in roles.items()}
