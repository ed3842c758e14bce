"""A callback that watches what forms inside a model while it trains: when induction heads appear, how deep the answer is found."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.data.loader import Batch
from gptlab.hardware.precision import autocast
from gptlab.interpret.heads import repeated_tokens, score_heads
from gptlab.interpret.lenses import Lens, stream_names
from gptlab.interpret.taps import hooked, places
from gptlab.model.transformer import Transformer
from gptlab.runner.diagnostics import HeldOutDiagnostic, numbers, squares
from gptlab.tracker.console import say
from gptlab.tracker.protocol import Metrics

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer

EARLY, LATE = (1 / 16, 3 / 16), (7 / 8, 1.0)  # of a row's targets: where context is little, and where it is most


@register("callback", "insight")
class Insight(HeldOutDiagnostic):
    """Induction, previous- and duplicate-token scores, attention's entropy, lens depth, in-context loss, norms of stream and weights.

    Scores are of the best head (`insight/induction`) and of each layer's best (`insight/induction/2`; `per_head`: of every head), on
    `rows` of random tokens twice over; entropy is a mean over heads, in nats. On held-out `tokens`: `insight/lens_depth`, the mean number
    of blocks after which the logit lens says what the model says, of the first `lens_tokens`; `insight/in_context_loss`, the loss of the
    last eighth of a row less that of the eighth around its first (Olsson et al., 2022), so that below 0 context helps (of a generated
    task the loss less the entropy of its answers; of chats, whose answers alone are trained, none); `insight/residual_norm/LAYER`,
    the mean length of a token's stream after a block.
    """

    def __init__(self, *, every: int = 50, tokens: int = 2048, lens_tokens: int = 256, rows: int = 4, per_head: bool = False) -> None:
        super().__init__("insight", "insight", every, tokens)
        for name, value in (("lens_tokens", lens_tokens), ("rows", rows)):
            if value < 1:
                raise ConfigError(f"callbacks.insight.{name}={value} must be at least 1")
        self.lens_tokens, self.rows, self.per_head = lens_tokens, rows, per_head

    def on_start(self, trainer: Trainer) -> None:
        super().on_start(trainer)
        model, self._why = trainer.model, ""
        try:
            self._repeated: Tensor | None = repeated_tokens(model, rows=self.rows)
            score_heads(model, self._repeated[:1, :4])  # whether there are patterns at all
        except ConfigError as error:
            self._repeated, self._why = None, str(error)
        if self._why and trainer.world.first:
            say((f"  insight: no scores of heads: {self._why}", "yellow"))

    def on_step(self, trainer: Trainer) -> None:
        if not self.due(trainer.state.step):
            return
        with self.timed(trainer):
            with autocast(trainer.device, trainer.config.hardware.precision):
                found = of_text(trainer.model, self._batch, self.lens_tokens, chat=trainer.data.chat)
            if self._repeated is not None:
                found |= of_heads(trainer.model, self._repeated, per_head=self.per_head)
            told = {f"insight/{name}": value for name, value in (numbers(found) | _weight_norms(trainer)).items()}
        self.write(trainer, told)


def of_heads(model: Transformer, repeated: Int[Tensor, "b t"], *, per_head: bool = False) -> dict[str, Tensor]:
    """Each score of the best head, and of each layer's; entropies are means. In the weights' own format: no pattern is rounded."""
    found: dict[str, Tensor] = {}
    for name, by_layer in score_heads(model, repeated).items():
        of, mean = {layer: heads.float() for layer, heads in by_layer.items()}, name == "entropy"
        every = torch.cat(list(of.values()))
        found[name] = every.mean() if mean else every.amax()
        for layer, heads in of.items():
            found[f"{name}/{layer}"] = heads.mean() if mean else heads.amax()
            found |= {f"{name}/{layer}/head_{head}": score for head, score in enumerate(heads) if per_head}
    return found


def of_text(model: Transformer, batch: Batch, lens_tokens: int, *, chat: bool = False) -> dict[str, Tensor]:
    """Lens depth, in-context loss (not of chats) and the stream's norms on a batch of held-out text."""
    names, streams, found = stream_names(model), dict[str, Tensor](), dict[str, Tensor]()

    def reduce(features: Tensor, within: Transformer) -> Tensor:
        """Within the forward, since a sharded model has its last norm and head whole there alone."""
        rows, length = max(1, min(len(batch.inputs), lens_tokens // batch.inputs.shape[1])), min(lens_tokens, batch.inputs.shape[1])
        read = torch.stack([streams[name][:rows, :length].to(features) for name in names])
        found["lens_depth"] = Lens(within, batch.inputs[:rows, :length], names, read).depth().float().mean()
        return losses(within, features, batch.targets)

    with hooked(model, places(model, names), streams, {}):
        nats = model(batch.inputs, document=batch.document, reduce=reduce)
    if not chat:
        found["in_context_loss"] = in_context(nats, batch)
    for layer, name in enumerate(names[1:]):
        found[f"residual_norm/{layer}"] = streams[name].float().norm(dim=-1).mean()
    return found


def _parts(length: int) -> list[slice]:
    """The places of a row's early and late targets; of a short row at least one each."""
    found = []
    for begin, end in (EARLY, LATE):
        first = min(int(begin * length), length - 1)
        found.append(slice(first, max(first + 1, int(end * length))))
    return found


def in_context(nats: Float[Tensor, "b t"], batch: Batch) -> Float[Tensor, ""]:
    """Late less early loss. Of a generated task, whose early targets nobody trains, the loss of what is scored less the entropy of these
    answers: what would be left to one who knows how frequent each is, and nothing of the row."""
    if batch.weight is None:
        early, late = (nats[:, part].mean() for part in _parts(nats.shape[1]))
        return late - early
    scored = batch.weight > 0
    shares = batch.targets[scored].bincount().float() / scored.sum()
    entropy: Tensor = torch.special.entr(shares).sum()
    return nats[scored].mean() - entropy


def losses(model: Transformer, features: Float[Tensor, "b t d"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """The loss of every target in nats, a row's logits at a time."""
    rows = [F.cross_entropy(model.logits(row).float(), aim, reduction="none") for row, aim in zip(features, targets, strict=True)]
    return torch.stack(rows)


def _weight_norms(trainer: Trainer) -> Metrics:
    """The norm of all weights, and of each block's."""
    mine = squares(list(trainer.model.parameters()), trainer.world.first)
    sums = {"": math.fsum(mine)} | {f"/{layer}": 0.0 for layer in range(len(trainer.model.blocks))}
    for (path, _), value in zip(trainer.model.named_parameters(), mine, strict=True):
        block = re.match(r"blocks\.(\d+)\.", path)
        if block:
            sums[f"/{block[1]}"] += value
    every_rank = trainer.world.gather(*sums.values())
    return {f"weight_norm{label}": math.sqrt(sum(parts)) for label, parts in zip(sums, zip(*every_rank, strict=True), strict=True)}
