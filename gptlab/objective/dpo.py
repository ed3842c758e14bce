"""Learning from preferences: of two answers the better one is made likelier than the model that it began with has it, the other less."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.record import record
from gptlab.config.registry import register
from gptlab.config.schema import Config
from gptlab.data.conversations import Conversations
from gptlab.data.loader import Batch, batch_of, held_out_chats, held_out_rows
from gptlab.data.prepared import Prepared
from gptlab.hardware.precision import autocast
from gptlab.model.mode import evaluating
from gptlab.model.transformer import Transformer
from gptlab.objective import preference
from gptlab.objective.protocol import Training
from gptlab.objective.sft import Adapting
from gptlab.tracker.protocol import Metrics

REFERENCE = "reference.safetensors"  # in the run's folder: what the first model says of every pair
READ = 8192  # tokens of one forward pass without gradients


@register("objective", "dpo")
class DPO(Adapting):
    """Preferences without a reward model (Rafailov et al., 2023); for data of pairs (data/corpus=preferences, ultrafeedback).

    loss        dpo, ipo (Azar et al., 2023) or kto (Ethayarajh et al., 2024)
    beta        how dear it is to leave the model that it began with
    smoothing   dpo's: the share of preferences that are taken to be wrong
    nll_weight  of the chosen answer's own loss, a mean over its tokens, which is added to a pair's (Pang et al., 2024: 1): without it both
                answers may lose likelihood, as long as the rejected one loses more
    the others  as of objective=sft

    A pair's two answers lie in one row, so that `trainer.batch_tokens` holds so many pairs; the loss is a mean over them. The first model's
    log-probabilities are computed once and kept in the run's folder. `val/loss` is the cross-entropy of the held-out chosen answers.
    """

    def __init__(
        self,
        *,
        loss: Literal["dpo", "ipo", "kto"] = "dpo",
        beta: float = 0.1,
        smoothing: float = 0.0,
        nll_weight: float = 0.0,
        embeddings: Literal["auto", "train", "freeze"] = "auto",
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_targets: tuple[str, ...] = ("attention", "ffn"),
    ) -> None:
        super().__init__(embeddings, lora_rank, lora_alpha, lora_targets)
        if not 0 < beta < math.inf:
            raise ConfigError(f"objective.beta={beta} must be above 0 and finite")
        if not 0 <= smoothing < 0.5 or (smoothing and loss != "dpo"):
            raise ConfigError(f"objective.smoothing={smoothing} must be at least 0 and below 0.5, and is for objective.loss=dpo")
        if not 0 <= nll_weight < math.inf:
            raise ConfigError(f"objective.nll_weight={nll_weight} must be at least 0 and finite")
        self.loss, self.beta, self.smoothing, self.nll_weight = loss, beta, smoothing, nll_weight
        self.reference: dict[str, Tensor] = {}  # of each set: (pairs, 2)
        self._first: Transformer | None = None  # kto asks it about answers that no pair has
        self.baseline = torch.zeros(())

    def check(self, data: Prepared, config: Config) -> None:
        if not data.pairs or data.parts:
            raise ConfigError("objective=dpo learns from pairs of answers; choose data/corpus=preferences or data=ultrafeedback")

    def begin(self, training: Training) -> None:
        self.reference = self._held(training.folder / REFERENCE, training) or self._compute(training)
        if self.loss == "kto":
            self._first = training.initial()

    def _held(self, file: Path, training: Training) -> dict[str, Tensor]:
        """What an earlier session has kept; nothing where that was of other pairs, or cannot be read."""
        try:
            with safe_open(file, "pt") as opened:
                if (opened.metadata() or {}).get("data") != training.data.hash:
                    return {}
            return load_file(file)
        except (OSError, SafetensorError):
            return {}

    @torch.no_grad()
    def _compute(self, training: Training) -> dict[str, Tensor]:
        first, found = training.initial(), {}
        data, config = training.data, training.config
        context = config.model.context_length
        train = Conversations(data, "train", context, 0, config.data.too_long)
        for split, chats in {"train": train, "val": held_out_chats(data, "val", context)}.items():
            sums = torch.zeros(len(chats.starts) // 2, 2)
            for batch in _batches(chats):
                own = _sums(first, batch, training)
                pairs = batch.extra["pair"]
                sums[pairs[pairs >= 0]] = own[pairs >= 0].cpu()
            found[split] = sums
        if training.world.first:
            save_file(found, training.folder / REFERENCE, {"data": training.data.hash})
        return found

    def outlined(self, batch: Batch) -> Batch:
        document = torch.zeros_like(batch.inputs)
        document[:, batch.inputs.shape[1] // 2 :] = 1
        pair = torch.zeros(len(document), 1, dtype=torch.long, device=document.device)
        place = torch.arange(document.shape[1], device=document.device).expand_as(document)
        extra = {"pair": pair, "place": place, "slot": document, "reference": pair[..., None].expand(-1, -1, 2).float()}
        return Batch(batch.inputs, batch.targets, torch.ones_like(batch.inputs, dtype=torch.float32), document, extra)

    def experience(self, training: Training, drawn: Batch) -> Batch:
        """With what the first model says of each pair."""
        located(drawn).extra["reference"] = self.reference["train"][drawn.extra["pair"].clamp(min=0)]
        if self.loss == "kto":
            self.baseline = self._departed(training, _crossed(drawn))
        return drawn

    @torch.no_grad()
    def _departed(self, training: Training, crossed: Batch) -> Tensor:
        """kto's baseline: how much likelier answers that no pair has became, a mean over those of all ranks, and at least 0."""
        assert self._first is not None
        there = crossed.extra["pair"] >= 0
        parts = crossed.split(int(training.config.hardware.micro_batch))
        with evaluating(training.trained):  # without dropout, whose draws are those of the step
            own, first = (torch.cat([_sums(model, part, training)[..., 0] for part in parts]) for model in (training.trained, self._first))
        gone = (own - first).cpu()[there].double()
        ranks = training.world.gather(float(gone.sum()), len(gone))
        return torch.tensor(max(0.0, sum(total for total, _ in ranks) / max(1, sum(count for _, count in ranks))))

    def __call__(self, model: Transformer, batch: Batch) -> Tensor:
        there = (batch.extra["pair"] >= 0).float()
        sums = answer_sums(model, batch)
        chosen, rejected = (sums - batch.extra["reference"]).unbind(-1)  # (b, p) each
        for name, values in self._rewards(chosen, rejected).items():
            record(f"train/{name}", (values.detach() * there).sum() / there.sum())
        losses = self._losses(chosen - rejected, chosen, rejected)
        if self.nll_weight:
            losses = losses - self.nll_weight * sums[..., 0] / answer_lengths(batch)[..., 0].clamp(min=1)
        return (losses * there).sum()

    def _rewards(self, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {
            "reward_margin": self.beta * (chosen - rejected),
            "reward_accuracy": (chosen > rejected).float(),
            "reward_chosen": self.beta * chosen,
            "reward_rejected": self.beta * rejected,
        }

    def _losses(self, margin: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.loss == "dpo":
            return preference.dpo(margin, self.beta, self.smoothing)
        if self.loss == "ipo":
            return preference.ipo(margin, self.beta)
        return preference.kto(chosen, rejected, self.beta, self.baseline.to(chosen.device))

    @torch.no_grad()
    def measure(self, training: Training) -> Metrics:
        """`val/reward_margin`, `val/reward_accuracy`, … and `val/preference_loss`, over the held-out pairs."""
        context, limit = training.config.model.context_length, training.config.data.validation_tokens
        chats = held_out_chats(training.data, "val", context)
        parts = []
        with evaluating(training.trained):
            for batch in _batches(chats, limit):
                pairs = batch.extra["pair"]
                parts.append((_sums(training.trained, batch, training).cpu() - self.reference["val"][pairs.clamp(min=0)])[pairs >= 0])
        chosen, rejected = torch.cat(parts).unbind(-1)
        found: Metrics = {f"val/{name}": float(values.mean()) for name, values in self._rewards(chosen, rejected).items()}
        return found | {"val/preference_loss": float(self._losses(chosen - rejected, chosen, rejected).mean())}


def located(batch: Batch) -> Batch:
    """With the places of the answers' tokens in each row, and whose they are: (b, a) each, filled up with `slots`, which is nobody's.

    The model's head is then asked about these alone, whatever the row holds besides.
    """
    answer, document = batch.extra["answer"], batch.document
    assert document is not None
    slots = 2 * batch.extra["pair"].shape[1]
    order = (~answer).to(torch.int8).sort(dim=1, stable=True).indices[:, : max(1, int(answer.sum(1).max()))]
    slot = torch.where(answer.gather(1, order), document.gather(1, order), slots)
    batch.extra |= {"place": order, "slot": slot}
    return batch


def answer_sums(model: Transformer, batch: Batch) -> Float[Tensor, "b p 2"]:
    """The log-probability of each pair's two answers, whole, of a `located` batch: (b, pairs of a row, chosen and rejected)."""
    place, slot, slots = batch.extra["place"], batch.extra["slot"], 2 * batch.extra["pair"].shape[1]
    targets = batch.targets.gather(1, place)

    def reduce(features: Tensor, within: Transformer) -> Tensor:
        asked = features.gather(1, place[..., None].expand(-1, -1, features.shape[-1]))
        rows, aims = asked.flatten(0, 1), targets.flatten()
        whole = [(slice(None), within.logits(rows).float())] if torch.is_grad_enabled() else within.logits_by_parts(rows)
        each = -torch.cat([F.cross_entropy(logits, aims[part], reduction="none") for part, logits in whole]).view_as(targets)
        return each.new_zeros(len(each), slots + 1).scatter_add(1, slot, each)

    sums: Tensor = model(batch.inputs, document=batch.document, reduce=reduce)
    return sums[:, :-1].reshape(len(sums), -1, 2)


def answer_lengths(batch: Batch) -> Float[Tensor, "b p 2"]:
    """How many tokens each answer of a `located` batch has: (b, pairs of a row, chosen and rejected)."""
    slot, slots = batch.extra["slot"], 2 * batch.extra["pair"].shape[1]
    counted = torch.zeros(len(slot), slots + 1, device=slot.device).scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float32))
    return counted[:, :-1].reshape(len(slot), -1, 2)


