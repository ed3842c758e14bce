"""GRPO: the loss by hand, its gradient beside plain REINFORCE's, and whole runs: the same seed, a stop in the middle, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab import compose, train
from gptlab.config.codec import identity
from gptlab.config.errors import ConfigError, DataError, Stopped
from gptlab.config.record import Recording
from gptlab.config.registry import build, component, register
from gptlab.config.resolve import resolve
from gptlab.data.loader import Batch
from gptlab.data.problems import Problem
from gptlab.data.synthetic import Addition
from gptlab.data.tokenizer import CharTokenizer
from gptlab.hardware.device import machine
from gptlab.model.transformer import Transformer, new_model
from gptlab.objective.grpo import GRPO, Ragged
from gptlab.objective.protocol import Objective, hooked
from gptlab.objective.reward import Reward, Sample
from gptlab.objective.rollout import as_batch, roll_out
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.memory import forecast_memory
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from tests.signals import SignalAt

GROUP = 4


def overrides(*more: str, steps: int = 6) -> list[str]:
    """A run of one-digit sums by a model that knows nothing: four prompts of four samples a step."""
    return [
        "data=addition", "data.corpus.digits=1", "objective=grpo", f"objective.group={GROUP}", "objective.checked=8", "objective.shown=1",
        "+objective/reward@objective.rewards.close=close", "model.width=16", "model.depth=1", "model.heads=2", "model.context_length=7",
        f"trainer.batch_tokens={7 * 4 * GROUP}", f"trainer.budget={steps}steps", "trainer.log_every=1", "data.validation_tokens=70",
        "tracker=none", *more,
    ]  # fmt: skip


@register("objective/reward", "close")
def close(*, fails: str = "") -> Reward:
    """How many digits are right; something that differs between samples of a model that knows nothing. `fails`: how it does."""

    def reward(sample: Sample) -> float:
        if fails == "raises":
            raise ValueError("no such luck")
        if fails == "nan":
            return math.nan
        return float(sum(map(str.__eq__, sample.completion, sample.reference))) + (sample.completion < "5")

    return reward


@register("objective/reward", "equal")
def equal() -> Reward:
    """The same for all."""
    return lambda sample: 1.0


@pytest.fixture(autouse=True)
def _fresh_signal() -> None:
    SignalAt.fired = False


def model(dropout: float = 0.0) -> Transformer:
    small = ["model=nano", "model.width=16", "model.depth=1", "model.heads=2", "model.context_length=7", f"model.dropout={dropout}"]
    return new_model(compose(small).model, 13, seed=0)


def samples(of: Transformer, count: int = 5, *, group: int = GROUP) -> tuple[Batch, Tensor]:
    task, tokenizer = Addition(digits=1), CharTokenizer()
    tokenizer.fit([task.alphabet])
    seeds = [[group * i + j for j in range(group)] for i in range(count)]
    made = roll_out(of, task.problems(range(count), 0), tokenizer, seeds, temperature=1.0, max_tokens=0, at_once=8)
    return as_batch(made, documents=False)


def gradients(of: Transformer, loss: Tensor) -> Tensor:
    of.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in of.parameters() if p.grad is not None])


class Fixed:
    """A model whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __call__(self, inputs: Tensor, *, document: Any, losses: Any, reduce: Callable[[Tensor, Any], Tensor]) -> Tensor:
        return reduce(self._logits, self)

    def logits(self, features: Tensor) -> Tensor:
        return features


