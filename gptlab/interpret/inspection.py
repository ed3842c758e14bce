"""What an inspection page shows of a model on one text, as tensors: computed once, by the same calls that a notebook makes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.interpret.activations import capture
from gptlab.interpret.attention_patterns import Patterns, patterns
from gptlab.interpret.attribution import Attribution, attribute
from gptlab.interpret.embeddings import position_similarity
from gptlab.interpret.given import model_of, tokens_of
from gptlab.interpret.heads import repeated_tokens, score_heads
from gptlab.interpret.lenses import Lens, lens
from gptlab.interpret.tuning import TunedLens
from gptlab.model.experts import MixtureOfExperts
from gptlab.model.position import Position
from gptlab.model.transformer import Transformer
from gptlab.runner.load import Loaded

MOST_TOKENS = 512  # of a page: a pattern has the square of them
GUESSES = 8  # shown for each place
MOST_POSITIONS = 128  # whose similarity is shown; of more every second, third, …
DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class LensTable:
    """Of one lens, at each of l places of the stream and t tokens: the likeliest token, its probability, and that of the next."""

    guess: Int[Tensor, "l t"]
    probability: Float[Tensor, "l t"]
    of_next: Float[Tensor, "l t"]  # the last column, where nothing follows, is 0


@dataclass(frozen=True)
class Positions:
    """What a position scheme adds. `similarity`: cosines of what is added to the embedding at every `step`-th position; `bias`: what is
    added to the score of a key so far back, a row a head. Both None where it does neither, and `note` says what it does."""

    note: str
    similarity: Float[Tensor, "n n"] | None = None
    step: int = 1
    bias: Float[Tensor, "h d"] | None = None
    distances: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """One text in one model. t tokens, k guesses, l depth + 1 places of the stream."""

    tokens: Int[Tensor, " t"]
    loss: Float[Tensor, " t-1"]
    guess: Int[Tensor, "t k"]
    probability: Float[Tensor, "t k"]
    places: list[str]
    lenses: dict[str, LensTable]
    depth: float  # mean over the tokens of the place from which the logit lens says what the model says
    patterns: Patterns | None  # None: `notes["attention"]` says why
    scores: dict[str, dict[int, Float[Tensor, " h"]]]
    attribution: Attribution | None
    norms: dict[str, dict[int, Float[Tensor, " t"]]]  # of what: by layer (of the stream by place) the length of each token's vector
    positions: Positions
    notes: dict[str, str] = field(default_factory=dict)


def inspect(loaded: Loaded, tokens: list[int] | str, *, tuned: TunedLens | None = None) -> Inspection:
    """Everything about one text. Raises ConfigError for a text of fewer than 2 tokens, longer than the context or than MOST_TOKENS."""
    model, ids = model_of(loaded), tokens_of(loaded, tokens)
    count = ids.shape[1]
    if count < 2:
        raise ConfigError("the prompt is one token; a page needs at least two, since the second is what the first should predict")
    if count > MOST_TOKENS:
        raise ConfigError(
            f"the prompt has {count:,} tokens; a page holds at most {MOST_TOKENS}, since each head's pattern has their square"
        )
    notes: dict[str, str] = {"units": _units_note(model)}
    looked = {"logit lens": lens(loaded, ids)}
    if tuned is not None:
        looked["tuned lens"] = lens(loaded, ids, tuned=tuned)
    logits = looked["logit lens"].logits(-1)[0].float()
    told = logits.log_softmax(-1)
    following = ids[0, 1:]
    probability, guess = told.exp().topk(min(GUESSES, told.shape[-1]), -1)
    found, scores = _attention(loaded, ids, notes)
    return Inspection(
        tokens=ids[0],
        loss=-told[:-1].gather(-1, following[:, None])[:, 0],
        guess=guess,
        probability=probability,
        places=looked["logit lens"].names,
        lenses={name: _table(one, following) for name, one in looked.items()},
        depth=float(looked["logit lens"].depth().float().mean()),
        patterns=found,
        scores=scores,
        attribution=_attribution(loaded, ids, logits, notes),
        norms=_norms(loaded, ids, looked["logit lens"]),
        positions=positions(model),
        notes=notes,
    )


def _units_note(model: Transformer) -> str:
    """What is not shown of the units, and ''."""
    if any(isinstance(block.ffn, MixtureOfExperts) for block in model.blocks):
        return "The units of a mixture's experts are not shown."
    return "" if any(hasattr(block.ffn, "hidden") for block in model.blocks) else "This model has no hidden units."


def _table(one: Lens, following: Int[Tensor, " t-1"]) -> LensTable:
    rows = []
    for place in range(len(one.names)):
        told = one.logits(place)[0].float().softmax(-1)
        likely, guess = told.max(-1)
        of_next = torch.zeros_like(likely)
        of_next[:-1] = told[:-1].gather(-1, following[:, None])[:, 0]
        rows.append((guess, likely, of_next))
    return LensTable(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _attention(loaded: Loaded, ids: Tensor, notes: dict[str, str]) -> tuple[Patterns | None, dict[str, dict[int, Tensor]]]:
    """The patterns and each head's scores; where the model has none, or no room for tokens that repeat, the note says why."""
    try:
        found = patterns(loaded, ids)
    except ConfigError as error:
        notes["attention"] = str(error)
        return None, {}
    notes["attention"] = found.note
    try:
        repeated = repeated_tokens(loaded)
    except ConfigError as error:
        notes["scores"] = str(error)
        return found, {}
    notes["scores"] = f"{repeated.shape[0]} rows of {repeated.shape[1] // 2} random tokens, each twice in a row"
    return found, score_heads(model_of(loaded), repeated)


