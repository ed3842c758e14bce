"""Fine-tuning: the loss and gradients of transformers on the same chats, packed as unpacked; adapters as good as all weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError, DataError
from gptlab.config.resolve import resolve
from gptlab.data.conversations import Conversations
from gptlab.data.loader import Batch, batch_of
from gptlab.data.prepare import prepare
from gptlab.hardware.device import machine
from gptlab.model.lora import MARK, add_adapters, merged
from gptlab.model.transformer import Transformer, new_model
from gptlab.objective.sft import SFT
from gptlab.runner.checkpoint import checkpoints, step_of
from gptlab.runner.memory import forecast_memory
from gptlab.runner.run import Run
from tests.data.test_conversations import chats, written

CONTEXT = 128


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("chats"), chats(60, turns=1, longest=5))


def overrides(file: Path, *more: str) -> list[str]:
    return [
        "data/corpus=chat", "data/tokenizer=chat", f"data.corpus.path={file}", "objective=sft", "tracker=none",
        "model.width=32", "model.heads=2", "model.depth=2", f"model.context_length={CONTEXT}",
        "trainer.batch_tokens=512", "trainer.budget=4steps", "callbacks.samples.tokens=4", *more,
    ]  # fmt: skip


def rows(file: Path, *, packed: bool) -> tuple[Any, list[Batch]]:
    data = prepare(compose(overrides(file)).data)
    made = Conversations(data, "train", CONTEXT, 0, "cut", packed=packed)
    return made, [batch_of(made.fetch(np.arange(made.epoch_rows), True))]


def model(file: Path, *more: str) -> Transformer:
    config = compose(overrides(file, *more))
    return new_model(config.model, prepare(config.data).vocabulary, 0).eval()


def gradients(made: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_packed_chats_have_the_loss_and_gradients_of_chats_by_themselves(file: Path, position: str) -> None:
    found = []
    for packed in (True, False):
        made = model(file, f"model/position={position}")
        _, batches = rows(file, packed=packed)
        loss = sum((SFT()(made, batch) for batch in batches), torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((loss.item(), gradients(made), sum(batch.token_weight for batch in batches), len(batches[0].inputs)))
    (packed_loss, packed_gradients, weight, few), (loss, own, same, many) = found
    assert few < many
    assert weight == same
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(packed_gradients, own, rtol=1e-4, atol=2e-5)


def test_a_batch_has_the_loss_and_gradients_of_transformers(file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from gptlab.interop.gpt2 import GPT2
    from gptlab.interop.shapes import exported

    made = model(file, "model/position=learned")
    _, (batch, *_) = rows(file, packed=False)
    sizes = {"vocab_size": made.vocabulary, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    theirs.load_state_dict(exported(GPT2, made.config, made.vocabulary, made.state_dict()), strict=False)
    assert batch.weight is not None
    labels = batch.targets.masked_fill(batch.weight == 0, -100)
    logits = theirs(batch.inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected.backward()
    loss = SFT()(made, batch) / batch.token_weight
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = exported(GPT2, made.config, made.vocabulary, {name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    named = {name: p.grad for name, p in theirs.named_parameters()}
    assert len(set(ours) & set(named)) == len(named)
    for name, gradient in named.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


def test_an_adapter_changes_nothing_at_first_and_trains_alone(file: Path) -> None:
    plain, adapted = model(file), model(file)
    add_adapters(adapted, 4, 16.0, ("attention", "ffn"), 0)
    _, (batch, *_) = rows(file, packed=True)
    assert torch.equal(plain(batch.inputs, document=batch.document), adapted(batch.inputs, document=batch.document))
    SFT()(adapted, batch).backward()  # type: ignore[no-untyped-call]
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == {n for n, _ in adapted.named_parameters() if MARK in n}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("adapter.up"):
                parameter.normal_()
    plain.load_state_dict(merged(adapted.state_dict()))
    ours, whole = (m(batch.inputs, document=batch.document) for m in (adapted, plain))
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def test_at_full_rank_adapters_reach_what_all_weights_reach(file: Path) -> None:
    def fitted(rank: int) -> float:
        made = model(file, "model.width=64")
        with torch.no_grad():
            made.embedding.weight.mul_(10)  # frozen, they must be as far apart as those of a trained model
        objective = SFT(lora_rank=rank, lora_alpha=float(rank or 1), embeddings="freeze")
        objective.adapt(made, 0, 0)
        _, (batch, *_) = rows(file, packed=True)
        batch = batch.split(1)[0]
        optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=8e-3, weight_decay=0.0)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 8e-3 * (1 - step / 300)
            optimizer.zero_grad()
            loss = objective(made, batch) / batch.token_weight
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return loss.item()

    full, adapted = fitted(0), fitted(64)
    assert full < 0.05
    assert adapted < 0.05


@pytest.fixture
def base(file: Path, tmp_path: Path) -> Run:
    """A base model, which knows bytes and no chat."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(json.loads(line)["messages"][1]["content"] for line in file.read_text().splitlines()) * 3)
    more = ["data/corpus=text", "data/tokenizer=byte", f"data.corpus.path={text}", "objective=lm"]
    return train(compose([*overrides(file, "model/position=learned")[3:], *more])).run