def test_the_loss_is_that_of_the_paper_by_hand() -> None:
    # Two rows, two places, two tokens; the first row's second place is no part of its completion.
    p = torch.tensor([[0.6, 0.5], [0.3, 0.8]])  # of the token that was drawn
    old = torch.tensor([[0.4, 0.5], [0.5, 0.5]])
    reference = torch.tensor([[0.3, 0.5], [0.3, 0.4]])
    logits = torch.stack((p, 1 - p), -1).log()
    extra = {
        "advantage": torch.tensor([1.0, -2.0]),
        "share": torch.tensor([[1.0, 0], [0.5, 0.5]]),
        "old": old.log(),
        "reference": reference.log(),
    }
    batch = Batch(torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long), extra["share"], None, extra)
    objective = GRPO(clip=0.2, clip_high=0.3, kl=0.1, normalisation="sequence")
    gains = [min(1.5, 1.3) * 1.0, min(0.6 * -2, 0.8 * -2), min(1.6 * -2, 1.3 * -2)]
    apart = [0.5 - math.log(0.5) - 1, 0.0, 0.5 - math.log(0.5) - 1]
    expected = 1.0 * (-gains[0] + 0.1 * apart[0]) + 0.5 * (-gains[1] + 0.1 * apart[1]) + 0.5 * (-gains[2] + 0.1 * apart[2])
    told = Recording(True)
    with told:
        loss = objective(Fixed(logits), batch)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    found = told.metrics({})
    assert found["train/clipped"] == pytest.approx(2 / 3), "the first since it rose too far, the second since it fell too far"
    assert found["train/kl"] == pytest.approx(sum(apart) / 3, rel=1e-5)
    entropy = [-(q * math.log(q) + (1 - q) * math.log(1 - q)) for q in (0.6, 0.3, 0.8)]
    assert found["train/entropy"] == pytest.approx(sum(entropy) / 3, rel=1e-5)


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_is_plain_reinforce_with_the_advantage(normalisation: str, temperature: float) -> None:
    made = model(dropout=0.3).train()
    batch, mask = samples(made)
    advantage = torch.randn(len(mask), generator=torch.Generator().manual_seed(0))
    share = {"token": mask, "sequence": mask / mask.sum(1, keepdim=True), "constant": mask / 7}[normalisation]
    batch.weight, batch.extra = mask, {"advantage": advantage, "share": share}
    torch.manual_seed(0)
    found = gradients(made, build(component("objective", "grpo").options(temperature=temperature))(made, batch))
    torch.manual_seed(0)  # the same dropout
    log = F.log_softmax(made(batch.inputs) / temperature, -1)
    plain = sum(-advantage[i] * share[i, t] * log[i, t, batch.targets[i, t]] for i, t in mask.nonzero().tolist())
    assert isinstance(plain, Tensor)
    torch.testing.assert_close(found, gradients(made, plain), rtol=1e-5, atol=2e-6)


def test_parts_of_a_batch_add_up_to_all_of_it() -> None:
    made = model()
    batch, mask = samples(made)
    extra = {"advantage": torch.randn(len(mask), generator=torch.Generator().manual_seed(0)), "share": mask}
    extra |= {"old": torch.full(mask.shape, -2.5), "reference": torch.full(mask.shape, -2.0)}
    batch.weight, batch.extra = mask, extra
    objective = GRPO(kl=0.1)
    whole = objective(made, batch)
    parts = [objective(made, part) for part in batch.split(7)]
    assert len(parts) == 3
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(gradients(made, sum(parts)), gradients(made, objective(made, batch)), rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


def test_rows_hold_prompt_and_completion_and_score_the_completion_alone() -> None:
    made = model()
    batch, mask = samples(made, 2, group=3)
    alphabet = Addition(digits=1).alphabet
    for i in range(6):
        row = [*batch.inputs[i].tolist(), int(batch.targets[i, -1])]
        text = "".join(alphabet[t] for t in row)
        assert text[3] == "=", text
        assert mask[i].tolist() == [0, 0, 0, 1, 1], "the two digits of the answer"
    assert torch.equal(batch.inputs[0, :4], batch.inputs[2, :4]), "a group has one prompt"
    assert not torch.equal(batch.inputs[0, :4], batch.inputs[3, :4])


def test_what_one_sample_draws_does_not_depend_on_how_many_are_made_at_once() -> None:
    made, tokenizer = model(), CharTokenizer()
    task = Addition(digits=1)
    tokenizer.fit([task.alphabet])
    problems = [*task.problems(range(3), 0), Problem("1+1=2$3+", "4")][:3]
    seeds = [[5, 6], [7, 8], [9, 10]]
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 0}
    together = roll_out(made, problems, tokenizer, seeds, at_once=100, **options)
    for at_once in (1, 4):
        assert roll_out(made, problems, tokenizer, seeds, at_once=at_once, **options) == together
    assert [r.completion for r in together[2:4]] == [
        r.completion for r in roll_out(made, problems[1:2], tokenizer, seeds[1:2], at_once=9, **options)
    ]


