"""What each part of a model adds to a logit, exactly (direct logit attribution).

The residual stream is a sum of what the parts write to it, and the head is linear; the norms between are too, once the scale by which they
divide is held at what it was for these tokens. The contributions so add up to the logit. Of a soft-capped head they add up to the logit
before the cap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config.errors import ConfigError
from gptlab.interpret.activations import forward
from gptlab.interpret.given import Model, Tokens, model_of, token_of, tokens_of
from gptlab.interpret.taps import described, places
from gptlab.model.attention import MultiHead
from gptlab.model.block import Parallel, PostNorm, PreNorm, Sandwich
from gptlab.model.input import NormalisedInput, PlainInput
from gptlab.model.norm import LayerNorm, NoNorm, NonparametricLayerNorm, NonparametricRMSNorm, RMSNorm
from gptlab.model.stream import InputSkip, PlainStream
from gptlab.model.transformer import Transformer

if TYPE_CHECKING:
    import pandas as pd

BLOCKS = (PreNorm, Parallel, Sandwich, PostNorm)
NORMS = (LayerNorm, NonparametricLayerNorm, RMSNorm, NonparametricRMSNorm)
Parts = dict[str, Tensor]  # component -> (b, t, d) or (d,), which add up to the stream


@dataclass(frozen=True)
class Attribution:
    """Contributions to one logit (or a difference of two) at each position. c components.

    `components`: `embedding`, `position`, `blocks.0.attention.head.3`, `blocks.0.ffn`, …; what their layers' biases add stands under
    `….bias`. `logits`: what the values add up to. `note`: where that is not the model's logit itself, why.
    """

    components: list[str]
    values: Float[Tensor, "c b t"]
    logits: Float[Tensor, "b t"]
    tokens: Int[Tensor, "b t"]
    target: Int[Tensor, "b t"]
    note: str = ""

    def frame(self, row: int = 0, position: int = -1) -> pd.DataFrame:
        """One line a component at one position: component, layer (-1 for what is in no block), kind, head (-1 for none), value."""
        import pandas as pd

        lines = [(name, *_described(name), float(v)) for name, v in zip(self.components, self.values[:, row, position], strict=True)]
        return pd.DataFrame(lines, columns=["component", "layer", "kind", "head", "value"])

    def by_layer(self, row: int = 0, position: int = -1) -> pd.DataFrame:
        """The sums of a layer and kind at one position: layer, kind, value."""
        frame = self.frame(row, position)
        sums: pd.DataFrame = frame.groupby(["layer", "kind"], as_index=False, sort=False)["value"].sum()
        return sums


def attribute(
    model: Model, tokens: Tokens, target: Tensor | int | str | None = None, *, against: Tensor | int | str | None = None
) -> Attribution:
    """What each part adds to the logit of `target`: a token (id or text), one a position (b, t), or None: the likeliest at each.

    `against`: another token, for the difference of the two logits. Heads, feed-forwards, the embedding, positions, and biases apart;
    where no part can be told from another (an attention of another kind than multihead, a mixture of experts) all it writes is one.
    Raises ConfigError for a block, stream or norm from outside whose arithmetic is not known, naming it, and where the parts do not add
    up to what the model says.
    """
    inside, ids = model_of(model), tokens_of(model, tokens)
    for block in inside.blocks:
        if type(block) not in BLOCKS:  # a subclass may add its parts in another way
            raise ConfigError(f"{described(inside, 'block')}: how it adds to the stream is not known, and its parts cannot be attributed")
    wanted = ["embedding", "input", "embedded"]
    for layer, block in enumerate(inside.blocks):
        taps = ["", ".attention", ".ffn", ".residual_mid", ".attention_out_norm", ".ffn_out_norm"]
        wanted += [f"blocks.{layer}{tap}" for tap in taps if not tap or hasattr(block, tap[1:])]
        wanted += [f"blocks.{layer}.attention.z"] if type(block.attention) is MultiHead else []
    found, logits, _ = forward(inside, ids, places(inside, wanted), {})
    with torch.no_grad():
        parts = _through_blocks(inside, found, _embedded(inside, ids, found))
        last = found[f"blocks.{len(inside.blocks) - 1}"] if inside.blocks else found["embedded"]
        parts = _normed(inside, inside.norm, last, parts, "norm.bias")
        aim = logits.argmax(-1) if target is None else _aimed(model, target, ids)
        matrix = _matrix(inside)
        direction = matrix[aim] - (0 if against is None else matrix[_aimed(model, against, ids)])
        values = torch.stack([(part * direction).sum(-1) for part in parts.values()]) / inside.parametrisation.multiple
        cap = getattr(inside.head, "soft_cap", None)
        whole = (inside.norm(last) * direction).sum(-1) / inside.parametrisation.multiple
        told = logits.gather(-1, aim[..., None])[..., 0]
        told = told if against is None else told - logits.gather(-1, _aimed(model, against, ids)[..., None])[..., 0]
        if cap is None or against is None:  # of a difference the cap does not let through what it was
            _check_sum(values.float(), told.float(), cap, torch.finfo(values.dtype).eps)
    note = "" if cap is None else f"the logits are those before model.head.soft_cap={cap:g}, which is not linear"
    return Attribution(list(parts), values, whole, ids, aim, note)


def _check_sum(values: Float[Tensor, "c b t"], told: Float[Tensor, "b t"], cap: float | None, eps: float) -> None:
    """Raise ConfigError where the values do not add up to the model's own logit, within what the format of the weights rounds."""
    found = values.sum(0)
    found = found if cap is None else cap * torch.tanh(found / cap)
    gap = (found - told).abs()
    eps = eps if values.device.type == "cpu" else max(eps, 2**-10)  # a GPU may multiply in TF32
    if (gap > 1e-2 + 1e-3 * told.abs() + 4 * eps * values.abs().sum(0)).any():
        raise ConfigError(
            f"what the parts add is up to {float(gap.max()):.3g} away from the model's logit: some part (an adapter, a subclass) adds what "
            "is not known, and nothing can be attributed; of an adapted model, load() gives one with its adapters merged"
        )