def _attribution(loaded: Loaded, ids: Tensor, logits: Tensor, notes: dict[str, str]) -> Attribution | None:
    """Of the token that follows; at the end, where nothing does, of the likeliest."""
    target = torch.cat((ids[0, 1:], logits[-1:].argmax(-1)))[None]
    try:
        found = attribute(loaded, ids, target)
    except ConfigError as error:
        notes["attribution"] = str(error)
        return None
    notes["attribution"] = found.note
    return found


def _norms(loaded: Loaded, ids: Tensor, read: Lens) -> dict[str, dict[int, Tensor]]:
    """Lengths of the stream at each place, of what attention and feed-forward write to it, and of the hidden units."""
    found: dict[str, dict[int, Tensor]] = {"residual stream": dict(enumerate(read.streams[:, 0].float().norm(dim=-1)))}
    model = model_of(loaded)
    wanted: dict[str, dict[int, str]] = {"attention's output": {}, "feed-forward's output": {}, "hidden units": {}}
    for layer, block in enumerate(model.blocks):
        for what, part in (("attention's output", "attention"), ("feed-forward's output", "ffn")):
            normed = hasattr(block, f"{part}_out_norm")  # what a sandwich block adds to the stream
            wanted[what][layer] = f"blocks.{layer}.{part}_out_norm" if normed else f"blocks.{layer}.{part}"
        if hasattr(block.ffn, "hidden"):
            wanted["hidden units"][layer] = f"blocks.{layer}.ffn.hidden"
    names = [name for by_layer in wanted.values() for name in by_layer.values()]
    held = capture(loaded, ids, names) if names else {}
    for what, by_layer in wanted.items():
        lengths = {layer: held[name][0].float().norm(dim=-1) for layer, name in by_layer.items() if held[name].dim() == 3}
        if lengths:  # a block without a feed-forward writes nothing
            found[what] = lengths
    return found


@torch.no_grad()
def positions(model: Transformer) -> Positions:
    """What the position scheme adds to the embedding, or to the scores."""
    name, scheme = component_of(model.config.position).name, model.position
    length, device = model.config.context_length, model.embedding.weight.device
    if type(scheme).embed is not Position.embed:
        step = -(-length // MOST_POSITIONS)
        note = f"model/position={name} adds a vector to each token's embedding: the cosine of every two of them."
        return Positions(note, position_similarity(model)[::step, ::step], step)
    if scheme.bias is not None:
        distances = tuple(d for d in DISTANCES if d < length)
        heads = torch.arange(model.config.heads, device=device)[:, None]
        back = torch.tensor(distances, device=device)[None]
        note = f"model/position={name} adds to the scores: what a key so many tokens back gets, a row a head."
        return Positions(note, bias=scheme.bias(heads, back, torch.zeros_like(back)).float(), distances=distances)
    does = "adds nothing" if type(scheme).rotate is Position.rotate else "turns queries and keys by their places"
    return Positions(f"model/position={name} {does}: there are no position embeddings to compare.")
