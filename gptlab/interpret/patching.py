"""Where two prompts part: activations of one run put into the other, at each position, or along one path alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.interpret.activations import forward
from gptlab.interpret.given import Model, Tokens, model_of, token_of, tokens_of
from gptlab.interpret.heatmap import heat_map
from gptlab.interpret.lenses import stream_names
from gptlab.interpret.taps import Edit, Place, places, tapped
from gptlab.model.transformer import Transformer
from gptlab.runner.load import Loaded

if TYPE_CHECKING:
    import pandas as pd

Metric: TypeAlias = Callable[[Tensor], Tensor]
LOGITS = "logits"
MOST = 1 << 25  # logits held at once


@dataclass(frozen=True)
class Patched:
    """What a measure of the target run became with parts of the source run in it: a matrix, for a heat map. r rows, c columns.

    `of_source`, `of_target`: the measure of the two runs as they are. `measure` says in words what it is.
    """

    values: Float[Tensor, "r c"]
    rows: list[str]
    columns: list[str]
    of_source: float
    of_target: float
    measure: str

    @property
    def recovered(self) -> Float[Tensor, "r c"]:
        """0 where the target run stayed as it was, 1 where it came to say what the source run says. Raises ConfigError where both say the
        same."""
        if self.of_source == self.of_target:
            raise ConfigError(f"{self.measure} is {self.of_source:.4g} in both runs, so that nothing can be recovered: take other prompts")
        return (self.values - self.of_target) / (self.of_source - self.of_target)

    def frame(self) -> pd.DataFrame:
        """`recovered`, with its rows and columns named."""
        import pandas as pd

        return pd.DataFrame(self.recovered.numpy(), index=self.rows, columns=self.columns)

    def draw(self, file: str | Path, *, labels: Sequence[str] | None = None) -> Path:
        """`recovered` as a heat map, a .png, .svg or .pdf. `labels`: of the columns, as the prompt's tokens. Raises ConfigError."""
        columns = self.columns if labels is None else list(labels)
        if len(columns) != len(self.columns):
            raise ConfigError(f"there are {len(columns)} labels for {len(self.columns)} columns")
        return heat_map(self.recovered, self.rows, columns, file, title=self.measure)


def patch(
    model: Model,
    source: Tokens,
    target: Tokens,
    names: str | Iterable[str] | None = None,
    *,
    positions: bool = True,
    answer: int | str | None = None,
    against: int | str | None = None,
    metric: Metric | None = None,
) -> Patched:
    """Activation patching (Meng et al., 2022): a run on `target`, each activation in turn replaced by that of the run on `source`.

    Rows: what `names` mean (the stream before each block and behind the last, unless given). Columns: the positions, one replaced at
    a time, or `all` of them at once where `positions` is false. The measure is the logit of `answer` less that of `against` (ids or
    texts) at the last position, unless given the likeliest tokens of the two runs; or `metric` of the logits (b, t, v).
    Raises ConfigError for prompts of different length or the same guess, a name that means nothing, or one without positions.
    """
    inside, (ids, others) = model_of(model), _both(model, source, target)
    taken = tapped(inside, stream_names(inside) if names is None else names)
    found, logits, _ = forward(inside, ids, list(taken), {})
    plain = forward(inside, others, [], {})[1]
    measured, words = _measure(model, logits, plain, answer, against, metric)
    if positions:
        values = [_by_position(inside, others, place, axes, found[place.name], measured) for place, axes in taken.items()]
    else:
        values = [[float(measured(forward(inside, others, [], {place: found[place.name]})[1]))] for place in taken]
    columns = [str(position) for position in range(ids.shape[1])] if positions else ["all"]
    return Patched(torch.tensor(values), [p.name for p in taken], columns, float(measured(logits)), float(measured(plain)), words)