def _sums(model: Transformer, batch: Batch, training: Training) -> Tensor:
    with autocast(training.device, training.config.hardware.precision):
        return answer_sums(model, located(batch).to(training.device))


def _batches(chats: Conversations, limit: int = 0) -> Iterator[Batch]:
    """All rows; at most `limit` tokens of them, where it is given."""
    rows, count = max(1, READ // chats.context), held_out_rows(chats, limit)
    for first in range(0, count, rows):
        yield batch_of(chats.fetch(chats.place(np.arange(first, min(first + rows, count), dtype=np.int64)), True))


def _crossed(batch: Batch) -> Batch:
    """Each pair's question with the chosen answer of the next one of this rank's batch (the last with the first's): kto's measure of how
    far the model has gone. A row each, cut where it does not fit."""
    assert batch.document is not None
    context = batch.inputs.shape[1]
    questions, answers = [], []
    for row in range(len(batch.inputs)):
        for place in range(int((batch.extra["pair"][row] >= 0).sum())):
            here = batch.document[row] == 2 * place
            own = batch.extra["answer"][row] & here
            begins = int(own.nonzero()[0])
            questions.append(batch.inputs[row][here.nonzero()[0] : begins + 1])
            answers.append(batch.targets[row][own])
    inputs = torch.zeros(len(questions), context, dtype=torch.long)
    targets, document, answer = inputs.clone(), torch.full_like(inputs, 2), torch.zeros_like(inputs, dtype=torch.bool)
    for i, question in enumerate(questions):
        text = torch.cat((question, answers[(i + 1) % len(answers)]))[: context + 1]
        length = len(text) - 1
        inputs[i, :length], targets[i, :length], document[i, :length] = text[:-1], text[1:], 0
        answer[i, len(question) - 1 : length] = True
    pair = torch.arange(len(questions))[:, None]
    pair[answer.sum(1) == 0] = -1
    return Batch(inputs, targets, None, document, {"answer": answer, "pair": pair})
