"""Every kernel computes what the naive one does, for every position scheme, mask and way of decoding."""

import gc
import warnings
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from gptlab.config.errors import ConfigError
from gptlab.config.registry import component, components, load_components
from gptlab.config.schema import ModelConfig
from gptlab.model.mask import causal, written_out
from gptlab.model.transformer import Transformer, new_model

load_components()
POSITIONS = [c.name for c in components("model/position")]
CONTEXT, VOCABULARY = 13, 11
DOCUMENT = torch.tensor([[0] * 4 + [1] * 6 + [2] * 3, [0] * 9 + [1] * 4, [0] * 13])
RESTARTING = torch.tensor([[*range(4), *range(6), *range(3)], [*range(9), *range(4)], [*range(13)]])


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(0))


def model(kernel: str, position: str, *, window: int | None = None, kv_heads: int = 2, context: int = CONTEXT) -> Transformer:
    """A small model in float64 whose every weight matters; the same weights for every kernel."""
    parts = {"norm": "layernorm", "ffn": "gelu", "block": "prenorm", "head": "untied", "init": "gpt2"}
    parts |= {"kernel": kernel, "position": position}
    options = {slot: component(f"model/{slot}", name).options() for slot, name in parts.items()}
    options["attention"] = component("model/attention", "multihead").options(window=window, kv_heads=kv_heads)
    made = new_model(ModelConfig(width=24, depth=2, heads=4, context_length=context, **options), VOCABULARY, seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.25)
    return made


def full(made: Transformer, x: Tensor, **rows: Tensor) -> Tensor:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex without a compiler says that it is slow
        return made(x, **rows)


