"""What a component of the model promises. It is put into a tiny model, and the model is checked.

The weights are stirred first, since fresh ones (zero outputs, scores near zero) would hide most faults; what compares numbers
does so in float64.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, component
from gptlab.config.schema import ModelConfig
from gptlab.config.slots import Options
from gptlab.model.init import Spec, initialise
from gptlab.model.transformer import Transformer, new_model

WIDTH, DEPTH, HEADS, CONTEXT, VOCABULARY = 32, 2, 4, 16, 17
BASE = {
    "norm": "layernorm", "position": "learned", "attention": "multihead", "kernel": "sdpa",
    "ffn": "gelu", "block": "prenorm", "input": "plain", "stream": "plain", "value": "none", "gate": "none", "head": "tied", "init": "gpt2",
    "parametrisation": "standard",
}  # fmt: skip
Promise = Callable[[], str]  # returns what there is to say; raises when broken


class Broken(Exception):
    """A promise that does not hold, in a sentence."""


def require(holds: bool, sentence: str) -> None:
    """Raise Broken unless it holds."""
    if not holds:
        raise Broken(sentence)


def same(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Raise Broken unless two tensors agree within an absolute tolerance."""
    require(a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    difference = float((a - b).abs().max()) if a.numel() else 0.0
    require(difference <= tolerance, f"{what}: differ by {difference:.1e}, more than {tolerance:.0e}")


def tiny(**parts: Options) -> ModelConfig:
    """A model of width 32 with the given parts, `tiny(norm=…)`; the others as in GPT-2. Its vocabulary is padded."""
    chosen: dict[str, Any] = {slot: component(f"model/{slot}", name).options() for slot, name in BASE.items()}
    return ModelConfig(width=WIDTH, depth=DEPTH, heads=HEADS, context_length=CONTEXT, pad_vocab_to=8, **(chosen | parts))


def stirred(config: ModelConfig) -> Transformer:
    """The model in float64 with noise on every weight: no output is zero, and no score or pattern flat."""
    model = new_model(config, VOCABULARY, seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.25)
    return model


def tokens(rows: int = 3) -> Tensor:
    """Rows of a full context, always the same."""
    return torch.randint(VOCABULARY, (rows, CONTEXT), generator=torch.Generator().manual_seed(2))


def documents(rows: int = 3) -> Tensor:
    """Three documents in each row, with borders that differ between rows."""
    place = torch.arange(CONTEXT)[None] + torch.arange(rows)[:, None]
    return (place >= 5).long() + (place >= 11).long()


def model_promises(slot: str, options: Options) -> dict[str, Promise]:
    config = tiny(**{slot: options})
    found: dict[str, Callable[[ModelConfig], str]] = {
        "shape": _shape,
        "gradients": _gradients,
        "causality": _causality,
        "cache": _cache,
        "rows": _rows,
        "documents": _documents,
        "documents alone": _documents_alone,
        "determinism": _determinism,
        "state": _state,
        "compile": _compile,
    }
    if slot not in ("init", "parametrisation"):
        found["shared weights"] = _shared_weights
    if slot == "kernel":
        found["parity with naive"] = _parity
    elif slot in ("position", "attention", "value", "gate"):
        found["kernels"] = _kernels
    return {name: partial(check, config) for name, check in found.items()}


def refusal(model: Transformer) -> str:
    """Why the model's kernel gives no gradient here, or ''. A kernel that refuses must name one that does not."""
    if not model.blocks:
        return ""
    try:
        with torch.enable_grad():
            model(tokens(1))
    except ConfigError as error:
        said = str(error)
        require("model/kernel=" in said and ("sdpa" in said or "naive" in said), f"{said} (this names no other kernel)")
        return said
    return ""


def _shape(config: ModelConfig) -> str:
    model = new_model(config, VOCABULARY, seed=0).eval()
    with torch.inference_mode():
        for length in (1, 7, CONTEXT):
            logits = model(tokens()[:, :length])
            require(logits.shape == (3, length, VOCABULARY), f"logits have shape {tuple(logits.shape)}, not {(3, length, VOCABULARY)}")
            require(bool(logits.isfinite().all()), "a fresh model's logits are not finite")
    return ""


def _gradients(config: ModelConfig) -> str:
    model = stirred(config).train()
    if said := refusal(model):
        return f"skipped: {said}"
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().roll(-1, 1).flatten()).backward()  # type: ignore[no-untyped-call]
    unused = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            unused.append(name)
        else:
            require(bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite")
    return f"unused parameters: {', '.join(unused)}" if unused else ""


def _causality(config: ModelConfig) -> str:
    model, x = stirred(config), tokens(2)
    with torch.inference_mode():
        plain = model(x)
        for t in range(1, CONTEXT):
            changed = torch.cat((x[:, :t], (x[:, t:] + 1) % VOCABULARY), 1)
            same(model(changed)[:, :t], plain[:, :t], 1e-12, f"logits before place {t}, when the tokens from there on change")
    if said := refusal(model):
        return f"by changed tokens alone: {said}"
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(x)
    # Weights at random: a norm makes a plain sum of features constant, which would hide a leak.
    weighted = logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    for t in range(CONTEXT):
        (gradient,) = torch.autograd.grad(weighted[:, t].sum(), seen[0], retain_graph=True)
        require(bool(gradient[:, : t + 1].any()), f"logits at place {t} depend on no token up to there")
        require(not gradient[:, t + 1 :].any(), f"logits at place {t} depend on the embedding of a later token")
    return ""


def _cache(config: ModelConfig) -> str:
    model, x = stirred(config), tokens()
    with torch.inference_mode():
        cache, parts = model.new_cache(len(x), CONTEXT + 1), []
        for start, end in pairwise((0, 5, 6, 7, 8, 12, CONTEXT)):
            parts.append(model(x[:, start:end], cache=cache))
        same(torch.cat(parts, 1), model(x), 1e-9, "decoding with a cache and the full forward pass")
        uneven, lengths = model.new_cache(1, CONTEXT), (3, 7)
        model(x[:1, : lengths[0]], cache=uneven)
        other = model.new_cache(1, CONTEXT)
        model(x[1:2, : lengths[1]], cache=other)
        uneven.join(other)
        for ahead in range(3):
            newest = torch.stack([x[row, length + ahead] for row, length in enumerate(lengths)])[:, None]
            expected = [model(x[row : row + 1, : length + ahead + 1])[:, -1:] for row, length in enumerate(lengths)]
            same(model(newest, cache=uneven), torch.cat(expected), 1e-9, "decoding rows of different length and the full forward pass")
    return ""


def _rows(config: ModelConfig) -> str:
    model, x = stirred(config), tokens()
    other = x.clone()
    other[1] = (other[1] + 1) % VOCABULARY
    with torch.inference_mode():
        same(model(x)[[0, 2]], model(other)[[0, 2]], 1e-12, "the logits of a row, when another row changes")
    return ""


def _documents(config: ModelConfig) -> str:
    model, x, document = stirred(config), tokens(), documents()
    other = torch.where(document == 0, (x + 1) % VOCABULARY, x)
    with torch.inference_mode():
        try:
            before, after = model(x, document=document), model(other, document=document)
        except ConfigError as error:
            return f"refused: {error}"
    same(before[document > 0], after[document > 0], 1e-12, "the logits of a document, when the one before it changes")
    return ""


def _documents_alone(config: ModelConfig) -> str:
    """A document in a packed row has the logits of a row of its own: no token of another, and positions from 0."""
    model, x = stirred(config), tokens()
    document = torch.tensor([7, -3, 7])[documents()]  # ids are names: in no order, and only runs of them count
    with torch.inference_mode():
        try:
            packed = model(x, document=document)
        except ConfigError as error:
            return f"refused: {error}"
        for row, ids in enumerate(documents()):
            for place in (ids == i for i in ids.unique()):
                alone = model(x[row : row + 1, place])[0]
                same(packed[row, place], alone, 1e-9, "the logits of a document in a packed row and in a row of its own")
    return ""


def _drawn(config: ModelConfig, seed: int = 0) -> dict[Spec, Tensor]:
    """Every weight as the init draws it, by canonical path."""
    found: dict[Spec, Tensor] = {}
    init = build(config.init, width=config.width, depth=config.depth)

    def record(spec: Spec, generator: torch.Generator) -> Tensor:
        found[spec] = init(spec, generator)
        return found[spec]

    initialise(new_model(config, VOCABULARY, seed), record, seed)
    return found


def _determinism(config: ModelConfig) -> str:
    first, again = new_model(config, VOCABULARY, seed=0).state_dict(), new_model(config, VOCABULARY, seed=0).state_dict()
    for name, value in first.items():
        require(torch.equal(value, again[name]), f"{name} differs between two models of one seed")
    return ""


def _shared_weights(config: ModelConfig) -> str:
    mine, base = _drawn(config), _drawn(tiny())
    shared = mine.keys() & base.keys()
    for spec in shared:
        require(torch.equal(mine[spec], base[spec]), f"{spec.path} is drawn otherwise than in the model without this component")
    return f"{len(shared)} of {len(mine)} weights are shared with GPT-2's"


def _state(config: ModelConfig) -> str:
    model, file = stirred(config), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = new_model(config, VOCABULARY, seed=1).double().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.inference_mode():
        same(model(tokens()), other(tokens()), 0.0, "logits before and after saving")
    return ""


def _compile(config: ModelConfig) -> str:
    model = stirred(replace(config, depth=1))
    gradient = not refusal(model)
    torch._dynamo.reset()
    with torch.set_grad_enabled(gradient):
        compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend="aot_eager")
        same(compiled(tokens()), model(tokens()), 1e-12, "compiled and eager logits")
    return ""


