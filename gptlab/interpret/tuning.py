"""The tuned lens: an affine map for each layer, trained to tell from the stream there what the whole model will say."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.interpret.activations import forward
from gptlab.interpret.fitting import fit
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.interpret.lenses import stream_names
from gptlab.interpret.taps import places
from gptlab.model.transformer import Transformer

ROWS = 8  # of the tokens given, in each step


class TunedLens(nn.Module):
    """x + x · Aᵀ + b, with A and b of each place's own, from zero; the last place is left as it is (Belrose et al., 2023)."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.places, self.width = places, width
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(places - 1))
        for one in self.maps.parameters():
            nn.init.zeros_(one)

    def forward(self, x: Float[Tensor, "... d"], place: int) -> Float[Tensor, "... d"]:
        """The stream at a place (0: the embedding), in the last one's terms."""
        if place == self.places - 1:
            return x
        wide = x.to(next(self.maps.parameters()).dtype)  # a model of half precision has its maps in fp32
        out: Tensor = wide + self.maps[place](wide)
        return out.to(x.dtype)


def tune_lens(
    model: Model,
    tokens: Tokens,
    *,
    steps: int = 200,
    learning_rate: float = 1e-3,
    seed: int = 0,
    document: Int[Tensor, "b t"] | None = None,
) -> TunedLens:
    """A tuned lens trained on rows of tokens, some of them a step: the sum over layers of KL(model ‖ lens), a mean over tokens.

    `document`: that of each token, where several share a row and the model keeps them apart.

    Judge it on other text than it was trained on. Raises ConfigError for a model without blocks, which has nothing to tune.
    """
    inside, ids = model_of(model), tokens_of(model, tokens, "the text to tune on")
    names = stream_names(inside)
    if len(names) < 2:
        raise ConfigError("this model has no blocks (model.depth=0): its embedding is its end, and there is no lens to tune")
    tuned = TunedLens(len(names), inside.config.width).to(inside.embedding.weight.device)
    draw = torch.Generator().manual_seed(seed)
    wanted = places(inside, names)

    def loss(step: int) -> Tensor:
        rows = torch.randperm(len(ids), generator=draw)[:ROWS].to(ids.device)
        within = None if document is None else document.to(ids.device)[rows]
        found, logits, _ = forward(inside, ids[rows], wanted, {}, within)
        return _distance(inside, tuned, [found[name] for name in names[:-1]], logits.float().log_softmax(-1))

    frozen = [p for p in inside.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        fit(tuned, loss, steps=steps, learning_rate=learning_rate)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return tuned.requires_grad_(False)


def _distance(
    model: Transformer, tuned: TunedLens, streams: list[Float[Tensor, "b t d"]], final: Float[Tensor, "b t v"]
) -> Float[Tensor, ""]:
    told = (model.logits(model.norm(tuned(stream, place))).float().log_softmax(-1) for place, stream in enumerate(streams))
    return torch.stack([(final.exp() * (final - one)).sum(-1).mean() for one in told]).sum()
