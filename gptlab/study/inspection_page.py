"""What `gptlab inspect` found as one self-contained page.

The page asks nothing of a network. Its data are a JSON text within it: tokens as places in a table of their texts, arrays in base64.
Attention patterns, which are nearly all of it, are the lower triangles in steps of the root of a weight, deflated, a text a layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.data.tokenizer import Tokenizer
from gptlab.interpret.inspection import Inspection
from gptlab.interpret.units import Excited
from gptlab.study.page import assembled, encoded, write_whole

MARK = '<meta name="generator" content="gptlab inspect">'  # what tells such a page
SCRIPTS = ("common.js", "inspect.js", "inspect-attention.js", "inspect-parts.js")
MOST_BYTES = 2_900_000  # of the deflated patterns of all layers; beyond, they are told in fewer steps
STEPS = (255, 63, 31)  # of the root of a weight: to 0.4 %, 1.6 %, 3 % of it at 1, and finer below
LONGEST_TEXT = 40  # tokens shown around the one that excites a unit


@dataclass(frozen=True)
class Beside:
    """What the page shows beside the inspection itself, and its words."""

    title: str
    summary: str
    made: str
    remarks: list[tuple[str, bool]] = field(default_factory=list)  # and whether it is a warning
    units: list[Excited] = field(default_factory=list)
    corpus: Tensor | None = None  # (n, s): the rows that units are looked for in
    source: str = ""  # what they are of; where there are none, why
    near: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # of a token the nearest, with their cosines
    analogies: list[tuple[str, list[tuple[int, float]]]] = field(default_factory=list)


class _Pieces:
    """Tokens as places in a table of their texts, which holds those alone that the page shows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._places, self.texts = tokenizer, dict[int, int](), list[str]()

    def __call__(self, token: int) -> int:
        if token not in self._places:
            self._places[token] = len(self.texts)
            self.texts.append(token_text(self._tokenizer, token))
        return self._places[token]

    def array(self, tokens: Tensor) -> str:
        """Base64 of places, little-endian uint32."""
        return encoded(np.array([self(int(token)) for token in tokens.flatten().tolist()], "<u4"))


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; of bytes that are no character by themselves, the bytes."""
    token_bytes = getattr(tokenizer, "token_bytes", None)
    if token_bytes is None:
        return tokenizer.decode([token])
    raw: bytes = token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in raw)


def inspection_page(found: Inspection, tokenizer: Tokenizer, beside: Beside) -> str:
    """The HTML of an inspection."""
    pieces = _Pieces(tokenizer)
    count = len(found.tokens)
    data: dict[str, Any] = {
        "summary": beside.summary,
        "made": beside.made,
        "remarks": [{"text": text, "warn": warn} for text, warn in beside.remarks],
        "tokens": [pieces(int(token)) for token in found.tokens],
        "place": max(0, count - 2),  # the last that has something to be judged by
        "loss": floats(found.loss),
        "guesses": {"k": found.guess.shape[1], "piece": pieces.array(found.guess), "p": floats(found.probability)},
        "lens": _lens(found, pieces),
        "attention": _attention(found),
        "attribution": _attribution(found, pieces),
        "norms": _norms(found),
        "neurons": _neurons(found, beside, pieces),
        "neighbours": _neighbours(beside, pieces),
        "positions": _positions(found),
    }
    data["pieces"] = pieces.texts
    return assembled("inspect.html", beside.title, data, styles=("page.css", "inspect.css"), scripts=SCRIPTS)


def write_inspection(file: Path, made: str, *, force: bool) -> Path:
    """Write a page, whole or not at all. Raises ConfigError where FILE is something else, unless it may be replaced; IOFailure."""
    if file.exists() and not force and not is_inspection(file):
        raise ConfigError(f"{file} is there and is no page of gptlab inspect: give another --output, or --force to replace it")
    return write_whole(file, made)


def is_inspection(file: Path) -> bool:
    """Whether a file is such a page."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return MARK.encode() in opened.read(1000)


# --- arrays -----------------------------------------------------------------------------------------------------------


def floats(values: Tensor) -> str:
    """Base64 of float32, little-endian."""
    return encoded(values.detach().float().cpu().numpy().astype("<f4"))


