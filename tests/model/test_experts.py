"""A mixture of experts is its formula, drops nothing, costs what it says, and its load evens out."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError
from gptlab.config.record import Recording
from gptlab.config.registry import build, component, load_components
from gptlab.data.loader import Batch
from gptlab.hardware.checkpointing import block, selective
from gptlab.hardware.strategy import _has_unused
from gptlab.model import experts
from gptlab.model.context import Auxiliary, Context
from gptlab.model.experts import MixtureOfExperts, grouped_product
from gptlab.model.transformer import Transformer, count_parameters, flops_per_token, meta_model, new_model
from gptlab.objective.lm import next_token_loss
from gptlab.optimizer.groups import parameter_groups
from gptlab.runner.contract import contract
from gptlab.runner.contract_model import CONTEXT, VOCABULARY, stirred, tiny, tokens
from tests.ranks import Job, trained
from tests.tiny import tiny as tiny_run

load_components()
WIDTH = 16


def options(**values: object) -> Any:
    return component("model/ffn", "moe").options(**values)


def model_with(**values: object) -> Transformer:
    return stirred(tiny(ffn=options(**values)))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def part(*, bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **values: object) -> MixtureOfExperts:
    """One mixture of width 16 with weights at random, layer 3 of a model that is not there."""
    made: MixtureOfExperts = build(options(**values), width=WIDTH, bias=bias, dropout=dropout, layer=3, depth=4).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i) * 0.5)
    return made


def context(losses: dict[str, Tensor] | None = None) -> Context:
    nothing: Any = None  # the feed-forward looks at the losses alone
    return Context(nothing, nothing, nothing, None, nothing, nothing, None, None if losses is None else Auxiliary(losses))


def by_token(moe: MixtureOfExperts, x: Tensor) -> Tensor:
    """The formula, token by token and expert by expert."""
    ups, downs = moe.up.weight.chunk(moe.experts), moe.down.weight.chunk(moe.experts)
    up_biases: Any = [0] * moe.experts if moe.up.bias is None else moe.up.bias.chunk(moe.experts)
    down_biases: Any = [0] * moe.experts if moe.down.bias is None else moe.down.bias.chunk(moe.experts)
    activate = (lambda h: F.gelu(h, approximate="tanh")) if moe.activation == "gelu" else (lambda h: F.relu(h) ** 2)
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        probability = torch.softmax(moe.router.weight @ token, 0)
        best = sorted(range(moe.experts), key=lambda i: -float(probability[i].detach()))[: moe.top_k]
        whole = sum(probability[i] for i in best) if moe.top_k > 1 else 1.0
        made = sum(probability[i] / whole * (downs[i] @ activate(ups[i] @ token + up_biases[i]) + down_biases[i]) for i in best)
        if moe.shared:
            made = made + moe.shared_down(activate(moe.shared_up(token)))
        out.append(made)
    return torch.stack(out).view_as(x)  # type: ignore[arg-type]


FORMS = [
    {},
    {"experts": 5, "top_k": 1},
    {"experts": 3, "top_k": 2, "activation": "relu2", "bias": False},
    {"experts": 4, "top_k": 4},
    {"experts": 4, "top_k": 2, "shared": 2},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_output_and_gradients_are_those_of_the_formula_token_by_token(form: dict[str, Any]) -> None:
    moe, x = part(**form), random(3, 7, WIDTH, seed=9).requires_grad_()
    weighted = random(3, 7, WIDTH, seed=8)
    inputs = [x, *moe.parameters()]
    found, expected = moe(x, context()), by_token(moe, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((found * weighted).sum(), inputs), torch.autograd.grad((expected * weighted).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_gradients_are_right_by_finite_differences(form: dict[str, Any]) -> None:
    moe, x = part(**form, expansion=1.0), random(1, 4, WIDTH, seed=9).requires_grad_()
    names = ("router.weight", "down.bias", "up.bias")
    chosen = [dict(moe.named_parameters())[n] for n in names]

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        losses: dict[str, Tensor] = {}
        out = torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x, context(losses)))
        return out, *losses.values()

    assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in chosen)))


def test_the_grouped_product_keeps_the_promises_of_an_operator() -> None:
    rows, weight, bias = (random(*s).requires_grad_() for s in ((6, 3), (8, 3), (8,)))
    for ends in ([0, 2, 2, 6], [6, 6, 6, 6]):
        torch.library.opcheck(grouped_product, (rows, weight, bias, torch.tensor(ends)))
        torch.library.opcheck(grouped_product, (rows, weight, None, torch.tensor(ends)))


def test_one_expert_is_the_dense_feed_forward() -> None:
    x = random(2, 5, WIDTH, seed=9)
    moe = part(experts=1, top_k=1)
    dense = build(component("model/ffn", "gelu").options(), width=WIDTH, bias=True, dropout=0.0, layer=3, depth=4).double()
    dense.load_state_dict({n: w for n, w in moe.state_dict().items() if not n.startswith("router")})
    torch.testing.assert_close(moe(x, context()), dense(x, context()), rtol=0, atol=1e-12)


def test_no_token_is_dropped_when_all_want_the_same_experts() -> None:
    moe = part(experts=8, top_k=2)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[5], moe.router.weight[6] = 3.0, 2.0
    x = random(4, 50, WIDTH, seed=9).abs()  # a positive sum: 5 and 6 for all
    torch.testing.assert_close(moe(x, context()), by_token(moe, x), rtol=0, atol=1e-11)


def test_a_token_has_the_same_output_in_whatever_company() -> None:
    moe, x = part(), random(4, 9, WIDTH, seed=9)
    together = moe(x, context())
    for row, place in itertools.product(range(4), range(9)):
        alone = moe(x[row : row + 1, place : place + 1], context())
        torch.testing.assert_close(alone[0, 0], together[row, place], rtol=0, atol=1e-12)


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_row() -> None:
    model, x = model_with(), tokens()
    with torch.inference_mode():
        cache = model.new_cache(len(x), CONTEXT)
        parts = [model(x[:, t : t + 1], cache=cache) for t in range(CONTEXT)]
        torch.testing.assert_close(torch.cat(parts, 1), model(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", [{"experts": 4, "top_k": 1}, {"shared": 2}, {"activation": "relu2", "router_z_loss": 0.001}], ids=str)
def test_every_form_keeps_the_contract_of_a_feed_forward(form: dict[str, Any]) -> None:
    moe = component("model/ffn", "moe")
    assert not {c.name: c.detail for c in contract(moe, moe.options(**form)) if not c.passed}


def test_compiled_loss_gradients_and_loads_are_the_eager_ones() -> None:
    model = model_with(router_z_loss=0.1).train()
    x = tokens()
    batch = Batch(x, x.roll(-1, 1))
    found = []
    torch._dynamo.reset()
    for step in (next_token_loss, torch.compile(next_token_loss, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with Recording(True) as told:
            loss = step(model, batch)
        loss.backward()
        loads = {n: v for n, v in told.metrics({}).items() if n.startswith("moe/")}
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], loads))
    (eager, gradients, loads), (compiled, others, told_loads) = found
    torch.testing.assert_close(eager, compiled, rtol=1e-12, atol=0)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert loads
    assert told_loads == pytest.approx(loads)


# What it costs


@pytest.mark.parametrize("form", [{}, {"experts": 4, "top_k": 1}, {"shared": 2, "experts": 6}, {"expansion": 2.0}], ids=str)
def test_the_active_matrices_are_those_of_the_dense_feed_forward(form: dict[str, Any]) -> None:
    dense = component("model/ffn", "gelu").options(expansion=form.get("expansion", 4.0))
    with torch.device("meta"):
        moe, gelu = (Transformer(tiny(ffn=chosen), VOCABULARY) for chosen in (options(**form), dense))
    assert count_parameters(moe, active=True)["matrix"] == count_parameters(gelu)["matrix"]
    assert flops_per_token(moe) == flops_per_token(gelu)
    each = form.get("top_k", 2) + form.get("shared", 0)
    feed_forward = 2 * 2 * form.get("expansion", 4.0) * 32 * 32
    more = feed_forward * ((form.get("experts", 8) + form.get("shared", 0)) / each - 1)
    assert count_parameters(moe)["matrix"] == count_parameters(gelu)["matrix"] + more


def test_a_dense_model_is_active_as_a_whole() -> None:
    model = meta_model(compose(["model=nano"]).model, VOCABULARY)
    assert count_parameters(model, active=True) == count_parameters(model)


# How it is drawn and updated


def test_each_expert_is_drawn_from_a_seed_of_its_own() -> None:
    few, many = (new_model(tiny(ffn=options(experts=e)), VOCABULARY, seed=0) for e in (4, 8))
    up, down = (list(many.blocks[0].ffn.get_parameter(f"{n}.weight").chunk(8)) for n in ("up", "down"))
    for drawn in (up, down):
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    for name, mine in (("up", up), ("down", down)):
        for one, other in zip(few.blocks[0].ffn.get_parameter(f"{name}.weight").chunk(4), mine, strict=False):
            assert torch.equal(one, other), "an expert's weights depend on how many there are"
    assert float(torch.cat(down).detach().std()) == pytest.approx(0.02 / 2, rel=0.05), (
        "not drawn as what writes to the stream: 1 / sqrt(2 · depth)"
    )
    assert float(torch.cat(up).detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("init", ["gpt2", "zero_output"])
def test_a_fresh_router_tells_experts_apart(init: str) -> None:
    model = new_model(tiny(ffn=options(), init=component("model/init", init).options()), VOCABULARY, seed=0)
    rows = model.blocks[0].ffn.get_parameter("router.weight")
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(rows, 2))


def test_muon_makes_each_expert_orthogonal_and_leaves_the_router_to_adamw() -> None:
    model = new_model(tiny(ffn=options()), VOCABULARY, seed=0)
    given = parameter_groups(model, model.roles())
    parts = {n: rows for g in given for n, rows in zip(g["names"], g["parts"], strict=True)}
    assert parts["blocks.0.ffn.up.weight"] == [64] * 8
    assert parts["blocks.0.ffn.down.weight"] == [32] * 8
    assert model.roles()["blocks.0.ffn.router.weight"] == "embedding"
    muon = build(component("optimizer", "muon").options(precision="fp32", learning_rate=1.0), groups=given, device=torch.device("cpu"))
    ffn: Any = model.blocks[0].ffn
    before = ffn.up.weight.detach().clone()
    ffn.up.weight.grad = torch.cat([10.0**-i * random(64, 32, seed=i, dtype=torch.float32) for i in range(8)])
    muon.step()
    for moved in (before - ffn.up.weight.detach()).chunk(8):  # whole, the first would drown the others
        values = torch.linalg.svdvals(moved) / 2**0.5  # Muon's scale of 64 rows by 32 columns
        assert 0.5 < float(values.min()) <= float(values.max()) < 1.3


def test_experts_without_tokens_have_gradients_of_zero() -> None:
    """As ddp needs them: a parameter without any would be waited for."""
    model = model_with(experts=16, top_k=1).train()
    assert not _has_unused(model)
    x = tokens(1)[:, :3]
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    for ffn in (b.ffn for b in model.blocks):
        for name in ("up", "down"):
            gradient = ffn.get_parameter(f"{name}.weight").grad
            assert gradient is not None
            idle = [not bool(g.any()) for g in gradient.chunk(16)]
            assert 13 <= sum(idle) < 16


# What it adds to the loss, and tells


def test_the_load_balance_is_its_formula_and_least_when_even() -> None:
    moe, x = part(experts=4, top_k=2, load_balance=0.5, router_z_loss=0.25), random(6, 8, WIDTH, seed=9)
    losses: dict[str, Tensor] = {}
    for _ in range(2):  # a checkpointed block runs twice
        moe(x, context(losses))
    scores = x.view(-1, WIDTH) @ moe.router.weight.T
    probability = scores.softmax(-1)
    chosen = F.one_hot(probability.topk(2).indices, 4).sum(1).double()
    expected = 4 * ((chosen.sum(0) / chosen.sum()) * probability.mean(0)).sum()
    assert set(losses) == {"load_balance/3", "router_z/3"}
    torch.testing.assert_close(losses["load_balance/3"], 0.5 * expected)
    torch.testing.assert_close(losses["router_z/3"], 0.25 * scores.logsumexp(-1).square().mean())
    with torch.no_grad():
        moe.router.weight.zero_()
    moe(x, context(losses))
    assert float(losses["load_balance/3"].detach()) == pytest.approx(0.5), "equal probabilities: 1, whoever is chosen"


def test_nothing_is_counted_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the objective (generation, evaluation) nor the line of metrics.jsonl, which most steps do not have."""
    asked: list[Tensor] = []
    monkeypatch.setattr(experts, "_counts", lambda ends: asked.append(ends) or ends.diff(prepend=ends.new_zeros(1)))
    moe, x = part(), random(1, 2, WIDTH)
    moe(x, context())
    assert not asked
    with Recording(False):
        moe(x, context())
    assert not asked
    with Recording(True):
        moe(x, context())
    assert len(asked) == 1


