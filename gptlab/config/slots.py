"""The slots: every place of the config that takes one of several components.

Each slot has a base dataclass (its components' option classes derive from it, so that Hydra can type-check the place) and the
names of the wiring that its builder supplies as positional arguments.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Options:
    """Base of every component's options."""


@dataclass(slots=True, kw_only=True)
class Norm(Options):
    """Normalisation of the residual stream."""


@dataclass(slots=True, kw_only=True)
class Position(Options):
    """How the model learns where a token stands."""


@dataclass(slots=True, kw_only=True)
class Attention(Options):
    """How a token gathers from the tokens before it."""


@dataclass(slots=True, kw_only=True)
class Kernel(Options):
    """The implementation of softmax(q·k)·v."""


@dataclass(slots=True, kw_only=True)
class FeedForward(Options):
    """The per-token part of a block."""


@dataclass(slots=True, kw_only=True)
class Block(Options):
    """How norm, attention and feed-forward are joined to the residual stream."""


@dataclass(slots=True, kw_only=True)
class Input(Options):
    """What is made of the token embeddings before the first block."""


@dataclass(slots=True, kw_only=True)
class Stream(Options):
    """What becomes of the residual stream on its way into a block."""


@dataclass(slots=True, kw_only=True)
class Value(Options):
    """What is added to attention's values beside what comes from the stream."""


@dataclass(slots=True, kw_only=True)
class Gate(Options):
    """How much of each attention head is let through."""


@dataclass(slots=True, kw_only=True)
class Head(Options):
    """From the last features to logits."""


@dataclass(slots=True, kw_only=True)
class Init(Options):
    """The distribution each parameter is drawn from."""


@dataclass(slots=True, kw_only=True)
class Parametrisation(Options):
    """What a width changes beside the shapes: the size of fresh weights, of logits and of updates."""


@dataclass(slots=True, kw_only=True)
class Corpus(Options):
    """Where the text comes from."""


@dataclass(slots=True, kw_only=True)
class Tokenizer(Options):
    """From text to token ids and back."""


@dataclass(slots=True, kw_only=True)
class Strategy(Options):
    """How the work is spread over devices."""


@dataclass(slots=True, kw_only=True)
class Checkpointing(Options):
    """What of a block's activations is computed again for the backward pass, to hold less."""


@dataclass(slots=True, kw_only=True)
class Optimizer(Options):
    """The update rule."""


@dataclass(slots=True, kw_only=True)
class Schedule(Options):
    """The learning rate over the run, as a factor of `learning_rate`."""


@dataclass(slots=True, kw_only=True)
class Objective(Options):
    """What is minimised."""


@dataclass(slots=True, kw_only=True)
class Reward(Options):
    """What a completion is worth: `reward(sample) -> float`, one of those of objective=grpo."""


@dataclass(slots=True, kw_only=True)
class Tracker(Options):
    """Where metrics go beside `metrics.jsonl`."""


@dataclass(slots=True, kw_only=True)
class Callback(Options):
    """What happens around the training steps."""


@dataclass(frozen=True)
class Slot:
    """One place of the config: its Hydra group, the base of its options, and what its builder supplies.

    `absent`: the component that does nothing there. It is taken where a config (an older one, a user's recipe) does not name the
    slot, and left out of identities, so that a slot added later changes no old run.
    """

    path: str
    base: type[Options]
    wiring: tuple[str, ...]
    absent: str = ""

    @property
    def summary(self) -> str:
        return (self.base.__doc__ or "").strip()


_HEADS = ("width", "heads", "head_width")
SLOTS: dict[str, Slot] = {
    slot.path: slot
    for slot in (
        Slot("model/norm", Norm, ("width", "bias")),
        Slot("model/position", Position, (*_HEADS, "context_length")),
        Slot("model/attention", Attention, (*_HEADS, "kernel", "value", "gate", "bias", "dropout", "layer", "depth", "scale")),
        Slot("model/kernel", Kernel, ()),
        Slot("model/ffn", FeedForward, ("width", "bias", "dropout", "layer", "depth")),
        Slot("model/block", Block, ("norm", "attention", "ffn", "layer", "depth")),
        Slot("model/input", Input, ("width",), absent="plain"),
        Slot("model/stream", Stream, ("width", "layer", "depth"), absent="plain"),
        Slot("model/value", Value, ("kv_heads", "head_width", "vocabulary", "layer", "depth"), absent="none"),
        Slot("model/gate", Gate, ("width", "heads"), absent="none"),
        Slot("model/head", Head, ("width", "vocabulary", "embedding")),
        Slot("model/init", Init, ("width", "depth")),
        Slot("model/parametrisation", Parametrisation, ("width", "head_width"), absent="standard"),
        Slot("data/corpus", Corpus, ()),
        Slot("data/tokenizer", Tokenizer, ()),
        Slot("hardware/strategy", Strategy, ()),
        Slot("hardware/checkpointing", Checkpointing, (), absent="none"),
        Slot("optimizer", Optimizer, ("groups", "device")),
        Slot("schedule", Schedule, ("batch_tokens", "steps", "start")),
        Slot("objective", Objective, ()),
        Slot("objective/reward", Reward, ()),
        Slot("tracker", Tracker, ()),
        Slot("callback", Callback, ()),
    )
}


def word(key: str, value: str) -> str:
    """A component or recipe speaks for itself (`rmsnorm`); a value needs its key (`learning_rate=0.01`)."""
    return value if key in SLOTS or key in ("model", "data", "hardware", "experiment", "name") else f"{key.rpartition('.')[2]}={value}"