def test_an_answer_ends_by_itself_or_where_there_is_no_more_room() -> None:
    made, tokenizer = model(), CharTokenizer()
    tokenizer.fit([Addition().alphabet])
    (long,) = roll_out(made, [Problem("1+1=", "2")], tokenizer, [[0]], temperature=1.0, max_tokens=0, at_once=1)
    assert len(long.completion) == 8 - 4
    assert not long.sample.ended
    (short,) = roll_out(made, [Problem("1+1=", "2")], tokenizer, [[0]], temperature=1.0, max_tokens=2, at_once=1)
    assert short.completion == long.completion[:2]
    (known,) = roll_out(made, [Problem("1+1=", "02", tokens=2)], tokenizer, [[0]], temperature=1.0, max_tokens=1, at_once=1)
    assert known.sample.ended
    tokenizer.end_of_text = long.completion[1]  # type: ignore[assignment]
    (ended,) = roll_out(made, [Problem("1+1=", "2")], tokenizer, [[0]], temperature=1.0, max_tokens=0, at_once=1)
    if long.completion[0] != long.completion[1]:
        assert ended.completion == long.completion[:2], "the token that ends it is trained on"
        assert (ended.sample.completion, ended.sample.ended) == (tokenizer.decode(long.completion[:1]), True)
    with pytest.raises(ConfigError, match=r"the prompt '1\+1=1\+1=' has 8 tokens, and model\.context_length=7 leaves no room"):
        roll_out(made, [Problem("1+1=1+1=", "2")], tokenizer, [[0]], temperature=1.0, max_tokens=0, at_once=1)


def rollouts(run: Run) -> dict[str, list[dict[str, Any]]]:
    return {
        f.name: [json.loads(line) for line in f.read_text().splitlines()] for f in sorted((run.directory / "samples").glob("rollouts-*"))
    }


def weights(run: Run) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in checkpoint.load_model(checkpoint.require_good(run.checkpoints)).items()}


def trained(*more: str, steps: int = 6) -> Run:
    return train(compose(overrides(*more, steps=steps))).run


def test_a_run_learns_from_its_own_samples_and_the_same_seed_draws_them_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = trained("objective.kl=0.05")
    found = rollouts(run)
    assert list(found) == [f"rollouts-{step:09d}.jsonl" for step in range(1, 7)]
    for lines in found.values():
        assert len(lines) == 4 * GROUP
        for group in range(4):
            own = lines[group * GROUP : (group + 1) * GROUP]
            assert len({line["prompt"] for line in own}) == 1
            assert sum(line["advantage"] for line in own) == pytest.approx(0, abs=1e-5)
            mean = sum(line["reward"] for line in own) / GROUP
            assert all((line["advantage"] > 0) == (line["reward"] > mean) for line in own)
    assert len({line["prompt"] for lines in found.values() for line in lines}) > 10, "each step has other prompts"
    metrics = run.metrics()
    steps = [m for m in metrics if "train/loss" in m]
    for line, lines in zip(steps, found.values(), strict=True):
        assert line["train/reward"] == pytest.approx(sum(x["reward"] for x in lines) / len(lines))
        assert line["train/completion_tokens"] == 2
        assert line["train/ended"] == 1
        assert {"train/reward_std", "train/flat_groups", "train/clipped", "train/entropy"} < line.keys()
        assert line["train/clipped"] == 0, "the ratio of a first update is 1"
        assert line["tokens"] == line["step"] * 7 * 4 * GROUP
    assert steps[0]["train/kl"] == 0
    assert steps[-1]["train/kl"] > 0
    measured = {m["step"]: m for m in metrics if "val/solved" in m}
    assert min(measured) == 0, "where it began"
    assert "val/loss" not in measured[0]
    assert measured[6].keys() >= {"val/loss", "val/solved", "val/reward", "val/ended"}
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "other"))
    again = trained("objective.kl=0.05")
    assert rollouts(again) == found
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(run).items())
    assert rollouts(trained("objective.kl=0.05", "seeds.dropout=1"))["rollouts-000000001.jsonl"] != found["rollouts-000000001.jsonl"]


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_that_stops_between_two_updates_of_one_rollout_goes_on_with_it(
    step: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("objective.updates=2", "objective.clip=0.05", "optimizer.learning_rate=0.05", "schedule.warmup=1")
    whole = trained(*options)
    assert list(rollouts(whole)) == [f"rollouts-{n:09d}.jsonl" for n in (1, 3, 5)]
    lines = {m["step"]: m for m in whole.metrics() if "train/loss" in m}
    assert [lines[n]["train/clipped"] for n in (1, 3, 5)] == [0, 0, 0], "the first update has a ratio of 1"
    assert any(lines[n]["train/clipped"] > 0 for n in (2, 4, 6)), "the second has moved away"
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "other"))
    stopped = overrides(*options, "+callback@callbacks.stop=signal_at", f"callbacks.stop.step={step}")
    with pytest.raises(Stopped):
        train(compose(stopped))
    second = train(compose(stopped)).run
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())
    told = {m["step"]: m["train/loss"] for m in second.metrics() if "train/loss" in m}
    assert told == {n: m["train/loss"] for n, m in lines.items()}


