"""Callbacks norms, activations and attention: what they measure is right, changes nothing, and says what it costs."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptlab import compose, train
from gptlab.config.errors import ConfigError
from gptlab.config.registry import build, register
from gptlab.config.registry import component as component_named
from gptlab.data.loader import held_out_batches
from gptlab.runner.callback import Callback
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from tests.faulty import weights_hash
from tests.ranks import Job, trained
from tests.tiny import tiny

ALL = [f"+callback@callbacks.{name}={name}" for name in ("norms", "activations", "attention")]
NORMS, ACTIVATIONS, ATTENTION = ALL
TRAINERS: list[Trainer] = []


@register("callback", "keep_trainer")
class KeepTrainer(Callback):
    """Keeps hold of the trainer, to look at its model; may slow the hook before each update, or silence hidden units."""

    def __init__(self, *, sleep: float = 0.0, silence: int = 0, hide: int = -1) -> None:
        self.sleep, self.silence, self.hide = sleep, silence, hide

    def on_start(self, trainer: Trainer) -> None:
        TRAINERS.append(trainer)
        blocks: Any = trainer.model.blocks
        if self.silence:
            with torch.no_grad():
                blocks[0].ffn.up.bias[: self.silence] = -1000.0
        if self.hide >= 0:
            blocks[self.hide].attention = _Hidden(blocks[self.hide].attention)

    def before_update(self, trainer: Trainer) -> None:
        time.sleep(self.sleep)


class _Hidden(nn.Module):
    """An attention that shows no kernel."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.kv_heads, self.head_width = inner, inner.kv_heads, inner.head_width

    def forward(self, x: Tensor, context: Any) -> Tensor:
        out: Tensor = self.inner(x, context)
        return out


KEEP = "+callback@callbacks.keep=keep_trainer"


@pytest.fixture(autouse=True)
def _trainers() -> Iterator[None]:
    yield
    TRAINERS.clear()


def found(run: Run, prefix: str) -> dict[int, dict[str, float]]:
    """By step, what stands under a prefix in metrics.jsonl, less the time it took."""
    lines = {m["step"]: {k: v for k, v in m.items() if k.startswith(prefix)} for m in run.metrics() if f"{prefix}milliseconds" in m}
    for line in lines.values():
        assert line.pop(f"{prefix}milliseconds") > 0
    return lines


def test_they_change_no_number_of_the_training(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiny(corpus_file, "model.dropout=0.2", "model.depth=2", "hardware.micro_batch=2")
    plain = train(compose(own)).run
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "watched"))
    every = [f"callbacks.{name}.every=2" for name in ("norms", "activations", "attention")]
    watched = train(compose([*own, *ALL, KEEP, *every, "callbacks.norms.per_layer=true", "callbacks.attention.per_head=true"])).run
    assert watched.identity == plain.identity
    assert weights_hash(watched) == weights_hash(plain)
    losses = [[(m["step"], m["train/loss"]) for m in r.metrics() if "train/loss" in m] for r in (plain, watched)]
    assert losses[0] == losses[1]
    for prefix in ("norm/", "activation/", "attention/"):
        assert list(found(watched, prefix)) == [1, 2, 4, 6, 8, 10, 12]
    model = TRAINERS[0].model
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "hooks are there while needed alone"
    assert {type(block.attention.kernel).__name__ for block in model.blocks} == {"SDPA"}


def test_norms_are_those_of_gradients_weights_and_their_change(corpus_file: Path) -> None:
    sgd = ["optimizer=sgd", "optimizer.learning_rate=0.25", "optimizer.weight_decay=0", "optimizer.momentum=0", "schedule=constant"]
    own = tiny(corpus_file, *sgd, "schedule.warmup=0", NORMS, "callbacks.norms.every=1", "callbacks.norms.per_layer=true", "model.depth=2")
    own += [KEEP, "trainer.gradient_clip=1", "hardware.micro_batch=1"]
    run = train(compose(own)).run
    lines, model = found(run, "norm/"), TRAINERS[0].model
    clipped = {m["step"]: min(1.0, m["train/gradient_norm"]) for m in run.metrics() if "train/loss" in m}
    roles = set(model.roles().values())
    assert roles == {"matrix", "embedding", "gain", "bias"}
    for step, line in lines.items():
        total = math.sqrt(sum(line[f"norm/gradient/{role}"] ** 2 for role in roles))
        assert total == pytest.approx(clipped[step], rel=1e-4), "after clipping"
        for label in (*roles, "layer/0", "layer/1"):  # of plain gradient descent the change is the rate times the gradient
            assert line[f"norm/update/{label}"] == pytest.approx(0.25 * line[f"norm/gradient/{label}"], rel=2e-3)
            if line[f"norm/weight/{label}"]:
                ratio = line[f"norm/update/{label}"] / line[f"norm/weight/{label}"]
                assert line[f"norm/relative_update/{label}"] == pytest.approx(ratio)
    assert lines[1]["norm/weight/bias"] == 0
    assert "norm/relative_update/bias" not in lines[1], "nothing is no measure"
    sizes: dict[str, list[Tensor]] = {}
    for path, value in model.named_parameters():
        sizes.setdefault(model.roles()[path], []).append(value.detach().flatten())
        if path.startswith("blocks.1."):
            sizes.setdefault("layer/1", []).append(value.detach().flatten())
    train(compose([*own, "trainer.budget=13steps"]))  # whose last step begins where the other run ended
    after = found(Run(TRAINERS[1].run.directory), "norm/")[13]
    for label, values in sizes.items():
        whole = torch.cat(values).double()
        assert after[f"norm/weight/{label}"] == pytest.approx(float(whole.norm()), rel=1e-5)
        assert after[f"norm/weight_rms/{label}"] == pytest.approx(float(whole.square().mean().sqrt()), rel=1e-5)