def test_a_weight_of_zero_adds_no_loss() -> None:
    losses: dict[str, Tensor] = {}
    part(load_balance=0.0)(random(1, 2, WIDTH), context(losses))
    assert not losses


@pytest.mark.parametrize("again", [block, selective])
def test_loss_and_gradients_do_not_depend_on_checkpointing(again: Any) -> None:
    found = []
    for recompute in (None, again()):
        model = model_with().train()
        if recompute is not None:
            model.recompute = recompute
        x = tokens()
        loss = next_token_loss(model, Batch(x, x.roll(-1, 1)))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def loads(run: Any) -> list[float]:
    return [m["moe/0/load_max"] for m in run.metrics() if "moe/0/load_max" in m]


def test_a_run_tells_each_experts_load_and_keeps_the_balance_out_of_the_held_out_loss(corpus_file: Path) -> None:
    heavy = train(compose(tiny_run(corpus_file, "model/ffn=moe", "model.ffn.load_balance=1000", "callbacks.evaluation.every=12"))).run
    lines = [m for m in heavy.metrics() if "train/loss" in m]
    for line in lines:
        each = [line[f"moe/0/load/{i}"] for i in range(8)]
        assert sum(each) / 8 == pytest.approx(1.0, abs=1e-6)
        assert (min(each), max(each)) == pytest.approx((line["moe/0/load_min"], line["moe/0/load_max"]))
        assert 0 < line["moe/0/entropy"] <= 2.0795  # ln 8
        assert line["train/load_balance/0"] >= 900
        assert line["train/loss"] > 900
    held_out = [m["val/loss"] for m in heavy.metrics() if "val/loss" in m]
    assert held_out
    assert max(held_out) < 10
    assert load(heavy.directory).sample("the ", max_tokens=8)