def _aimed(given: Model, token: Tensor | int | str, ids: Tensor) -> Int[Tensor, "b t"]:
    model = model_of(given)
    aim = torch.as_tensor(token_of(given, token) if isinstance(token, str) else token, dtype=torch.long, device=ids.device)
    if aim.numel() and not 0 <= int(aim.min()) <= int(aim.max()) < model.vocabulary:
        raise ConfigError(f"there is no logit of token {int(aim.max())}; this model's ids go from 0 to {model.vocabulary - 1}")
    try:
        return aim.expand_as(ids)
    except RuntimeError as error:
        raise ConfigError(f"target must be one token, or one a position {tuple(ids.shape)}, not of shape {tuple(aim.shape)}") from error


def _matrix(model: Transformer) -> Float[Tensor, "v d"]:
    matrix = getattr(model.head, "matrix", None)
    if not isinstance(matrix, Tensor):
        raise ConfigError(f"{described(model, 'head')} shows no matrix, and what adds to its logits cannot be told")
    return matrix


def _embedded(model: Transformer, ids: Tensor, found: Parts) -> Parts:
    """The stream before the first block. What an input makes of more than its own token (a smear) is a part of its own."""
    embedding = found["embedding"]
    order = model.order[:, : ids.shape[1]]
    added = model.position.embed(embedding, order)
    parts = {"embedding": embedding} | ({} if added is embedding else {"position": added - embedding})
    if type(model.input) is PlainInput:
        return parts
    if type(model.input) is NormalisedInput:
        scale = _scale(added, 1e-6)
        return {name: part * scale for name, part in parts.items()}
    return parts | {"input": found["embedded"] - added}


def _through_blocks(model: Transformer, found: Parts, parts: Parts) -> Parts:
    embedded, stream = parts, found["embedded"]
    block: Any
    for layer, block in enumerate(model.blocks):
        parts = _into(model, block.stream, parts, embedded)
        stream = _came(block.stream, stream, found["embedded"])
        name = f"blocks.{layer}"
        attention, ffn = _attention(model, name, block.attention, found), _ffn(name, block.ffn, found)
        if isinstance(block, (PreNorm, Parallel)):
            parts = _sum(parts, attention, ffn)
        elif isinstance(block, Sandwich):
            attention = _normed(model, block.attention_out_norm, found[f"{name}.attention"], attention, f"{name}.attention_out_norm.bias")
            ffn = _normed(model, block.ffn_out_norm, found[f"{name}.ffn"], ffn, f"{name}.ffn_out_norm.bias")
            parts = _sum(parts, attention, ffn)
        else:
            before, middle = stream + found[f"{name}.attention"], found[f"{name}.residual_mid"]
            parts = _normed(model, block.attention_norm, before, _sum(parts, attention), f"{name}.attention_norm.bias")
            parts = _normed(model, block.ffn_norm, middle + found[f"{name}.ffn"], _sum(parts, ffn), f"{name}.ffn_norm.bias")
        stream = found[name]
    return parts


