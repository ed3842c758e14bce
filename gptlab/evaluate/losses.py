"""What a model makes of every token of a text: its loss, how sure the model was and whether rightly, where the token stood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.data.loader import Batch, held_out_batches
from gptlab.data.prepared import Prepared
from gptlab.data.tokenizer import Tokenizer
from gptlab.hardware.precision import autocast
from gptlab.model.mask import document_starts
from gptlab.model.transformer import Transformer
from gptlab.runner.validation import EVALUATION_TOKENS


@dataclass(frozen=True)
class TokenLosses:
    """(n,) each, of the scored tokens in the order of the text.

    `nats`: -log p of the token; `token`: its id; `place`: how many tokens the model saw before it (of its own document, where it sees no
    other), from 1; `sure`: p of the likeliest token, and `right` whether that was it; `document`: a number. `bytes`: what all of them
    stand for.
    """

    nats: npt.NDArray[np.float64]
    token: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]
    sure: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]
    document: npt.NDArray[np.int64]
    bytes: int


def of_text(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, stride: int = 0, limit: int = 0, precision: str = "fp32"
) -> TokenLosses:
    """Texts, each a document, read in windows of the model's context, each `stride` tokens after the one before (0: a whole context).

    A window scores what no earlier one has. A text begins behind the token that its tokeniser has for that, or that ends texts; where
    there is none, its first token is seen and not scored. `limit`: scored tokens at most, of all texts (0: all).
    Raises ConfigError for a stride beyond the context, or texts without two tokens.
    """
    context = model.config.context_length
    if not 0 <= stride <= context:
        raise ConfigError(f"--stride {stride} must be from 1 to the context of {context:,} (0: that)")
    begin = getattr(tokenizer, "begin_of_text", None)
    begin = tokenizer.end_of_text if begin is None else begin
    found: list[TokenLosses] = []
    left = limit or None
    for number, text in enumerate(texts):
        ids = np.asarray(tokenizer.encode(text), np.int64)
        ids = ids if begin is None else np.concatenate(([begin], ids))
        ids = ids if left is None else ids[: left + 1]
        if len(ids) < 2:
            continue
        batches = _windows(ids, context, stride or context)
        found.append(_collected(model, tokenizer, batches, precision, document=number))
        if left is not None:
            left -= len(found[-1].nats)
            if left <= 0:
                break
    if not found:
        raise ConfigError("there is nothing to measure: the text has fewer than two tokens")
    columns = {name: np.concatenate([getattr(f, name) for f in found]) for name in ("nats", "token", "place", "sure", "right", "document")}
    return TokenLosses(**columns, bytes=sum(f.bytes for f in found))


def of_set(model: Transformer, data: Prepared, name: str, *, limit: int = 0, precision: str = "fp32") -> TokenLosses:
    """A held-out set of prepared data, in the windows in which training measures it."""
    context = model.config.context_length
    batches = held_out_batches(data, name, context, limit, max(1, EVALUATION_TOKENS // context), documents=model.sees_documents)
    return _collected(model, data.tokenizer, batches, precision, chats=data.chat)


def _windows(ids: npt.NDArray[np.int64], context: int, stride: int) -> Iterator[Batch]:
    """Windows over one text as batches. The last is filled up with zeros that count for nothing, and that no earlier token sees."""
    starts = list(range(0, max(1, len(ids) - 1 - context + stride), stride))
    rows = max(1, EVALUATION_TOKENS // context)
    for first in range(0, len(starts), rows):
        inputs, targets, weight = [], [], []
        for start in starts[first : first + rows]:
            part = ids[start : start + context + 1]
            known = context - stride if start else 0  # targets that the window before has scored
            scored = np.arange(context) >= known
            scored &= np.arange(context) < len(part) - 1
            part = np.pad(part, (0, context + 1 - len(part)))
            inputs.append(part[:-1])
            targets.append(part[1:])
            weight.append(scored)
        made = (torch.from_numpy(np.stack(column)) for column in (inputs, targets, weight))
        tokens, wanted, counted = made
        yield Batch(inputs=tokens, targets=wanted, weight=counted.float(), document=None)


@torch.inference_mode()
def _collected(
    model: Transformer, tokenizer: Tokenizer, batches: Iterator[Batch], precision: str, *, document: int | None = None, chats: bool = False
) -> TokenLosses:
    """Every scored token of the batches. `document`: of all; None: a new one begins behind each end-of-text token, or with each chat."""
    was_training = model.training
    model.eval()
    device, columns, begun = model.embedding.weight.device, [], 0
    for batch in batches:
        with autocast(device, precision):
            nats, sure, likeliest = judged(model, batch.to(device))
        scored = np.ones(batch.targets.shape, bool) if batch.weight is None else batch.weight.numpy() > 0
        token, place = batch.targets.numpy(), np.broadcast_to(np.arange(1, batch.targets.shape[1] + 1), batch.targets.shape)
        own = np.zeros_like(token)
        if batch.document is not None:
            place = place - document_starts(batch.document).numpy()
            own = batch.document.numpy()
            own = own + begun + np.arange(len(own))[:, None] * (int(own.max()) + 1)  # no two rows share one
            begun = int(own.max()) + 1
        columns.append([a[scored] for a in (nats, token, place, sure, likeliest == token, own)])
    model.train(was_training)
    if not columns:
        raise ConfigError("there is nothing to measure: the set has no token")
    nats, token, place, sure, right, chat = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    ends = token == (-1 if tokenizer.end_of_text is None else tokenizer.end_of_text)
    documents = chat if chats else np.cumsum(ends) - ends if document is None else np.full(len(token), document)
    lengths = tokenizer.byte_lengths()
    return TokenLosses(nats, token, place, sure, right, documents.astype(np.int64), int(lengths[token].sum()))


def judged(model: Transformer, batch: Batch) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(b, t) each: the loss of every target, the probability of the likeliest token, and which that was."""
    targets = batch.targets.reshape(-1)

    def reduce(features: Float[Tensor, "b t d"], within: Transformer) -> Tensor:
        made = []
        for part, logits in within.logits_by_parts(features.reshape(-1, features.shape[-1])):
            whole = torch.logsumexp(logits, -1)
            top, place = logits.max(-1)
            of_target = logits.gather(-1, targets[part, None])[:, 0]
            made.append(torch.stack(((whole - of_target).double(), (top - whole).exp().double(), place.double()), -1))
        return torch.cat(made)

    told: Float[Tensor, "n 3"] = model(batch.inputs, document=batch.document, reduce=reduce).cpu()
    nats, sure, likeliest = (told[:, i].reshape(batch.targets.shape).numpy() for i in range(3))
    return nats, sure, likeliest.astype(np.int64)