def test_the_norms_copy_of_the_weights_is_gone_after_the_step(corpus_file: Path) -> None:
    train(compose(tiny(corpus_file, NORMS, "callbacks.norms.every=5", KEEP)))
    (norms,) = (c for c in TRAINERS[0].callbacks if type(c).__name__ == "Norms")
    assert norms._copies == []  # type: ignore[attr-defined]


def test_what_is_done_before_an_update_is_left_out_of_the_steps_seconds(corpus_file: Path) -> None:
    train(compose(tiny(corpus_file, KEEP, "callbacks.keep.sleep=0.1", steps=5)))
    assert TRAINERS[0].state.wall > 0.5
    assert TRAINERS[0].state.seconds < 0.4


def _batch(trainer: Trainer, tokens: int) -> Any:
    rows = tokens // trainer.config.model.context_length
    return next(held_out_batches(trainer.data, "val", 16, tokens, rows, documents=trainer.model.sees_documents))


def test_activations_are_those_of_the_residual_stream(corpus_file: Path) -> None:
    own = tiny(corpus_file, ACTIVATIONS, "callbacks.activations.every=12", "callbacks.activations.tokens=128", KEEP, "model.depth=2")
    own += ["model.dropout=0.2"]  # which is not to be seen
    line = found(train(compose(own)).run, "activation/")[12]
    model = TRAINERS[0].model.eval()
    streams: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0])) for b in model.blocks]
    hooks.append(model.norm.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0])))
    with torch.no_grad():
        model(_batch(TRAINERS[0], 128).inputs)
    assert len(streams) == 3
    for label, x in zip(("embedded", "0", "1"), streams, strict=True):
        assert x.shape == (8, 16, 16)
        assert line[f"activation/rms/{label}"] == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-5)
        assert line[f"activation/largest/{label}"] == pytest.approx(float(x.abs().max()), rel=1e-6)
    assert {k for k in line if "dead" in k} == {"activation/dead/0", "activation/dead/1"}


@pytest.mark.parametrize("ffn", ["gelu", "relu2"])
def test_units_that_never_rise_are_dead(corpus_file: Path, ffn: str) -> None:
    own = tiny(corpus_file, KEEP, "callbacks.keep.silence=16", ACTIVATIONS, f"model/ffn={ffn}", "model.depth=2", "model.bias=true", steps=1)
    line = found(train(compose(own)).run, "activation/")[1]
    assert line["activation/dead/0"] == 0.25, "16 of 64"
    assert line["activation/dead/1"] == 0


def test_a_model_without_hidden_units_has_none_that_are_dead(corpus_file: Path) -> None:
    line = found(train(compose(tiny(corpus_file, ACTIVATIONS, "model/ffn=none", steps=1))).run, "activation/")[1]
    assert set(line) == {f"activation/{what}/{where}" for what in ("rms", "largest") for where in ("embedded", "0")}