def test_the_balance_evens_out_the_load(corpus_file: Path) -> None:
    common = ("model/ffn=moe", "model.width=32", "trainer.log_every=5", "optimizer.learning_rate=0.01", "trainer.batch_tokens=256")
    found = {}
    for weight in (0.0, 0.1):
        run = train(compose(tiny_run(corpus_file, *common, f"model.ffn.load_balance={weight}", "study=balance", steps=80))).run
        found[weight] = sum(loads(run)[-6:]) / 6
    assert found[0.1] < 1.5
    assert found[0.1] < 0.8 * found[0.0], found


@pytest.mark.slow
def test_ranks_train_what_one_process_trains(tmp_path: Path, home_folder: Path, corpus_file: Path) -> None:
    """With idle experts on each, and with every layer's balance, whoever shards the model."""
    small = tiny_run(
        corpus_file, "model/ffn=moe", "model.ffn.experts=16", "model.depth=2", "hardware.micro_batch=1", "hardware.precision=fp32"
    )
    jobs = [Job(tmp_path / kind, [*small, f"hardware/strategy={kind}"]) for kind in ("ddp", "fsdp")]
    variables = {"GPTLAB_HOME": str(home_folder), "HF_HUB_OFFLINE": "1"}
    trained(tmp_path, jobs, ranks=2, environment=variables)
    trained(tmp_path, [Job(tmp_path / "single", small)], ranks=0, environment=variables)
    found = {}
    for kind in ("single", "ddp", "fsdp"):
        (file,) = (tmp_path / kind).glob("*/*/metrics.jsonl")
        lines = map(json.loads, file.read_text().splitlines())
        found[kind] = [value for line in lines for name, value in line.items() if name in ("train/loss", "val/loss")]
    assert len(found["single"]) >= 13
    assert found["ddp"] == pytest.approx(found["single"], rel=1e-5)
    assert found["fsdp"] == pytest.approx(found["single"], rel=1e-5)