def _sum(*several: Parts) -> Parts:
    found: Parts = {}
    for parts in several:
        for name, part in parts.items():
            found[name] = found[name] + part if name in found else part
    return found


def _into(model: Transformer, stream: nn.Module, parts: Parts, embedded: Parts) -> Parts:
    if type(stream) is PlainStream:
        return parts
    if type(stream) is InputSkip:
        kept = {name: stream.keep * part for name, part in parts.items()}
        return kept if stream.skip is None else _sum(kept, {name: stream.skip * part for name, part in embedded.items()})
    raise ConfigError(f"{described(model, 'stream')}: what it makes of the stream is not known, and what comes before cannot be attributed")


def _came(stream: Any, x: Tensor, embedded: Tensor) -> Tensor:
    """What the block itself was given."""
    if type(stream) is InputSkip:
        return stream.keep * x if stream.skip is None else torch.addcmul(stream.keep * x, stream.skip, embedded)
    return x


def _attention(model: Transformer, name: str, attention: Any, found: Parts) -> Parts:
    """Each head's share of what attention writes, and its bias."""
    if type(attention) is not MultiHead:  # a subclass may write more than its heads do
        return _with_bias(f"{name}.attention", found[f"{name}.attention"], attention)
    z = found[f"{name}.attention.z"]
    z = z.view(*z.shape[:2], attention.heads, attention.head_width)
    weight = attention.out.weight.view(-1, attention.heads, attention.head_width)
    parts = {f"{name}.attention.head.{head}": z[:, :, head] @ weight[:, head].T for head in range(attention.heads)}
    return parts if attention.out.bias is None else parts | {f"{name}.attention.bias": attention.out.bias}


def _ffn(name: str, ffn: Any, found: Parts) -> Parts:
    written = found[f"{name}.ffn"]
    return _with_bias(f"{name}.ffn", written, ffn, "down" if hasattr(ffn, "hidden") else "") if written.dim() else {}


def _with_bias(name: str, written: Tensor, module: Any, last: str = "out") -> Parts:
    """What a part writes, its bias apart where its last product has one."""
    bias = getattr(getattr(module, last, None), "bias", None) if last else None
    return {name: written} if bias is None else {name: written - bias, f"{name}.bias": bias}


def _normed(model: Transformer, norm: nn.Module, x: Float[Tensor, "b t d"], parts: Parts, bias: str) -> Parts:
    """The parts of x through a norm whose scale is held at x's own; what the norm adds is a part named `bias`."""
    apply: Callable[[Tensor], Tensor]
    kind = type(norm)
    if kind in (NoNorm, nn.Identity):
        return parts
    if isinstance(norm, (LayerNorm, NonparametricLayerNorm)) and kind in NORMS:
        scale = _scale(x - x.mean(-1, keepdim=True), norm.eps)
        gain = getattr(norm, "weight", None)

        def apply(part: Tensor) -> Tensor:
            return (part - part.mean(-1, keepdim=True)) * scale * (1 if gain is None else gain)

    elif isinstance(norm, (RMSNorm, NonparametricRMSNorm)) and kind in NORMS:
        scale = _scale(x, norm.eps or 0.0)
        gain = getattr(norm, "weight", None)

        def apply(part: Tensor) -> Tensor:
            return part * scale * (1 if gain is None else gain)

    else:
        raise ConfigError(f"{described(model, 'norm')}: it cannot be held still, and what goes through it cannot be attributed")
    found = {name: apply(part) for name, part in parts.items()}
    added = getattr(norm, "bias", None)
    return found if added is None else found | {bias: added}


def _scale(x: Float[Tensor, "b t d"], eps: float) -> Float[Tensor, "b t 1"]:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _described(name: str) -> tuple[int, str, int]:
    """Layer, kind and head of a component: `blocks.2.attention.head.3` is (2, attention, 3)."""
    names = name.split(".")
    if names[0] != "blocks":
        return -1, "bias" if names[-1] == "bias" else names[0], -1
    kind = "bias" if names[-1] == "bias" else names[2]
    return int(names[1]), kind, int(names[4]) if len(names) == 5 else -1