KINDS = {
    "plain": [],
    "grouped, rotary, qk_norm": ["model.attention.kv_heads=1", "model/position=rotary", "model.attention.qk_norm=true"],
    "window, alibi": ["model.attention.window=5", "model/position=alibi"],
    "documents": ["model.attention.document_mask=true", "data.corpus.separator='. '"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["sdpa", "naive"])
def test_attention_is_that_of_the_naive_kernel(corpus_file: Path, kind: str, kernel: str) -> None:
    more = [f"model/kernel={kernel}", "model.depth=2", "callbacks.attention.tokens=64", "callbacks.attention.per_head=true"]
    own = tiny(corpus_file, *more, *KINDS[kind], ATTENTION, KEEP, steps=3)
    own += ["callbacks.attention.every=3", "optimizer.learning_rate=0.1"]
    line = found(train(compose(own)).run, "attention/")[3]
    model, batch = TRAINERS[0].model.eval(), _batch(TRAINERS[0], 64)
    if kind == "documents":
        assert batch.document is not None
    for number, block in enumerate(model.blocks):
        attention: Any = block.attention
        own_kernel = attention.kernel
        attention.kernel = build(component_named("model/kernel", "naive").options())
        attention.scores, attention.pattern = nn.Identity(), nn.Identity()
        seen: list[Tensor] = []
        hooks = [tap.register_forward_hook(lambda module, i, x, seen=seen: seen.append(x)) for tap in (attention.scores, attention.pattern)]
        with torch.no_grad():
            model(batch.inputs, document=batch.document)
        for hook in hooks:
            hook.remove()
        attention.kernel = own_kernel  # the next layer is to see what it saw in the run
        scores, pattern = seen[0], seen[1].double()
        assert pattern.shape == (4, 2, 16, 16)
        entropy = -(pattern * pattern.clamp(min=1e-300).log()).sum(-1)
        assert line[f"attention/entropy/{number}"] == pytest.approx(float(entropy.mean()), abs=1e-6)
        assert line[f"attention/largest_score/{number}"] == pytest.approx(float(scores.max()), abs=1e-6)
        for head in range(2):
            assert line[f"attention/entropy/{number}/head_{head}"] == pytest.approx(float(entropy[:, head].mean()), abs=1e-6)
            assert line[f"attention/largest_score/{number}/head_{head}"] == pytest.approx(float(scores[:, head].max()), abs=1e-6)


def test_attention_without_a_kernel_is_refused_or_passed_over(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="this model has none") as error:
        train(compose(tiny(corpus_file, ATTENTION, "model/attention=average")))
    assert error.value.code == 2
    run = train(compose(tiny(corpus_file, KEEP, "callbacks.keep.hide=0", ATTENTION, "model.depth=2", steps=1))).run
    assert set(found(run, "attention/")[1]) == {"attention/entropy/1", "attention/largest_score/1"}
    assert capsys.readouterr().out.count("layers without a kernel are passed over: 0") == 1


def test_each_says_what_it_cost(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(compose(tiny(corpus_file, *ALL, "callbacks.norms.every=4", "callbacks.attention.every=100"))).run
    said = capsys.readouterr().out
    assert re.search(r"norms: 4 times, \d+\.\d ms each, \d+\.\d % of the training time", said)
    assert re.search(r"activations: once, \d+\.\d ms each", said)
    assert re.search(r"attention: once, \d+\.\d ms each", said)
    times = [m["norm/milliseconds"] for m in run.metrics() if "norm/milliseconds" in m]
    each = float(re.search(r"norms: 4 times, (\d+\.\d) ms", said)[1])  # type: ignore[index]
    assert each == pytest.approx(sum(times) / 4, abs=0.06)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("callbacks.norms.every=0", "callbacks.norms.every=0 must be at least 1"),
        ("callbacks.activations.every=-1", "callbacks.activations.every=-1 must be at least 1"),
        ("callbacks.attention.tokens=0", "callbacks.attention.tokens=0 must be at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(corpus_file: Path, option: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        train(compose(tiny(corpus_file, *ALL, option)))


def test_every_mix_and_length_of_held_out_text_gives_a_batch(corpus_file: Path) -> None:
    line = found(train(compose(tiny(corpus_file, ACTIVATIONS, "callbacks.activations.tokens=1000000", steps=1))).run, "activation/")
    assert list(line) == [1]
    task = [o for o in tiny(corpus_file, ACTIVATIONS, steps=1) if not o.startswith("data")]
    assert list(found(train(compose([*task, "data=copy"])).run, "activation/")) == [1]


@pytest.mark.slow
def test_sharded_and_copied_models_have_the_norms_of_one_process(corpus_file: Path, tmp_path: Path) -> None:
    own = tiny(corpus_file, *ALL, "model.depth=2", "callbacks.norms.per_layer=true", "callbacks.norms.every=2", steps=4)
    kinds = {kind: Job(tmp_path / kind, [*own, f"hardware/strategy={kind}"]) for kind in ("ddp", "fsdp")}
    for outcomes in trained(tmp_path / "jobs", list(kinds.values())):
        assert [o["state"] for o in outcomes] == ["done", "done"], outcomes
    alone = train(compose(own)).run
    for kind, job in kinds.items():
        for prefix in ("norm/", "activation/", "attention/"):
            theirs, ours = found(Run(job.directory), prefix), found(alone, prefix)
            assert theirs.keys() == ours.keys()
            for step, line in ours.items():
                assert theirs[step].keys() == line.keys(), kind
                for name, value in line.items():
                    assert theirs[step][name] == pytest.approx(value, rel=2e-3, abs=1e-6), f"{kind}, step {step}: {name}"