def cached(made: Transformer, x: Tensor, borders: tuple[int, ...], **rows: Tensor) -> Tensor:
    """The same logits, decoded in pieces."""
    cache = made.new_cache(len(x), CONTEXT + 2)
    parts = [
        full(made, x[:, start:end], cache=cache, **{name: value[:, start:end] for name, value in rows.items()})
        for start, end in pairwise((0, *borders, CONTEXT))
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
@pytest.mark.parametrize("position", POSITIONS)
def test_kernels_agree_full_and_cached(position: str, mask: str) -> None:
    window = 5 if mask == "window" else None
    rows = {"document": DOCUMENT, "positions": RESTARTING} if mask == "documents" else {}
    # A document mask reaches over one call only: its keys are the call's own tokens.
    borders = () if mask == "documents" else (5, 6, 7, 10)
    x = tokens()
    reference = full(model("naive", position, window=window), x, **rows)
    assert reference.std() > 0.1
    for kernel in [c.name for c in components("model/kernel")]:
        made = model(kernel, position, window=window)
        torch.testing.assert_close(full(made, x, **rows), reference, rtol=0, atol=1e-12, msg=f"{kernel}, full")
        torch.testing.assert_close(cached(made, x, borders, **rows), reference, rtol=0, atol=1e-12, msg=f"{kernel}, cached")


@pytest.mark.parametrize("position", POSITIONS)
def test_a_document_packed_with_others_has_the_logits_it_has_alone(position: str) -> None:
    x = tokens()
    made = model("sdpa", position)
    packed = full(made, x, document=DOCUMENT, positions=RESTARTING)
    for row, document in product(range(3), range(3)):
        place = DOCUMENT[row] == document
        if place.any():
            alone = full(made, x[row : row + 1, place])
            torch.testing.assert_close(packed[row, place], alone[0], rtol=0, atol=1e-12)


def test_documents_with_a_filled_cache_are_refused() -> None:
    made, x = model("sdpa", "rotary"), tokens()
    cache = made.new_cache(3, CONTEXT)
    full(made, x[:, :5], document=DOCUMENT[:, :5], cache=cache)
    with pytest.raises(ValueError, match="document"):
        full(made, x[:, 5:], document=DOCUMENT[:, 5:], cache=cache)


def test_a_window_sees_its_own_size_and_no_more() -> None:
    x = tokens()
    changed = x.clone()
    changed[:, 0] = (x[:, 0] + 1) % VOCABULARY
    made = model("sdpa", "rotary", window=3)
    del made.blocks[1]  # one layer reaches exactly as far as its window
    differs = (full(made, x) != full(made, changed)).any(-1).any(0).tolist()
    assert differs == [True] * 3 + [False] * (CONTEXT - 3)


def test_a_window_as_long_as_the_row_is_no_window() -> None:
    wide, plain = model("sdpa", "alibi", window=CONTEXT), model("sdpa", "alibi")
    torch.testing.assert_close(full(wide, tokens()), full(plain, tokens()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["none", "sinusoidal", "rotary", "alibi", "t5"])
def test_positions_without_a_table_reach_beyond_the_context(position: str) -> None:
    x = tokens()
    torch.testing.assert_close(full(model("sdpa", position, context=4), x), full(model("sdpa", position), x), rtol=0, atol=1e-6)


def test_a_table_grown_while_generating_still_trains() -> None:
    made = model("sdpa", "rotary", context=4).train()
    full(made, tokens())
    made(tokens()).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize("position", ["rotary", "alibi", "t5"])
def test_relative_positions_see_only_distances(position: str) -> None:
    made, x = model("sdpa", position), tokens()
    moved = torch.arange(CONTEXT)[None] + 7
    torch.testing.assert_close(full(made, x, positions=moved), full(made, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_absolute_positions_see_places(position: str) -> None:
    made, x = model("sdpa", position), tokens()
    assert not torch.allclose(full(made, x, positions=torch.arange(CONTEXT).flip(0)[None]), full(made, x), atol=1e-3)


def test_gradients_agree_between_naive_and_sdpa() -> None:
    def gradients(kernel: str) -> dict[str, Tensor]:
        made = model(kernel, "t5", window=6)
        made(tokens(), document=DOCUMENT).logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in made.named_parameters()}

    expected = gradients("naive")
    for name, gradient in gradients("sdpa").items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def test_grouped_heads_are_repeated_heads() -> None:
    grouped, plain = model("naive", "rotary", kv_heads=2), model("naive", "rotary", kv_heads=4)
    shared = {n: p for n, p in grouped.named_parameters() if ".qkv." not in n}
    plain.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for mine, other in zip(plain.blocks, grouped.blocks, strict=True):
            for part in ("weight", "bias"):
                q, k, v = getattr(other.attention.qkv, part).split([24, 12, 12])
                repeated = [p.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for p in (k, v)]
                getattr(mine.attention.qkv, part).copy_(torch.cat([q, *repeated]))
    torch.testing.assert_close(full(grouped, tokens()), full(plain, tokens()), rtol=0, atol=1e-12)


def test_flex_decodes_many_lengths_on_the_cpu() -> None:
    made, reference = model("flex", "rotary"), model("naive", "rotary")
    borders = tuple(range(1, CONTEXT))
    torch.testing.assert_close(cached(made, tokens(), borders), full(reference, tokens()), rtol=0, atol=1e-12)


def test_flex_refuses_a_gradient_on_the_cpu_and_names_the_others() -> None:
    with pytest.raises(ConfigError, match=r"model/kernel=flex.*CPU.*sdpa or naive"):
        model("flex", "none")(tokens())


def test_the_layers_of_a_pass_ask_a_mask_once_and_the_next_pass_anew() -> None:
    asked = []

    def counting(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        asked.append(1)
        return causal(b, h, i, j)

    made, plain = model("sdpa", "rotary"), model("naive", "rotary")
    for block in made.blocks:
        block.attention.mask = counting  # type: ignore[union-attr]
    for document in (DOCUMENT, DOCUMENT.flip(0), DOCUMENT):
        asked.clear()
        found = full(made, tokens(), document=document)
        assert len(asked) == 1, "two layers, one mask"
        torch.testing.assert_close(found, full(plain, tokens(), document=document))
    gc.collect()
    assert not written_out, "what a pass wrote out is gone with it"
    full(model("sdpa", "rotary", window=3), tokens())
    assert not written_out, "a layer's own mask is not held"
