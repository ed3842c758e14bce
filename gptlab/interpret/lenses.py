"""What the residual stream would predict after each layer, read by the model's own last norm and head.

The logit lens (nostalgebraist, 2020) reads it as it is; the tuned lens (Belrose et al., 2023) first through an affine map of the layer's
own, trained to tell what the whole model will say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.interpret.activations import forward
from gptlab.interpret.given import Model, Tokens, model_of, tokens_of
from gptlab.interpret.taps import places
from gptlab.model.transformer import Transformer

if TYPE_CHECKING:
    import pandas as pd

    from gptlab.interpret.tuning import TunedLens


@dataclass(frozen=True)
class Lens:
    """The stream at every depth, and what it would predict. l depth + 1 places: the embedding, and after each block.

    `names`: of the places; the last one's logits are the model's. `streams` are as the model has them, without norm.
    """

    model: Transformer
    tokens: Int[Tensor, "b t"]
    names: list[str]
    streams: Float[Tensor, "l b t d"]
    tuned: TunedLens | None = None

    @torch.no_grad()
    def features(self, place: int) -> Float[Tensor, "b t d"]:
        """What the head reads at a place: the stream after the model's last norm."""
        stream = self.streams[place]
        if self.tuned is not None:
            stream = self.tuned(stream, range(len(self.names))[place])
        out: Tensor = self.model.norm(stream)
        return out

    @torch.no_grad()
    def logits(self, place: int) -> Float[Tensor, "b t v"]:
        """What would be predicted at a place (counted from 0, the embedding; -1 is the model's end)."""
        return self.model.logits(self.features(place))

    def guesses(self) -> Int[Tensor, "l b t"]:
        """The likeliest token at each place."""
        return torch.stack([self.logits(place).argmax(-1) for place in range(len(self.names))])

    def depth(self) -> Int[Tensor, "b t"]:
        """The place from which on the guess is the model's own: 0 where the embedding knows it, the depth where the last block says it."""
        guesses = self.guesses()
        settled = (guesses == guesses[-1]).flip(0).cummin(0).values.flip(0)  # right here and ever after
        return len(self.names) - settled.sum(0)

    def table(self) -> pd.DataFrame:
        """One line a place, means over the tokens: loss (of the next token), agreement with the model's guess, kl (from the model's
        distribution to this one's) and entropy, in nats."""
        import pandas as pd

        lines = []
        final = self.logits(-1).float().log_softmax(-1)
        for place, name in enumerate(self.names):
            told = self.logits(place).float().log_softmax(-1)
            nats = -told[:, :-1].gather(-1, self.tokens[:, 1:, None]) if self.tokens.shape[1] > 1 else torch.full((1,), torch.nan)
            same = (told.argmax(-1) == final.argmax(-1)).float()
            kl, entropy = (final.exp() * (final - told)).sum(-1), -(told.exp() * told).sum(-1)
            lines.append([name, *(float(x.mean()) for x in (nats, same, kl, entropy))])
        return pd.DataFrame(lines, columns=["place", "loss", "agreement", "kl", "entropy"])

    def frame(self, row: int = 0, top: int = 1) -> pd.DataFrame:
        """One line a place, token and guess of a row: place, position, rank, guess (an id), probability, and that of the next token."""
        import pandas as pd

        parts = []
        for name, logits in ((name, self.logits(place)[row].float()) for place, name in enumerate(self.names)):
            told = logits.softmax(-1)
            likely, guess = (x.cpu() for x in told.topk(min(top, told.shape[-1]), -1))
            t, k = guess.shape
            following = torch.full((t,), torch.nan)
            following[:-1] = told[:-1].gather(-1, self.tokens[row, 1:, None])[:, 0].cpu()
            columns = {
                "place": name,
                "position": torch.arange(t).repeat_interleave(k).numpy(),
                "rank": torch.arange(k).repeat(t).numpy(),
                "guess": guess.flatten().numpy(),
                "probability": likely.flatten().numpy(),
                "of_next": following.repeat_interleave(k).numpy(),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)


def lens(model: Model, tokens: Tokens, *, tuned: TunedLens | None = None, document: Int[Tensor, "b t"] | None = None) -> Lens:
    """The logit lens over tokens; with `tuned` (of `tune_lens`) the tuned one. A model without blocks has one place, its embedding.

    Raises ConfigError for tokens that the model cannot take, or a tuned lens of a model of another shape.
    """
    inside, ids = model_of(model), tokens_of(model, tokens)
    names = stream_names(inside)
    if tuned is not None and (tuned.places, tuned.width) != (len(names), inside.config.width):
        here = f"{len(names) - 1} layers of width {inside.config.width}"
        raise ConfigError(f"this tuned lens is of {tuned.places - 1} layers of width {tuned.width}, the model has {here}: tune one for it")
    found, _, _ = forward(inside, ids, places(inside, names), {}, document)
    return Lens(inside, ids, names, torch.stack([found[name] for name in names]), tuned)


def stream_names(model: Transformer) -> list[str]:
    """The places of the residual stream: before the first block, and after each."""
    return ["embedded", *(f"blocks.{layer}" for layer in range(len(model.blocks)))]