def test_a_base_learns_the_tokens_of_a_chat_and_talks(file: Path, base: Run) -> None:
    begun = train(compose([*overrides(file)[:5], *SMALL, f"trainer.init_from={base.identity}", "optimizer.learning_rate=0"])).run
    theirs, ours = load(base), load(begun)
    assert ours.tokenizer.vocabulary == theirs.tokenizer.vocabulary + 6
    own, other = ours.model.embedding.weight, theirs.model.embedding.weight
    assert torch.equal(own[:257], other[:257])
    torch.testing.assert_close(own[257:263], other[:257].mean(0).expand(6, -1), rtol=0, atol=1e-6)
    made = train(compose([*overrides(file)[:5], *SMALL, f"trainer.init_from={base.identity}", "trainer.budget=30steps"])).run
    assert made.metrics()[-1]["val/loss"] < begun.metrics()[-1]["val/loss"] - 0.5
    again = train(compose([*overrides(file)[:5], *SMALL, f"trainer.init_from={made.identity}", "objective.lora_rank=2"])).run
    assert load(again).tokenizer.state() == load(made).tokenizer.state(), "its tokens are there already"


SMALL = ["trainer.batch_tokens=512", "trainer.budget=4steps", "callbacks.samples.tokens=4"]


def test_adapters_are_kept_over_a_stop_and_merged_for_use(file: Path, base: Run) -> None:
    lora = ["objective.lora_rank=4", "optimizer.learning_rate=0.01", f"trainer.init_from={base.identity}", "callbacks.checkpoint.every=2"]
    whole = train(compose([*overrides(file)[:5], *SMALL, *lora, "callbacks.checkpoint.keep=9", "callbacks.checkpoint.best=false"])).run
    ours = load(whole)
    assert not any(MARK in name for name in ours.model.state_dict())
    changed = [n for n, p in ours.model.named_parameters() if n in load(base).model.state_dict() and "embedding" not in n and
               not torch.equal(p, load(base).model.state_dict()[n])]  # fmt: skip
    assert changed
    assert all(name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight")) for name in changed), changed
    shutil.rmtree(checkpoints(whole.checkpoints)[0])
    assert [step_of(kept) for kept in checkpoints(whole.checkpoints)] == [2]
    (whole.directory / "done.json").unlink()
    again = train(compose([*overrides(file)[:5], *SMALL, *lora, "callbacks.checkpoint.keep=9", "callbacks.checkpoint.best=false"])).run
    resumed = load(again).model.state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in ours.model.state_dict().items())


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["objective.lora_rank=-1"], "objective.lora_rank=-1 must be at least 0"),
        (["objective.lora_rank=4", "objective.lora_alpha=0"], "objective.lora_alpha=0.0 must be above 0"),
        (["objective.lora_rank=4", "objective.lora_targets=[head]"], "objective.lora_targets: 'head' is not one of attention, ffn"),
        (["objective.lora_rank=4000"], "objective.lora_rank=4000 is more than the"),
        (["objective.lora_rank=4", "model.depth=0"], "this model has no product there"),
        (["objective.chunk=-1"], "objective.chunk=-1 must be at least 1"),
        (["data/corpus=pydocs", "~data.corpus.path"], "objective=sft learns from an assistant's answers, and this data is text"),
    ],
)
def test_what_means_nothing_is_refused(file: Path, more: list[str], why: str) -> None:
    given = [o for o in overrides(file) if not (more[0].startswith("data/corpus") and "path" in o)]
    with pytest.raises(ConfigError, match=why):
        train(compose([*given, *[m for m in more if not m.startswith("~")]]))


def test_a_context_that_no_answer_fits_is_a_matter_of_the_data(file: Path) -> None:
    with pytest.raises(DataError, match=r"none fits model\.context_length=4"):
        train(compose(overrides(file, "model.context_length=4", "trainer.batch_tokens=8")))


def test_new_tokens_are_never_frozen(file: Path, base: Run) -> None:
    given = ["data/corpus=chat", f"data.corpus.path={file}", "objective=sft", f"trainer.init_from={base.identity}", "tracker=none"]
    for more in ((), ("objective.lora_rank=2",)):
        with pytest.raises(ConfigError, match=r"objective\.embeddings=freeze: \d+ tokens are new to this model"):
            train(compose([*given, *more, "objective.embeddings=freeze"]))


def test_adapters_beside_experts_are_refused(file: Path) -> None:
    given = overrides(file, "objective.lora_rank=2")
    with pytest.raises(ConfigError, match=r"holds the matrices of many experts.*lora_targets=\[attention\]"):
        train(compose([*given, "model/ffn=moe"]))
    assert train(compose([*given, "model/ffn=moe", "objective.lora_targets=[attention]", "trainer.budget=2steps"])).state == "done"


def test_a_batch_without_a_scored_token_is_passed_over(file: Path) -> None:
    from gptlab.objective.protocol import Objective

    class Masked(SFT):
        def experience(self, training: Any, drawn: Batch) -> Batch:
            assert drawn.weight is not None
            return Batch(drawn.inputs, drawn.targets, drawn.weight * (training.number != 1 or self.passed), drawn.document)

        passed = False

        def __call__(self, model: Transformer, batch: Batch) -> Tensor:
            self.passed = self.passed or batch.token_weight == 0
            return super().__call__(model, batch)

    from gptlab.config.registry import component

    factory = component("objective", "sft")
    assert issubclass(Masked, Objective)
    object.__setattr__(factory, "factory", Masked)
    try:
        made = train(compose(overrides(file, "study=masked", "trainer.log_every=1"))).run
    finally:
        object.__setattr__(factory, "factory", SFT)
    lines = [json.loads(line) for line in (made.directory / "passed.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["none of its tokens is scored"]
    assert all(np.isfinite(m["train/loss"]) for m in made.metrics() if "train/loss" in m)


def test_the_memory_of_adapters_and_of_pairs_is_forecast(file: Path) -> None:
    def total(*more: str) -> int:
        return forecast_memory(resolve(compose(overrides(file, *more)), machine()), 263).total

    for more in ((), ("objective.lora_rank=4",), ("objective.embeddings=freeze",), ("objective=dpo", "data/corpus=preferences")):
        assert total(*more) > 0
