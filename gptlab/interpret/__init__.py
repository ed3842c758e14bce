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
    ablate                         the loss that a part's absence costs: zero, mean and resample ablation
    patch, patch_paths             activations of one prompt's run put into another's, at each position or along one path
    norms, top_texts, rows_of      sizes of activations; the texts that excite a unit or a feature most; a text as rows
    neighbours, analogy            near tokens, and `vater - mann + frau`
    position_similarity            cosines between embeddings of positions
    probe, probes                  what a linear map reads from an activation, beside a control with shuffled labels
    autoencoder, judge_autoencoder a sparse autoencoder that objective=sae has trained, and what the model keeps through it
    same_tokenizer                 the one tokeniser of several runs, or a sentence

Those that make tables return pandas' data frames, the others tensors or small dataclasses of them. What is wrong is a ConfigError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlab.interpret.ablation import ablate as ablate
    from gptlab.interpret.activations import Activations as Activations
    from gptlab.interpret.activations import capture as capture
    from gptlab.interpret.activations import run_with as run_with
    from gptlab.interpret.attention_patterns import Patterns as Patterns
    from gptlab.interpret.attention_patterns import patterns as patterns
    from gptlab.interpret.attribution import Attribution as Attribution
    from gptlab.interpret.attribution import attribute as attribute
    from gptlab.interpret.embeddings import analogy as analogy
    from gptlab.interpret.embeddings import neighbours as neighbours
    from gptlab.interpret.embeddings import position_similarity as position_similarity
    from gptlab.interpret.features import autoencoder as autoencoder
    from gptlab.interpret.features import judge_autoencoder as judge_autoencoder
    from gptlab.interpret.given import same_tokenizer as same_tokenizer
    from gptlab.interpret.heads import head_scores as head_scores
    from gptlab.interpret.heads import repeated_tokens as repeated_tokens
    from gptlab.interpret.lenses import Lens as Lens
    from gptlab.interpret.lenses import lens as lens
    from gptlab.interpret.patching import Patched as Patched
    from gptlab.interpret.patching import patch as patch
    from gptlab.interpret.patching import patch_paths as patch_paths
    from gptlab.interpret.probing import Probe as Probe
    from gptlab.interpret.probing import probe as probe
    from gptlab.interpret.probing import probes as probes
    from gptlab.interpret.sizes import norms as norms
    from gptlab.interpret.sizes import rows_of as rows_of
    from gptlab.interpret.sizes import top_texts as top_texts
    from gptlab.interpret.taps import names as names
    from gptlab.interpret.tuning import TunedLens as TunedLens
    from gptlab.interpret.tuning import tune_lens as tune_lens

_HOMES = {
    "activations": ("Activations", "capture", "run_with"),
    "ablation": ("ablate",),
    "attention_patterns": ("Patterns", "patterns"),
    "attribution": ("Attribution", "attribute"),
    "embeddings": ("analogy", "neighbours", "position_similarity"),
    "features": ("autoencoder", "judge_autoencoder"),
    "given": ("same_tokenizer",),
    "heads": ("head_scores", "repeated_tokens"),
    "lenses": ("Lens", "lens"),
    "patching": ("Patched", "patch", "patch_paths"),
    "probing": ("Probe", "probe", "probes"),
    "sizes": ("norms", "rows_of", "top_texts"),
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