@register("callback", "spy_updates")
class SpyUpdates(Callback):
    """Keeps the likelihoods that a rollout was given, beside those of the training's own pass."""

    found: list[tuple[Tensor, Tensor]] = []  # noqa: RUF012

    def on_step(self, trainer: Trainer) -> None:
        objective: Any = trainer.objective
        batch = objective._rolled_out(trainer)
        trainer.model.train()
        logits = torch.cat([trainer.model(part.inputs) for part in batch.split(trainer.micro_batch)])
        own = logits.float().div(objective.temperature).log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
        self.found.append((batch.extra["old"], own.detach()))


def test_the_old_likelihoods_are_those_of_the_training_pass() -> None:
    SpyUpdates.found.clear()
    trained("objective.updates=2", "objective.temperature=0.8", "hardware.micro_batch=8", "+callback@callbacks.spy=spy_updates", steps=2)
    for old, own in SpyUpdates.found:
        torch.testing.assert_close(old, own, rtol=0, atol=1e-6)


def test_flat_groups_teach_nothing_and_are_counted() -> None:
    run = trained(
        "~objective/reward@objective.rewards.close", "+objective/reward@objective.rewards.equal=equal", "optimizer.weight_decay=0", steps=3
    )
    for line in (m for m in run.metrics() if "train/loss" in m):
        assert line["train/flat_groups"] == 1
        assert line["train/loss"] == line["train/gradient_norm"] == line["train/reward_std"] == 0
        assert line["train/reward"] == 1
    start = new_model(run.config().model, 13, seed=0)
    assert all(torch.equal(value, dict(start.named_parameters())[name]) for name, value in weights(run).items())


def test_rewards_are_summed_by_weight_and_told_apart() -> None:
    more = ("+objective/reward@objective.rewards.equal=equal", "+objective.weights.equal=-0.5", "+objective.weights.close=2")
    run = trained(*more, steps=2)
    for line in (m for m in run.metrics() if "train/loss" in m):
        assert line["train/reward/equal"] == 1
        assert line["train/reward"] == pytest.approx(2 * line["train/reward/close"] - 0.5)
    first = rollouts(run)["rollouts-000000001.jsonl"][0]
    assert first["reward"] == 2 * first["reward/close"] - 0.5 * first["reward/equal"]


def test_what_is_solved_is_what_the_reward_for_right_answers_says() -> None:
    number = component("objective/reward", "exact_answer").options(compare="number")
    length = component("objective/reward", "length").options()
    for rewards, right in (({"short": length, "right": number}, 1.0), ({"short": length}, 0.0), ({}, 0.0)):
        assert GRPO(rewards=rewards).right(Sample("6 * 7?", "It is 42.", "42")) == right


def test_a_reinforce_run_needs_no_group() -> None:
    run = trained("objective.group=1", "objective.baseline=none", "objective.by_deviation=false", steps=2)
    for lines in rollouts(run).values():
        assert all(line["advantage"] == line["reward"] for line in lines)


