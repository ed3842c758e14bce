"""Look inside a model: what each part of it holds, where attention looks, what each part adds to a logit, and what it is needed for.

    from gptlab import load
    from gptlab.interpret import ablate, attribute, capture, lens, patch
    run = load("latest")
    capture(run, "the king", names="blocks.*.attention.pattern")

Everything runs through the same Transformer as training, by forward hooks on its modules: nothing is copied, and a model that nobody
looks into has none. The model is a `Transformer`, or what `load` gives; tokens are ids (t,) or (b, t), or, with the latter, a text.

    names, capture, run_with       every activation by its name (a glob takes many), and runs with some of them changed
    patterns                       where each head looks, whatever the kernel
    lens, tune_lens                what the stream would predict after each layer: logit lens, and tuned lens
    attribute                      what each head and feed-forward adds to a logit, exactly
    head_scores, repeated_tokens   induction, previous-token and duplicate-token scores, and attention's entropy
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlab.interpret.activations import Activations as Activations
    from gptlab.interpret.activations import capture as capture
    from gptlab.interpret.activations import run_with as run_with
    from gptlab.interpret.attention_patterns import Patterns as Patterns
    from gptlab.interpret.attention_patterns import patterns as patterns
    from gptlab.interpret.attribution import Attribution as Attribution
    from gptlab.interpret.attribution import attribute as attribute
    from gptlab.interpret.given import same_tokenizer as same_tokenizer
    from gptlab.interpret.heads import head_scores as head_scores
    from gptlab.interpret.heads import repeated_tokens as repeated_tokens
    from gptlab.interpret.lenses import Lens as Lens
    from gptlab.interpret.lenses import lens as lens
    from gptlab.interpret.taps import names as names
    from gptlab.interpret.tuning import TunedLens as TunedLens
    from gptlab.interpret.tuning import tune_lens as tune_lens

_HOMES = {
    "activations": ("Activations", "capture", "run_with"),
    "attribution": ("Attribution", "attribute"),
    "heads": ("head_scores", "repeated_tokens"),
    "lenses": ("Lens", "lens"),
    "attention_patterns": ("Patterns", "patterns"),
    "given": ("same_tokenizer",),
    "taps": ("names",),
    "tuning": ("TunedLens", "tune_lens"),
}
_HOME = {name: home for home, listed in _HOMES.items() for name in listed}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Imported when first used: a callback of this package must not cost a training the import of data frames.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"gptlab.interpret.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gptlab.interpret' has no attribute {name!r}")
