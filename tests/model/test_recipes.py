"""The recipes are the models they say, learn, and can be looked into."""

import copy
import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.config.compose import compose
from gptlab.config.resolve import Machine, resolve
from gptlab.config.schema import ModelConfig
from gptlab.config.sources import config_dir
from gptlab.model.attention import mean_by_loop, mean_by_matmul, mean_by_softmax
from gptlab.model.transformer import Transformer, count_parameters, flops_per_token, meta_model, new_model

RECIPES = sorted(p.stem for p in Path(config_dir() / "model").glob("*.yaml"))
SMALL = 11_000_000  # parameters with 65 tokens of a model that a test can afford


def config(recipe: str, *overrides: str) -> ModelConfig:
    made = compose([f"model={recipe}", *overrides])
    return resolve(made, Machine(devices=("cpu",))).model if made.model.dial else made.model


def size(recipe: str, vocabulary: int) -> dict[str, int]:
    return count_parameters(meta_model(config(recipe), vocabulary))


def batch(rows: int, length: int, vocabulary: int = 65) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("gpt2", 124_439_808), ("gpt2_medium", 354_823_168), ("gpt2_large", 774_030_080), ("gpt2_xl", 1_557_611_200)],
)
def test_gpt2_has_the_published_size(recipe: str, parameters: int) -> None:
    assert size(recipe, 50_257)["total"] == parameters


def test_char_is_nanogpts_character_model() -> None:
    counts = size("char", 65)
    model = meta_model(config("char"), 65)
    assert counts["total"] == pytest.approx(10.7e6, rel=0.01)
    assert model.embedding.weight.numel() == 24_960
    assert "bias" not in counts


def test_llama_and_modern_are_of_gpt2s_size() -> None:
    for recipe in ("llama", "modern"):
        assert 0.8 < size(recipe, 50_257)["matrix"] / size("gpt2", 50_257)["matrix"] < 1.2


def test_flops_are_six_per_weight_and_token() -> None:
    model = meta_model(config("gpt2"), 50_257)
    matrices = 12 * 12 * 768**2 + 50_257 * 768
    assert flops_per_token(model) == 6 * matrices + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fresh_model_knows_nothing(recipe: str) -> None:
    """Its loss is near ln(v), that of a uniform guess."""
    chosen = config(recipe)
    if count_parameters(meta_model(chosen, 65))["total"] > SMALL:
        # each of these at a width where logits of drawn weights (std 0.02 · sqrt(width)) are still nearly flat
        chosen = config(recipe, "model.depth=4", "model.width=128", "model.heads=4", "model.context_length=64")
    model = new_model(chosen, 65, seed=0).eval()
    with torch.inference_mode():
        assert float(loss_of(model, *batch(2, 32))) == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize("recipe", ["nano", "modern"])