def test_a_reward_that_fails_ends_the_run_and_names_the_sample() -> None:
    said = r"objective\.rewards\.close raised ValueError: no such luck for the completion '.*' of the prompt '\d\+\d='"
    with pytest.raises(DataError, match=said) as error:
        trained("objective.rewards.close.fails=raises", "objective.checked=0")
    assert error.value.code == 3
    with pytest.raises(DataError, match=r"objective\.rewards\.close is nan for the completion"):
        trained("objective.rewards.close.fails=nan", "objective.checked=0")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["objective.group=1"], r"objective\.group=1 must be at least 2: a sample is judged beside the others"),
        (["objective.group=3"], r"trainer\.batch_tokens=112 makes 16 completions, .* of objective\.group=3; try 105"),
        (["objective.temperature=0"], r"objective\.temperature=0\.0 must be above 0 and finite"),
        (["objective.clip=0"], r"objective\.clip=0\.0 must be between 0 and 1"),
        (["objective.clip_high=0.1"], r"clip_high=0\.1 0 or at least as large"),
        (["objective.kl=-1"], r"objective\.kl=-1\.0 must be at least 0 and finite"),
        (["objective.updates=0"], r"objective\.updates=0 must be at least 1"),
        (["objective.normalisation=rows"], r"objective\.normalisation=rows is not one of token, sequence, constant"),
        (["+objective.weights.clse=1"], r"objective\.weights\.clse: there is no such reward \(did you mean close\?\); there are close"),
        (["+objective.weights.close=inf"], r"objective\.weights\.close=inf must be finite"),
        (["objective.updates=2", "model.dropout=0.1"], r"objective\.updates=2 compares likelihoods, which dropout would change"),
        (["data=copy", "model.context_length=16", "trainer.batch_tokens=128"], r"data/corpus=copy has no problems with answers"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_said(more: list[str], said: str) -> None:
    given = [o for o in overrides() if not ("data=copy" in more and o.startswith("data"))]
    with pytest.raises(ConfigError, match=said):
        train(compose([*given, *more]))


def test_what_is_only_shown_or_checked_is_no_part_of_an_identity() -> None:
    plain, told, other = (compose(overrides(*more)) for more in ((), ("objective.shown=3", "objective.checked=9"), ("objective.clip=0.1",)))
    assert identity(plain, "x", {}) == identity(told, "x", {}) != identity(other, "x", {})


def test_a_group_of_one_on_sharded_weights_is_refused() -> None:
    class Told:
        config = compose([*overrides(), "hardware/strategy=fsdp"])
        world = None

    objective: Objective = build(Told.config.objective)
    Told.world = type("World", (), {"size": 2})()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"objective=grpo writes with whole weights: hardware/strategy=fsdp has none; use single or ddp"):
        objective.begin(Told())  # type: ignore[arg-type]


def test_a_micro_batch_ends_behind_what_it_scores_and_the_loss_is_the_same() -> None:
    tokens = torch.randint(13, (4, 8), generator=torch.Generator().manual_seed(0))
    share = torch.zeros(4, 7)
    for row, (start, end) in enumerate(((3, 7), (2, 5), (1, 3), (1, 2))):
        share[row, start:end] = 1
    given = (tokens[:, :-1], tokens[:, 1:], share, None, {"advantage": torch.tensor([1.0, -2.0, 0.5, 3.0]), "share": share})
    parts = Ragged(*given).split(2)
    assert [part.inputs.shape[1] for part in parts] == [7, 3]
    assert [part.extra["share"].shape[1] for part in parts] == [7, 3]
    objective, own = GRPO(checked=0), model()
    whole = objective(own, Batch(*given))
    torch.testing.assert_close(sum(objective(own, part) for part in parts), whole)
    assert [part.inputs.shape[1] for part in Batch(*given).split(2)] == [7, 7], "other rows keep their length"


@pytest.mark.parametrize("more", [(), ("objective.kl=0.1", "objective.updates=2")])
def test_memory_is_forecast_of_the_rows_that_are_trained_on(more: tuple[str, ...]) -> None:
    config = resolve(compose(overrides(*more, "hardware.device=cpu")), machine())
    assert forecast_memory(config, 13, process=0).activations > 0, "a step of it runs without memory"
    rows = Batch(torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long))
    shaped = hooked(build(config.objective)).outlined(rows)
    assert {"old", "reference"} <= shaped.extra.keys() if more else shaped.extra.keys() == {"advantage", "share"}


def test_the_callback_measures_what_another_objective_solves() -> None:
    given = [o for o in overrides(steps=2) if "objective" not in o]
    run = train(compose([*given, "+callback@callbacks.problems=problems", "callbacks.problems.every=1", "callbacks.problems.count=10"])).run
    found = {m["step"]: (m["val/solved"], m["val/ended"]) for m in run.metrics() if "val/solved" in m}
    assert list(found) == [1, 2]
    assert all(0 <= solved <= ended == 1 for solved, ended in found.values())