# What does not fit


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["top_k=3"], r"model\.ffn\.top_k=3 does not divide the hidden width 512 .*; [24] would"),
        (["shared=1"], r"model\.ffn\.top_k=2 and model\.ffn\.shared=1, 3 together, do not divide the hidden width 512"),
        (["top_k=9"], r"model\.ffn\.top_k=9 must be from 1 to model\.ffn\.experts=8"),
        (["top_k=0"], r"model\.ffn\.top_k=0 must be from 1 to"),
        (["experts=0"], r"model\.ffn\.experts=0 must be at least 1"),
        (["shared=-1"], r"model\.ffn\.shared=-1 must be at least 0"),
        (["expansion=0"], r"model\.ffn\.expansion=0\.0 leaves no hidden units"),
        (["expansion=0.33"], r"model\.ffn\.expansion=0\.33 at width 128 gives 42\.24 hidden units, not a whole number"),
        (["load_balance=-0.1"], r"model\.ffn\.load_balance=-0\.1 must be at least 0"),
        (["router_z_loss=inf"], r"model\.ffn\.router_z_loss=inf must be at least 0 and finite"),
        (["activation=silu"], r"model\.ffn\.activation=silu is not one of gelu, relu2"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_numbers_that_do_not_fit_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        meta_model(compose(["model=nano", "model/ffn=moe", *(f"model.ffn.{o}" for o in overrides)]).model, VOCABULARY)
    assert "\n" not in str(refused.value)
