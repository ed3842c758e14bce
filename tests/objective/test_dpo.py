"""Preferences: the papers' formulas by hand, whole answers and nothing else, a first model that is asked once, margins that grow."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError
from gptlab.data.conversations import Conversations
from gptlab.data.loader import batch_of
from gptlab.data.prepare import prepare
from gptlab.objective import dpo, preference
from gptlab.objective.dpo import DPO, REFERENCE, _crossed, answer_lengths, answer_sums, located
from gptlab.runner.checkpoint import checkpoints, step_of
from gptlab.runner.run import Run
from tests.data.test_conversations import chats, written

CONTEXT = 96


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_losses_are_those_of_the_papers_by_hand() -> None:
    # Two pairs: log π/π₀ of the chosen answers 1 and -2, of the rejected ones -1 and 0.5; β = 0.5.
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 0.5])
    margin = chosen - rejected  # 2 and -2.5
    torch.testing.assert_close(preference.dpo(margin, 0.5), torch.tensor([-math.log(sigmoid(1.0)), -math.log(sigmoid(-1.25))]))
    smoothed = [
        -0.9 * math.log(sigmoid(1.0)) - 0.1 * math.log(sigmoid(-1.0)),
        -0.9 * math.log(sigmoid(-1.25)) - 0.1 * math.log(sigmoid(1.25)),
    ]
    torch.testing.assert_close(preference.dpo(margin, 0.5, 0.1), torch.tensor(smoothed))
    torch.testing.assert_close(preference.ipo(margin, 0.5), torch.tensor([1.0, 12.25]))  # (2 - 1)², (-2.5 - 1)²
    z = torch.tensor(0.2)
    by_hand = [
        (1 - sigmoid(0.5 * (1.0 - 0.2)) + 1 - sigmoid(0.5 * (0.2 + 1.0))) / 2,
        (1 - sigmoid(0.5 * (-2.0 - 0.2)) + 1 - sigmoid(0.5 * (0.2 - 0.5))) / 2,
    ]
    torch.testing.assert_close(preference.kto(chosen, rejected, 0.5, z), torch.tensor(by_hand))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"say {i % 7}", "chosen": "yes, " * (i % 3) + "yes", "rejected": "no " * (i % 4 + 1)} for i in range(80)]
    return written(tmp_path_factory.mktemp("pairs"), rows)


@pytest.fixture
def base(tmp_path: Path) -> Run:
    text = written(tmp_path, chats(40, turns=1, longest=4))
    return train(
        compose([*SIZES, "data/corpus=chat", "data/tokenizer=chat", f"data.corpus.path={text}", "objective=sft", "study=base"])
    ).run


SIZES = ["tracker=none", "model.width=32", "model.heads=2", "model.depth=1", f"model.context_length={CONTEXT}", "trainer.batch_tokens=384",
         "trainer.budget=6steps", "callbacks.samples.tokens=4", "trainer.log_every=1"]  # fmt: skip


def pairs_of(file: Path, base: Run, *more: str) -> list[str]:
    return [
        "data/corpus=preferences", f"data.corpus.path={file}", "objective=dpo", f"trainer.init_from={base.identity}", "tracker=none",
        "trainer.batch_tokens=384", "trainer.budget=12steps", "callbacks.samples.tokens=4", "trainer.log_every=1",
        "optimizer.learning_rate=0.01", *more,
    ]  # fmt: skip


def test_an_answers_log_probability_is_that_of_its_tokens_whatever_lies_beside_it(file: Path, base: Run) -> None:
    data = prepare(compose(pairs_of(file, base)).data)
    rows = Conversations(data, "train", CONTEXT, 0, "cut")
    model = load(base).model
    found = rows.fetch(np.arange(3), True)
    sums = answer_sums(model, located(batch_of(found)))
    for row in range(3):
        for place, pair in enumerate(found.extra["pair"][row]):
            for side in range(2):
                if pair < 0:
                    continue
                chat = 2 * int(pair) + side
                text = torch.from_numpy(rows.stream.window(int(rows.starts[chat]), int(rows.fitted.lengths[chat])))
                own = torch.from_numpy(rows.own.window(int(rows.starts[chat]), int(rows.fitted.lengths[chat])) == 1)
                with torch.no_grad():
                    each = model(text[None, :-1])[0].log_softmax(-1).gather(-1, text[1:, None])[:, 0]
                assert sums[row, place, side].item() == pytest.approx(each[own[1:]].sum().item(), abs=1e-3)


def test_without_gradients_never_more_logits_are_held_than_the_bound(file: Path, base: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare(compose(pairs_of(file, base)).data)
    model = load(base).model
    batch = located(batch_of(Conversations(data, "train", CONTEXT, 0, "cut").fetch(np.arange(3), True)))
    whole = answer_sums(model, batch)
    asked: list[int] = []
    monkeypatch.setattr("gptlab.model.transformer.LOGITS_AT_ONCE", 50 * model.vocabulary)
    model.head.register_forward_hook(lambda _, __, logits: asked.append(logits.numel()))
    with torch.no_grad():
        by_parts = answer_sums(model, batch)
    assert len(asked) > 3
    assert max(asked) <= 50 * model.vocabulary
    torch.testing.assert_close(by_parts, whole.detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_the_better_answers_become_likelier_than_the_worse_ones(file: Path, base: Run, loss: str) -> None:
    made = train(compose(pairs_of(file, base, f"objective.loss={loss}"))).run
    lines = [m for m in made.metrics() if "train/loss" in m]
    if loss == "dpo":
        assert lines[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4), "at first it is the first model"
    assert lines[0]["train/reward_margin"] == pytest.approx(0, abs=1e-4)
    assert made.metrics()[-1]["val/reward_margin"] > 0
    assert made.metrics()[-1]["val/reward_accuracy"] > 0.9
    assert {"val/preference_loss", "val/loss", "val/reward_chosen"} <= made.metrics()[-1].keys()


def test_the_first_model_is_asked_once_and_its_word_is_kept(file: Path, base: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = pairs_of(file, base, "callbacks.checkpoint.every=6")
    whole = train(compose(given)).run
    expected = load(whole).model.state_dict()

    def back_to_six() -> None:
        for folder in checkpoints(whole.checkpoints):
            if step_of(folder) > 6:
                shutil.rmtree(folder)
        (whole.directory / "done.json").unlink()

    back_to_six()
    kept = (whole.directory / REFERENCE).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(DPO, "_compute", lambda *_: pytest.fail("it was asked again"))
        again = train(compose(given)).run
    assert all(torch.equal(load(again).model.state_dict()[name], tensor) for name, tensor in expected.items())
    back_to_six()
    (whole.directory / REFERENCE).write_bytes(b"broken")
    train(compose(given))
    assert (whole.directory / REFERENCE).read_bytes() == kept, "what cannot be read is made anew, by the first model and not by that of now"


def test_the_chosen_answers_own_loss_may_be_added(file: Path, base: Run) -> None:
    data = prepare(compose(pairs_of(file, base)).data)
    batch = located(batch_of(Conversations(data, "train", CONTEXT, 0, "cut").fetch(np.arange(3), True)))
    there = batch.extra["pair"] >= 0
    batch.extra["reference"] = torch.zeros(*there.shape, 2)
    model = load(base).model
    with torch.no_grad():
        alone, together = (float(DPO(nll_weight=weight)(model, batch)) for weight in (0.0, 0.5))
        sums = answer_sums(model, batch)[..., 0]
    lengths = answer_lengths(batch)[..., 0]
    document, answer = batch.document, batch.extra["answer"]
    assert document is not None
    for row in range(len(there)):
        for place in range(int(there[row].sum())):
            assert lengths[row, place] == (answer[row] & (document[row] == 2 * place)).sum()
    assert together - alone == pytest.approx(-0.5 * float((sums[there] / lengths[there]).sum()), rel=1e-5)


def test_with_their_own_loss_the_chosen_answers_stay_likely(file: Path, base: Run) -> None:
    ends = [train(compose(pairs_of(file, base, f"objective.nll_weight={weight}"))).run.metrics()[-1] for weight in (0, 1)]
    assert ends[1]["val/loss"] < ends[0]["val/loss"] - 0.1
    assert ends[1]["val/reward_accuracy"] > 0.9


def test_adapters_learn_preferences_too(file: Path, base: Run) -> None:
    made = train(compose(pairs_of(file, base, "objective.lora_rank=4"))).run
    assert made.metrics()[-1]["val/reward_margin"] > 0


def test_kto_crosses_questions_with_the_answers_of_others(file: Path, base: Run) -> None:
    data = prepare(compose(pairs_of(file, base)).data)
    rows = Conversations(data, "train", CONTEXT, 0, "cut")
    batch = batch_of(rows.fetch(np.arange(2), True))
    crossed = _crossed(batch)
    count = int((batch.extra["pair"] >= 0).sum())
    assert len(crossed.inputs) == count

    def spelt(row: Any, mask: Any) -> str:
        return data.tokenizer.decode(row[mask].tolist())

    chosen = [spelt(batch.targets[r], batch.extra["answer"][r] & (batch.document[r] == 2 * p))  # type: ignore[index]
              for r in range(2) for p in range(int((batch.extra["pair"][r] >= 0).sum()))]  # fmt: skip
    assert [spelt(crossed.targets[i], crossed.extra["answer"][i]) for i in range(count)] == [*chosen[1:], chosen[0]]


def test_how_far_kto_has_come_is_measured_without_dropout_in_micro_batches(file: Path, base: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []

    def read(model: Any, batch: Any, training: Any) -> Any:
        seen.append((model.training, len(batch.inputs)))
        return plain(model, batch, training)

    plain = dpo._sums
    monkeypatch.setattr(dpo, "_sums", read)
    train(compose(pairs_of(file, base, "objective.loss=kto", "hardware.micro_batch=1", "model.dropout=0.2", "trainer.budget=2steps")))
    crossed = [rows for _, rows in seen[:]]
    assert not any(training for training, _ in seen)
    assert crossed.count(1) > 8, "pairs of a batch, one at a time"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["objective.beta=0"], "objective.beta=0.0 must be above 0"),
        (["objective.smoothing=0.5"], "objective.smoothing=0.5 must be at least 0 and below 0.5"),
        (["objective.nll_weight=-1"], "objective.nll_weight=-1.0 must be at least 0"),
        (["objective.loss=ipo", "objective.smoothing=0.1"], "is for objective.loss=dpo"),
        (["objective=sft"], "pairs of a better and a worse answer, which objective=dpo learns from"),
        (["data/corpus=pydocs"], "objective=dpo learns from pairs of answers"),
    ],
)
def test_what_means_nothing_is_refused(file: Path, base: Run, more: list[str], why: str) -> None:
    given = [o for o in pairs_of(file, base) if not ("path" in o and more[0] == "data/corpus=pydocs")]
    with pytest.raises(ConfigError, match=why):
        train(compose([*given, *more]))


def test_without_a_first_model_there_is_nothing_to_compare_with_but_its_own_beginning(file: Path) -> None:
    made = train(compose([*SIZES, "data/corpus=preferences", "data/tokenizer=chat", f"data.corpus.path={file}", "objective=dpo"])).run
    assert json.loads((made.directory / "done.json").read_text())["summary"]["val/reward_accuracy"] > 0.5