def _kernels(config: ModelConfig) -> str:
    """What acts on scores acts alike under every kernel."""
    return "; ".join(_against_naive(config, component("model/kernel", name).options(), name) for name in ("sdpa", "flex"))


def _parity(config: ModelConfig) -> str:
    """A kernel does what naive does, under every kind of mask and of bias."""
    attention: Any = component("model/attention", "multihead").options
    variants = {"causal": config, "window": replace(config, attention=attention(window=5))}
    variants["grouped"] = replace(config, attention=attention(kv_heads=2))
    for name in ("rotary", "alibi", "t5"):
        position: Any = component("model/position", name).options()
        variants[name] = replace(config, position=position)
    return "; ".join(_against_naive(variant, config.kernel, name) for name, variant in variants.items())


def _against_naive(config: ModelConfig, kernel: Any, name: str) -> str:
    """Compare with and without documents; return what the kernel refuses to do."""
    naive: Any = component("model/kernel", "naive").options()
    model, reference = stirred(replace(config, kernel=kernel)), stirred(replace(config, kernel=naive))
    for document in (None, documents()):
        try:
            with torch.inference_mode():
                found = model(tokens(), document=document)
        except ConfigError as error:
            return f"{name} refused: {error}"
        with torch.inference_mode():
            expected = reference(tokens(), document=document)
        same(found, expected, 1e-12, f"{name} and naive attention{'' if document is None else ' with documents'}")
    return f"{name} as naive"