def test_one_batch_is_learned_by_heart(recipe: str) -> None:
    chosen = config(recipe) if recipe == "nano" else config(recipe, "model.depth=2", "model.width=128", "model.heads=4")
    model, (inputs, targets) = new_model(chosen, 65, seed=0), batch(4, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        if loss < 0.1:
            return
        loss.backward()
        optimizer.step()
    pytest.fail(f"the loss is still {float(loss):.2f}")


def test_bigram_sees_the_current_token_alone() -> None:
    chosen = config("bigram")
    assert chosen.depth == 0
    model = new_model(chosen, 65, seed=0).eval()
    inputs, _ = batch(3, 20)
    with torch.inference_mode():
        alone = model(torch.arange(65)[:, None])[:, 0]
        torch.testing.assert_close(model(inputs), alone[inputs])
    assert len(torch.unique(alone, dim=0)) == 65


def test_bigram_can_hold_any_table() -> None:
    model = new_model(config("bigram"), 65, seed=0)
    assert int(torch.linalg.matrix_rank(model(torch.arange(65)[:, None])[:, 0].double())) == 65


def test_bigram_reaches_the_loss_of_the_counted_table_on_its_training_text() -> None:
    text = "".join(topics[name] for name in ("assert", "for", "while", "with", "try", "class"))
    characters = sorted(set(text))
    tokens = torch.tensor([characters.index(c) for c in text])
    counts = torch.zeros(len(characters), len(characters))
    counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(tokens) - 1), accumulate=True)
    frequency = counts / counts.sum()
    table = counts / counts.sum(1, keepdim=True).clamp(min=1)
    counted = -(frequency * table.clamp(min=1e-30).log()).sum()
    model = new_model(config("bigram"), len(characters), 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(400):
        # the model sees the current token alone, so every pair of the text is one entry of this product
        loss = -(frequency * model(torch.arange(len(characters))[:, None])[:, 0].log_softmax(-1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = loss_of(model, tokens[None, :-1], tokens[None, 1:])
    assert counted <= whole.item() < counted + 0.002


def test_bigram_decodes_with_a_cache() -> None:
    model, (inputs, _) = new_model(config("bigram"), 65, seed=0).eval(), batch(1, 4)
    cache = model.new_cache(1, 8)
    with torch.inference_mode():
        found = torch.cat([model(token, cache=cache) for token in inputs.split(1, 1)], 1)
        torch.testing.assert_close(found, model(inputs))
    assert cache.length == 4


def test_the_three_forms_of_averaging_agree() -> None:
    value = torch.randn(2, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, -1, -1)
    expected = value.cumsum(1) / torch.arange(1, 10)[:, None]
    for mean in (mean_by_loop, mean_by_matmul, mean_by_softmax):
        torch.testing.assert_close(mean(value, allowed), expected, rtol=0, atol=1e-12)


def test_the_three_forms_of_averaging_are_one_model() -> None:
    inputs, _ = batch(2, 16)
    document = (torch.arange(16) >= 7).long().expand(2, -1)
    logits = []
    for form in ("loop", "matmul", "softmax"):
        model = new_model(config("average", f"model.attention.form={form}"), 65, seed=0).double().eval()
        with torch.inference_mode():
            logits.append(torch.cat((model(inputs), model(inputs, document=document)), 1))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-12)


def test_the_ladder_climbs_one_rung_at_a_time() -> None:
    depth = {recipe: config(recipe).depth for recipe in ("bigram", "average", "single_head", "multi_head", "one_block", "nano")}
    assert depth == {"bigram": 0, "average": 1, "single_head": 1, "multi_head": 1, "one_block": 1, "nano": 4}
    assert (config("single_head").heads, config("multi_head").heads) == (1, 4)


@pytest.mark.parametrize(("block", "norms"), [("prenorm", 9), ("postnorm", 8), ("parallel", 5)])
def test_each_block_has_its_norms(block: str, norms: int) -> None:
    """Two a block (one where both parts share it), and a last one unless the blocks end in theirs."""
    model = meta_model(config("nano", f"model/block={block}"), 65)
    assert len(model.blocks) == 4
    assert sum(isinstance(module, nn.LayerNorm) for module in model.modules()) == norms


def test_zero_output_starts_every_block_as_the_identity() -> None:
    model = new_model(config("nano", "model/init=zero_output", "model/head=untied"), 65, seed=0).eval()
    streams: list[Tensor] = []
    for module in (model.embedded, *(block.residual_post for block in model.blocks)):
        module.register_forward_hook(lambda module, inputs, output: streams.append(output))
    with torch.inference_mode():
        logits = model(batch(1, 8)[0])
    assert len(streams) == 5
    assert all(torch.equal(stream, streams[0]) for stream in streams)
    assert not logits.any()


def test_outputs_of_deep_gpt2_are_drawn_smaller() -> None:
    block = new_model(config("nano", "model.width=256"), 65, seed=0).blocks[0]
    assert float(block.ffn.up.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(block.ffn.down.weight.std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.02)


def test_the_same_seed_draws_the_same_on_every_device_and_another_does_not() -> None:
    one, same, other = (new_model(config("nano"), 65, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["blocks.2.ffn.up.weight"], other["blocks.2.ffn.up.weight"])
    assert not torch.equal(one["blocks.2.ffn.up.weight"], one["blocks.3.ffn.up.weight"])


def test_padding_the_vocabulary_changes_no_logit() -> None:
    inputs, _ = batch(1, 8)
    plain, padded = (new_model(config("nano", f"model.pad_vocab_to={n}"), 65, seed=0).eval() for n in (1, 64))
    assert padded.embedding.weight.shape[0] == 128
    with torch.no_grad():
        padded.embedding.weight[:65] = plain.embedding.weight
    with torch.inference_mode():
        assert padded(inputs).shape == (1, 8, 65)
        torch.testing.assert_close(padded(inputs), plain(inputs))


def test_the_pattern_can_be_read() -> None:
    model = new_model(config("nano", "model/kernel=naive"), 65, seed=0).eval()
    seen: list[Tensor] = []
    model.blocks[2].attention.pattern.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        model(batch(2, 10)[0])
    (pattern,) = seen
    assert pattern.shape == (2, 4, 10, 10)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 10))
    assert not pattern.triu(1).any()


def test_the_pattern_can_be_replaced() -> None:
    model = new_model(config("one_block", "model/kernel=naive"), 65, seed=0).double().eval()
    inputs, _ = batch(1, 10)
    other = torch.cat(((inputs[:, :9] + 1) % 65, inputs[:, 9:]), 1)
    with torch.inference_mode():
        assert not torch.equal(model(inputs)[:, 9], model(other)[:, 9])
        tap = model.blocks[0].attention.pattern
        hook = tap.register_forward_hook(lambda module, inputs, output: torch.eye(10).expand_as(output).to(output))
        # each token now looks at itself alone, so that the others can no longer be told apart
        torch.testing.assert_close(model(inputs)[:, 9], model(other)[:, 9], rtol=0, atol=1e-14)
        hook.remove()
        assert not torch.equal(model(inputs)[:, 9], model(other)[:, 9])


def test_a_fused_kernel_has_no_pattern_to_tap() -> None:
    assert not hasattr(meta_model(config("nano", "model/kernel=sdpa"), 65).blocks[0].attention, "pattern")


def test_taps_leave_no_trace_in_the_compiled_graph() -> None:
    def operations(model: Transformer) -> list[str]:
        from torch._dynamo.backends.common import aot_autograd

        counted: list[str] = []

        def count(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
            counted.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=aot_autograd(fw_compiler=count), fullgraph=True)(batch(2, 8)[0])
        return counted

    tapped = new_model(config("nano", "model/kernel=naive", "model.depth=1"), 65, seed=0).eval()
    bare = copy.deepcopy(tapped)
    for module in list(bare.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Identity):
                delattr(module, name)
                object.__setattr__(module, name, _same)
    found = operations(tapped)
    assert any("softmax" in name for name in found)
    assert found == operations(bare)


def _same(x: Tensor) -> Tensor:
    return x