def patch_paths(
    model: Model,
    source: Tokens,
    target: Tokens,
    senders: str | Iterable[str],
    receivers: str | Iterable[str] = LOGITS,
    *,
    answer: int | str | None = None,
    against: int | str | None = None,
    metric: Metric | None = None,
) -> Patched:
    """Path patching (Wang et al., 2022; Goldowsky-Dill et al., 2023): what the source run changes on the direct way from part to part.

    From a sender (a row) to a receiver (a column), which is another activation, or the `logits`.

    The sender's activation is the source run's, every other attention and feed-forward writes what it writes in the target run, and the
    receiver alone is computed anew; then the target run goes on with it. Measure and errors as of `patch`.
    """
    inside, (ids, others) = model_of(model), _both(model, source, target)
    sending = list(tapped(inside, senders))
    names = [receivers] if isinstance(receivers, str) else list(receivers)
    heard_by = tapped(inside, [name for name in names if name != LOGITS])
    receiving = [p for name in names for p in ([None] if name == LOGITS else places(inside, name)) if p is None or p in heard_by]
    parts = [Place(name, name) for i in range(len(inside.blocks)) for name in (f"blocks.{i}.attention", f"blocks.{i}.ffn")]
    found, logits, _ = forward(inside, ids, sending, {})
    held, plain, _ = forward(inside, others, parts, {})
    measured, words = _measure(model, logits, plain, answer, against, metric)
    values = []
    for sender in sending:
        line = []
        for receiver in receiving:
            frozen = {p: held[p.name] for p in parts if not any(_within(one, p) for one in (sender, receiver))}
            edits: dict[Place, Edit] = {**frozen, sender: found[sender.name]}
            heard, direct, _ = forward(inside, others, [receiver] if receiver else [], edits)
            then = direct if receiver is None else forward(inside, others, [], {receiver: heard[receiver.name]})[1]
            line.append(float(measured(then)))
        values.append(line)
    columns = [LOGITS if place is None else place.name for place in receiving]
    return Patched(torch.tensor(values), [p.name for p in sending], columns, float(measured(logits)), float(measured(plain)), words)


def _within(place: Place | None, part: Place) -> bool:
    return place is not None and (place.module == part.module or place.module.startswith(f"{part.module}."))


def _both(model: Model, source: Tokens, target: Tokens) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    ids, others = tokens_of(model, source, "the source prompt"), tokens_of(model, target, "the target prompt")
    if ids.shape != others.shape:
        lengths = [f"{len(x)} x {x.shape[1]}" if len(ids) != len(others) else str(x.shape[1]) for x in (ids, others)]
        raise ConfigError(
            f"the source prompt has {lengths[0]} tokens and the target prompt {lengths[1]}: patching puts one in the other's place, "
            "position by position, and needs as many of both"
        )
    return ids, others


def _measure(
    model: Model,
    source: Float[Tensor, "b t v"],
    target: Float[Tensor, "b t v"],
    answer: int | str | None,
    against: int | str | None,
    metric: Metric | None,
) -> tuple[Metric, str]:
    if metric is not None:
        return metric, getattr(metric, "__name__", "the metric given")

    def at_end(logits: Float[Tensor, "b t v"], token: int | str | None) -> Int[Tensor, " b"]:
        return logits[:, -1].argmax(-1) if token is None else torch.full((len(logits),), token_of(model, token), device=logits.device)

    good, bad = at_end(source, answer), at_end(target, against)
    if (good == bad).any():
        raise ConfigError(
            f"both prompts have the same answer, token {int(good[good == bad][0])}, and there is no difference to follow: give answer and "
            "against, two tokens, or a metric"
        )

    def difference(logits: Float[Tensor, "b t v"]) -> Tensor:
        last = logits[:, -1]
        return (last.gather(-1, good[:, None]) - last.gather(-1, bad[:, None])).mean()

    pair = f"{_told(model, good)} less that of {_told(model, bad)}" if len(good) == 1 else "each row's answer less that of the other run's"
    return difference, f"the last position's logit of {pair}"


def _told(model: Model, token: Int[Tensor, " b"]) -> str:
    return repr(model.tokenizer.decode([int(token[0])])) if isinstance(model, Loaded) else f"token {int(token[0])}"


def _by_position(
    model: Transformer, target: Int[Tensor, "b t"], place: Place, axes: tuple[int, ...], value: Tensor, measured: Metric
) -> list[float]:
    """The measure with the source run's value at each position alone: runs side by side, each with another position replaced.

    `axes`: those of its tokens; of a pattern's two the first is that of the queries.
    """
    if not axes or axes[0] == 0:
        raise ConfigError(f"{place.name} has no positions (its shape is {tuple(value.shape)}); patch it with positions=False")
    axis = axes[0]
    b, t = target.shape
    measures: list[float] = []
    for positions in torch.split(torch.arange(t), max(1, MOST // (target.numel() * model.vocabulary))):

        def put(x: Tensor, positions: Tensor = positions) -> Tensor:
            changed = x.clone()
            for row, position in enumerate(positions.tolist()):
                changed[row * b : (row + 1) * b].select(axis, position).copy_(value.select(axis, position))
            return changed

        logits = forward(model, target.repeat(len(positions), 1), [], {place: put})[1]
        measures += [float(measured(one)) for one in torch.split(logits, b)]
    return measures