def rooted(shares: Tensor) -> str:
    """Base64 of shares in 255 steps of their root: fine near 0, where most are."""
    return encoded(_steps(shares.detach().float().cpu().numpy(), 255))


def _steps(shares: npt.NDArray[np.float32], steps: int) -> npt.NDArray[np.uint8]:
    return (np.sqrt(np.clip(shares, 0, 1)) * steps).round().astype(np.uint8)


def _linear(values: Tensor, high: float) -> str:
    """Base64 of values from 0 to `high` in 255 steps; what is below 0 is 0."""
    shares = values.detach().float().cpu().numpy() / high if high > 0 else np.zeros(len(values), np.float32)
    return encoded((np.clip(shares, 0, 1) * 255).round().astype(np.uint8))


def packed_patterns(weights: Sequence[npt.NDArray[np.float32]], most: int = MOST_BYTES) -> tuple[list[bytes], int]:
    """Of each layer (h, t, s) its lower triangles, deflated, and in how many steps the root of a weight is told."""
    made: list[bytes] = []
    for steps in STEPS:
        made = [zlib.compress(_steps(one[:, *np.tril_indices(one.shape[-1])], steps).tobytes(), 6) for one in weights]
        if sum(map(len, made)) <= most:
            return made, steps
    return made, STEPS[-1]


# --- the page's parts -------------------------------------------------------------------------------------------------


def _place(name: str) -> str:
    return "embedding" if name == "embedded" else f"layer {name.rpartition('.')[2]}"


def _lens(found: Inspection, pieces: _Pieces) -> dict[str, Any]:
    kinds = {
        name: {"top": pieces.array(one.guess), "p": rooted(one.probability), "next": rooted(one.of_next)}
        for name, one in found.lenses.items()
    }
    tuned = (
        " The tuned lens reads it through a map of each layer's own, which has learned what the model will say." if len(kinds) > 1 else ""
    )
    note = (
        "The stream after each layer, read by the model's own last norm and head; the top row is the model's answer."
        f"{tuned} On average it is found, and stays, after {found.depth:.1f} of {len(found.places) - 1} layers."
    )
    return {"labels": [_place(name) for name in found.places], "kinds": kinds, "note": note}


def _attention(found: Inspection) -> dict[str, Any]:
    if found.patterns is None:
        return {"layers": [], "steps": 1, "note": f"No pattern: {found.notes['attention']}.", "scores": {}}
    layers = list(found.patterns)
    packed, steps = packed_patterns([found.patterns[layer][0].float().cpu().numpy() for layer in layers])
    note = f"Every head's weights; each row adds up to 1. {_sentence(found.notes['attention'])}"
    if steps != STEPS[0]:
        note += f"They are told in {steps} steps, to keep this page small."
    made = [
        {"layer": layer, "heads": found.patterns[layer].shape[1], "data": encoded(one)} for layer, one in zip(layers, packed, strict=True)
    ]
    if not found.scores:
        told = {"note": f"No scores: {found.notes['scores']}."}
        return {"layers": made, "steps": steps, "note": note, "scores": told, "first": (0, 0)}
    named = {"previous": "previous_token", "duplicate": "duplicate_token", "induction": "induction", "entropy": "entropy"}
    scores: dict[str, Any] = {
        short: [[round(float(v), 4) for v in found.scores[name][layer]] for layer in layers] for short, name in named.items()
    }
    scores["note"] = (
        "Share of a head's weight that goes to the token before, to an earlier token of the same kind, or to what followed that one; "
        f"on {found.notes['scores']}."
    )
    best = {
        name: max((score, i, head) for i, row in enumerate(scores[name]) for head, score in enumerate(row))
        for name in ("induction", "previous")
    }
    first = best["induction"] if best["induction"][0] >= best["previous"][0] / 2 else best["previous"]
    return {"layers": made, "steps": steps, "note": note, "scores": scores, "first": first[1:]}


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}. " if note else ""


def _attribution(found: Inspection, pieces: _Pieces) -> dict[str, Any]:
    told = found.attribution
    if told is None:
        return {"note": f"Not told: {found.notes['attribution']}."}
    components = [_component(name) for name in told.components]
    kinds = [c["kind"] for c in components if c["layer"] is not None and c["kind"] != "head"]
    return {
        "components": components,
        "layers": sorted({c["layer"] for c in components if c["layer"] is not None}),
        "columns": list(dict.fromkeys(kinds)),
        "target": [pieces(int(token)) for token in told.target[0]],
        "logit": floats(told.logits[0]),
        "values": floats(told.values[:, 0].T),
        "note": f"What each part adds to a logit, the scale of the norms held at what it was. {_sentence(told.note)}",
    }


