"""Documents that share a row do not see one another, and each is computed as if it stood alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config.compose import compose
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component, components, load_components, register
from gptlab.config.schema import ModelConfig
from gptlab.model.mask import document_starts
from gptlab.model.position import Position
from gptlab.model.transformer import Transformer, meta_model, new_model
from gptlab.runner.contract import contract

load_components()
CONTEXT, VOCABULARY = 12, 11
# Rows of three, two and one document; ids are names, in no order, and one comes back for another document.
DOCUMENT = torch.tensor([[7] * 4 + [-3] * 6 + [7] * 2, [5] * 1 + [2] * 11, [0] * 12])
ATTENTION: dict[str, dict[str, Any]] = {
    "multihead": {},
    "window": {"window": 3},
    "grouped": {"kv_heads": 2, "qk_norm": True},
    "documents": {"document_mask": True},
}


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(0))


def config(kernel: str = "sdpa", position: str = "rotary", attention: str = "multihead", **options: Any) -> ModelConfig:
    parts = {"norm": "rmsnorm", "ffn": "gelu", "block": "prenorm", "head": "untied", "init": "gpt2"}
    parts |= {"kernel": kernel, "position": position}
    chosen: dict[str, Any] = {slot: component(f"model/{slot}", name).options() for slot, name in parts.items()}
    chosen["attention"] = component("model/attention", attention).options(**options)
    return ModelConfig(width=16, depth=2, heads=4, context_length=CONTEXT, **chosen)


def stirred(config: ModelConfig) -> Transformer:
    made = new_model(config, VOCABULARY, seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.25)
    return made


def places() -> Iterator[tuple[int, slice]]:
    """(row, its place) of every document of DOCUMENT."""
    for row, starts in enumerate(document_starts(DOCUMENT)):
        borders = [*starts.unique().tolist(), CONTEXT]
        yield from ((row, slice(start, end)) for start, end in pairwise(borders))


def assert_alone(model: Transformer) -> None:
    x = tokens()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex without a compiler says that it is slow
        packed = model(x, document=DOCUMENT)
        assert not torch.allclose(packed[0], model(x)[0], atol=1e-3), "documents change nothing here, so nothing is tested"
        for row, place in places():
            torch.testing.assert_close(packed[row, place], model(x[row : row + 1, place])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("position", [c.name for c in components("model/position")])
@pytest.mark.parametrize("kernel", [c.name for c in components("model/kernel")])
def test_a_document_among_others_has_the_logits_it_has_alone(kernel: str, position: str, attention: str) -> None:
    assert_alone(stirred(replace(config(kernel, position, **ATTENTION[attention]), depth=1)))  # flex is slow on the CPU


@pytest.mark.parametrize("form", ["loop", "matmul", "softmax"])
def test_an_average_of_a_document_is_what_it_is_alone(form: str) -> None:
    assert_alone(stirred(config("naive", "learned", "average", form=form)))


def test_the_contract_sees_positions_that_do_not_restart() -> None:
    class PlaceInRow(Position):
        def embed(self, x: Tensor, positions: Tensor) -> Tensor:
            place, feature = torch.arange(x.shape[1], dtype=x.dtype)[:, None], torch.arange(x.shape[2], dtype=x.dtype)
            return x + (place * feature).sin()

    register("model/position", "place_in_row")(PlaceInRow)
    checks = {check.name: check for check in contract(component("model/position", "place_in_row"))}
    assert checks["documents"].passed, "it sees no other document"
    assert not checks["documents alone"].passed
    assert "in a packed row and in a row of its own" in checks["documents alone"].detail


def test_gradients_of_packed_documents_are_the_sum_of_those_alone() -> None:
    x = tokens()

    def gradients(*parts: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        model = stirred(config(position="learned")).train()
        for part, document in parts:
            F.cross_entropy(model(part, document=document).flatten(0, 1), part.flatten(), reduction="sum").backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    alone = gradients(*((x[row : row + 1, place], None) for row, place in places()))
    for name, gradient in gradients((x, DOCUMENT)).items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-10, atol=1e-10, msg=name)


def test_a_document_begins_where_the_id_changes() -> None:
    assert document_starts(DOCUMENT).tolist() == [[0] * 4 + [4] * 6 + [10] * 2, [0] + [1] * 11, [0] * 12]
    assert document_starts(DOCUMENT[:, :1]).tolist() == [[0], [0], [0]]
    assert document_starts(torch.arange(5, dtype=torch.int32)[None]).tolist() == [[0, 1, 2, 3, 4]]


def test_given_positions_are_kept() -> None:
    model, x = stirred(config(position="learned")), tokens()
    given = torch.arange(CONTEXT).flip(0)[None]
    with torch.inference_mode():
        restarting = model(x, document=DOCUMENT)
        own = torch.arange(CONTEXT)[None] - document_starts(DOCUMENT)
        torch.testing.assert_close(model(x, document=DOCUMENT, positions=own), restarting, rtol=0, atol=0)
        assert not torch.allclose(model(x, document=DOCUMENT, positions=given), restarting, atol=1e-3)


def test_documents_fill_an_empty_cache_as_without_one() -> None:
    model, x = stirred(config(position="learned")), tokens()
    with torch.inference_mode():
        torch.testing.assert_close(
            model(x, document=DOCUMENT, cache=model.new_cache(3, CONTEXT + 1)), model(x, document=DOCUMENT), rtol=0, atol=1e-12
        )


def test_one_document_in_every_row_is_none() -> None:
    model, x = stirred(config(position="t5")), tokens()
    with torch.inference_mode():
        torch.testing.assert_close(model(x, document=torch.full((1, CONTEXT), 9)), model(x), rtol=0, atol=1e-12)


def test_a_model_says_whether_it_asks_for_its_documents() -> None:
    def asks(*overrides: str) -> bool:
        return meta_model(compose(overrides).model, 65).sees_documents

    assert asks("model=nano", "model/attention=documents")
    assert asks("model=nano", "model/attention=documents", "model/block=parallel")
    assert asks("model=average", "model.attention.document_mask=true")
    assert not asks("model=nano")
    assert not asks("model=average")
    assert not asks("model=bigram")


def test_the_option_alone_changes_neither_weights_nor_logits() -> None:
    plain, asking = stirred(config()), stirred(config(document_mask=True))
    asking.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        assert torch.equal(asking(tokens()), plain(tokens()))


@pytest.mark.parametrize("position", ["learned", "rotary", "t5"])
def test_documents_need_nothing_from_the_device(position: str) -> None:
    """Tensors of the meta device have no values: a forward pass that waited for one would fail."""
    model = meta_model(config(position=position), VOCABULARY)
    assert model(tokens().to("meta"), document=DOCUMENT.to("meta")).shape == (3, CONTEXT, VOCABULARY)
    with pytest.raises(RuntimeError, match="meta"):
        model(tokens().to("meta"), positions=DOCUMENT.to("meta"))


def test_documents_compile_into_one_graph() -> None:
    model, x = stirred(config(position="learned")), tokens()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, document=DOCUMENT), model(x, document=DOCUMENT), rtol=0, atol=1e-12)


def test_a_row_longer_than_the_learned_positions_is_refused_with_documents_too() -> None:
    long = torch.zeros(1, CONTEXT + 1, dtype=torch.long)
    with pytest.raises(ConfigError, match="13 tokens are longer than the 12 learned positions"):
        stirred(config(position="learned"))(long, document=long)