def _component(name: str) -> dict[str, Any]:
    parts = name.split(".")
    if parts[0] != "blocks":
        return {"name": name, "layer": None, "kind": name, "head": None}
    layer, rest = int(parts[1]), parts[2:]
    if rest[:2] == ["attention", "head"]:
        return {"name": name, "layer": layer, "kind": "head", "head": int(rest[2])}
    return {"name": name, "layer": layer, "kind": " ".join(rest).replace("ffn", "feed-forward").replace("_", " "), "head": None}


def _norms(found: Inspection) -> dict[str, Any]:
    series = []
    for name, by_layer in found.norms.items():
        first = min(by_layer) + (name != "residual stream")
        values = np.stack([by_layer[layer].cpu().numpy() for layer in sorted(by_layer)]).astype("<f4")
        series.append({"name": name, "from": first, "layers": len(by_layer), "values": encoded(values)})
    labels = ["emb.", *(name.rpartition(".")[2] for name in found.places[1:])]
    note = "How long the vector of a token is after each layer, and that of what the layer's parts write to it."
    return {"labels": labels, "series": series, "note": note}


def _neurons(found: Inspection, beside: Beside, pieces: _Pieces) -> dict[str, Any]:
    layers: dict[str, list[dict[str, Any]]] = {}
    for unit in beside.units:
        texts = [_around(row, values, beside, pieces) for row, values in unit.texts]
        layers.setdefault(unit.layer, []).append({"unit": unit.unit, "high": unit.high, "prompt": _rises(unit.own), "texts": texts})
    if not layers:
        return {"layers": [], "note": found.notes["units"]}
    note = "Of each layer the units that rise furthest above their own mean on this text. "
    note += f"{found.notes['units']} " if found.notes["units"] else ""
    nothing = ""  # what is told of a unit without texts
    if beside.corpus is None:
        note += f"No other texts: {beside.source}; --text FILE names some."
    else:
        note += f"Below, where they are largest in {beside.corpus.numel():,} tokens of {beside.source}."
        nothing = f"Nothing in {beside.source} excites it."
    return {"layers": [{"layer": layer, "units": units} for layer, units in layers.items()], "note": note, "nothing": nothing}


def _rises(values: Tensor) -> dict[str, Any]:
    high = float(values.max().clamp(min=0))
    return {"u1": _linear(values, high), "high": high}


def _around(row: int, values: Tensor, beside: Beside, pieces: _Pieces) -> dict[str, Any]:
    """The tokens around the one that excites a unit most."""
    assert beside.corpus is not None
    at = int(values.argmax())
    first = max(0, min(at - LONGEST_TEXT // 2, len(values) - LONGEST_TEXT))
    part = slice(first, first + LONGEST_TEXT)
    ids = beside.corpus[row, part].tolist()
    return {"where": f"row {row}, token {at}", "tokens": [pieces(token) for token in ids], **_rises(values[part])}


def _neighbours(beside: Beside, pieces: _Pieces) -> dict[str, Any]:
    def rows(found: Sequence[tuple[int, float]]) -> list[list[float]]:
        return [[pieces(token), round(cosine, 4)] for token, cosine in found]

    near = [{"token": pieces(token), "near": rows(found)} for token, found in beside.near.items()]
    analogies = [{"asked": asked, "near": rows(found)} for asked, found in beside.analogies]
    note = "The tokens whose embeddings point most nearly the same way, with the cosine: of the chosen token and of the text's first."
    return {"near": near, "analogies": analogies, "note": note}


def _positions(found: Inspection) -> dict[str, Any]:
    told = found.positions
    data: dict[str, Any] = {"note": told.note}
    if told.similarity is not None:
        shares = (told.similarity.cpu().numpy().clip(-1, 1) + 1) / 2
        data |= {"matrix": encoded((shares * 255).round().astype(np.uint8)), "n": len(shares), "step": told.step}
    if told.bias is not None:
        data["bias"] = {"values": floats(told.bias), "heads": len(told.bias), "distances": list(told.distances)}
    return data
